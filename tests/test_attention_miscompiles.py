"""Attention that once came out wrong, or could: each model here is the smallest that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from test_written_out_attention import PATTERN, qkv, site
from torch import Tensor, nn

_S = 9


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def index() -> Tensor:
    return torch.arange(_S)


# -- what a proof has read, or a rewrite reads earlier or later than the graph, is written to ------------------------


class _Table(nn.Module):
    """Attention with a learned bias, of which `write` changes something in place."""

    def __init__(self, bias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, _S, _S))
        self.bias = bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + self.bias(self.table)).softmax(-1).to(v.dtype) @ v


def _masked_later(table: Tensor) -> Tensor:
    bias = table.tanh()
    bias.masked_fill_(index()[:, None] == 2, -math.inf)
    return bias


def _widened_before(table: Tensor) -> Tensor:
    bias = table.bfloat16().tanh()
    wide = bias.float()
    bias.mul_(3)
    return wide


def _zero_no_more(table: Tensor) -> Tensor:
    zero = torch.zeros(3, _S, _S)
    zero.add_(table.detach() - 9)
    return torch.where(index() != 4, zero, -math.inf)


def _lowest_no_more(table: Tensor) -> Tensor:
    low = torch.full((), -math.inf)
    low.zero_()
    return torch.where(index() != 4, torch.zeros(()), low)


@pytest.mark.parametrize("bias", [_masked_later, _widened_before, _zero_no_more, _lowest_no_more])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_that_is_written_in_place_is_what_it_is_then(bias: Callable[[Tensor], Tensor], dtype: Any) -> None:
    result = compare(_Table(bias), qkv(dtype, grad=False), grad=False)
    assert not result.problems, result.reasons
    assert "writes in place to it" in site(result).reason


def test_a_number_that_replaces_scores_is_what_it_is_then() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        low = torch.full((), -math.inf)
        low.fill_(2.0)
        return torch.where(index() != 4, q @ k.mT, low).softmax(-1) @ v

    result = compare(model, qkv())
    assert not result.problems and "writes in place to it" in site(result).reason


@pytest.mark.parametrize("written", ["query", "key", "value", "none"])
def test_heads_that_a_reshape_has_copied_are_not_those_written_to_later(written: str) -> None:
    def model(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        heads = [(t + 0).view(2, _S, 3, 8).transpose(1, 2) for t in (x, y, z)]
        q, k, v = (t.reshape(6, _S, 8) for t in heads)
        if written != "none":
            heads[["query", "key", "value"].index(written)].mul_(2)
        weights = torch.bmm(q, k.transpose(1, 2)).view(2, 3, _S, _S).softmax(-1).view(6, _S, _S)
        return torch.bmm(weights, v).view(2, 3, _S, 8)

    result = compare(model, [torch.randn(2, _S, 24, requires_grad=True) for _ in range(3)])
    assert site(result).status == "fused" and not result.problems


# -- rows without keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, _S], ids=["one", "all"])
def test_one_row_of_a_mask_for_all_queries_is_not_taken_for_their_own_keys(kept: int) -> None:
    """With one kept key, the second mask leaves no key to any query but the first."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, later = (index() < kept)[None], index()[None] >= index()[:, None]
        return (q @ k.mT).masked_fill(~first, -math.inf).masked_fill(~later, -math.inf).softmax(-1) @ v

    result = compare(model, qkv(grad=False), grad=False)
    assert site(result).status == "fused" and not result.problems
    assert ("apart" in site(result).reason) == (kept == 1)


def test_a_mask_of_integers_is_not_taken_for_positions() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = ((1 - keep) * -1000000000).to(q.dtype)
        return (q @ k.mT + mask[:, None, None]).softmax(-1) @ v

    result = compare(model, (*qkv(), torch.tensor([[0] * _S, [1] * 4 + [0] * (_S - 4)])))
    assert not result.problems and "is not known" in site(result).reason


def test_distances_times_slopes_are_a_bias() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1.0, 4.0)[:, None, None]
        return (q @ k.mT + (index()[None] - index()[:, None]) * slopes).softmax(-1) @ v

    result = compare(model, qkv())
    assert site(result).status == "fused" and not result.problems


# -- dtypes, dropout, scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_the_other_half_precision_is_not_rounded(dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    bias = torch.randn(1, 1, _S, _S, dtype=other, requires_grad=True)
    result = compare(lambda q, k, v, b: (q @ k.mT + b).softmax(-1).to(v.dtype) @ v, (*qkv(dtype), bias))
    assert "would round" in site(result).reason and not result.problems


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_dropout_is_seen_behind_dropout_that_drops_nothing(first: float) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(F.dropout((q @ k.mT).softmax(-1), first), 0.5 - first) @ v

    rewriter = Rewriter()
    rewritten(model, rewriter)(*qkv())
    assert "dropped at random" in site(rewriter).reason


_CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "full": lambda q: torch.full([], q.shape[-1] ** 0.5, dtype=q.dtype, device=q.device),  # GPT-2
    "root": lambda q: torch.sqrt(torch.tensor(q.shape[-1], dtype=torch.float32)),  # GPT-J
    "tensor": lambda q: torch.tensor(2.5),
}


@pytest.mark.parametrize("name", _CONSTANTS)
def test_a_scale_that_is_a_constant_tensor_is_a_number(name: str) -> None:
    result = compare(lambda q, k, v: (q @ k.mT / _CONSTANTS[name](q)).softmax(-1) @ v, qkv(torch.bfloat16))
    assert site(result).status == "fused" and not result.problems


@pytest.mark.parametrize("scale", [-0.3, 0.0, math.inf, "divided by zero"])
def test_a_scale_that_fused_kernels_do_not_take_is_refused(scale: float | str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores / 0.0 if isinstance(scale, str) else scores * scale).softmax(-1) @ v

    rewriter = Rewriter()
    rewritten(model, rewriter)(*qkv())
    assert site(rewriter).status == "kept" and "the scores are" in site(rewriter).reason
    assert PATTERN not in {pattern for pattern, status in rewriter.statuses if status == "fused"}


@pytest.mark.parametrize("single", ["query", "key", "value", "query and key"])
def test_one_matrix_for_all_of_a_batch_agrees(single: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[:1] if name in single else x for name, x in (("query", q), ("key", k), ("value", v)))
        return (q @ k.mT).softmax(-1) @ v

    result = compare(model, qkv(torch.float32, 3, _S, 8))
    assert not result.problems and (site(result).status == "fused") == ("query" not in single)


# -- masks -----------------------------------------------------------------------------------------------------------


def _sdpa(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def model(x: Tensor, y: Tensor, z: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (t.view(2, -1, 3, 8).transpose(1, 2) for t in (x, y, z))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(padding)).transpose(1, 2).flatten(2)

    return model


def packed(queries: int = _S) -> list[Tensor]:
    padding = torch.ones(2, _S, dtype=torch.int64)
    padding[1, 5:] = 0
    shapes = ((2, queries, 24), (2, _S, 24), (2, _S, 24))
    return [*(torch.randn(shape, requires_grad=True) for shape in shapes), padding]


@pytest.mark.parametrize(("dtype", "factor", "start"), [(torch.int32, 10**9, 0), (torch.float32, 1, 2**24)], ids=str)
def test_positions_that_a_type_does_not_hold_are_not_whole_numbers(dtype: Any, factor: int, start: int) -> None:
    """8 * 10**9 wraps in 32 bits; beyond 2**24 single precision has even numbers only."""

    def mask(padding: Tensor) -> Tensor:
        i = index().to(dtype) * factor + start
        return i[None] <= i[:, None]

    result = compare(_sdpa(mask), packed())
    assert not result.problems and result.fused("causal_mask") == 0


@pytest.mark.parametrize("low", ["inf", "lowest"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_causal_mask_plus_a_padding_mask_is_both(order: int, low: str) -> None:
    number = -math.inf if low == "inf" else torch.finfo(torch.float32).min

    def mask(padding: Tensor) -> Tensor:
        later = torch.zeros(_S, _S).masked_fill(index()[None] > index()[:, None], number)
        absent = torch.where(padding[:, None, None] == 0, number, 0.0)
        first, second = (later, absent)[::order]
        return first + second

    result = compare(_sdpa(mask), packed())
    assert not result.problems and result.fused("masked_attention") == (low == "inf"), result.reasons


@pytest.mark.parametrize("written", ["before", "between", "after"])
@pytest.mark.parametrize("shared", ["padding", "mask"])
def test_two_layers_read_the_padding_that_is_there(written: str, shared: str) -> None:
    def model(x: Tensor, y: Tensor, z: Tensor, padding: Tensor) -> Any:
        def attend(keep: Tensor) -> Tensor:
            return _sdpa(lambda _: keep)(x, y, z, padding)

        keep = (padding != 0)[:, None, None]
        if written == "before":
            padding[:, 2] = 0
        first = attend(keep)
        if written == "between":
            padding[:, 2] = 0
        second = attend(keep if shared == "mask" else (padding != 0)[:, None, None])
        if written == "after":
            padding[:, 2] = 0
        return first, second

    result = compare(model, packed())
    assert not result.problems, result.reasons
    assert result.fused("masked_attention") == {"before": 0, "between": 1, "after": 2}[written], result.reasons


@pytest.mark.parametrize("relation", [torch.lt, torch.gt, torch.eq, torch.ne])
@pytest.mark.parametrize(
    ("dtype", "number"), [(torch.uint8, 300), (torch.uint8, -1), (torch.int8, 200), (torch.int8, -200)], ids=str
)
def test_a_number_that_the_tokens_type_does_not_hold_does_not_wrap(
    dtype: torch.dtype, number: int, relation: Callable[..., Tensor]
) -> None:
    tokens = torch.tensor([0, 1, 44, 56, 100, 120, 127, 3, 2]).to(dtype).expand(2, _S).contiguous()
    *inputs, _ = packed()
    result = compare(_sdpa(lambda p: relation(p.long(), number)[:, None, None]), (*inputs, tokens))
    assert not result.problems, result.reasons


def _nested(padding: Tensor, kind: str) -> Tensor:
    absent, later = padding[:, None, None] == 0, index()[None] > index()[:, None]
    causal = torch.zeros(_S, _S).masked_fill(later, -math.inf)
    return {
        "filled_twice": lambda: causal.expand(2, 1, _S, _S).masked_fill(absent, -math.inf),
        "where_other": lambda: torch.where(absent, -math.inf, causal),
        "where_chosen": lambda: torch.where(~absent, causal, -math.inf),
        "opened_again": lambda: torch.where(torch.eye(_S).bool(), 0.0, torch.where(absent, -math.inf, causal)),
        "upper_of_choice": lambda: torch.triu(torch.where(absent, 0.0, -math.inf).expand(2, 1, _S, _S), 1),
    }[kind]()


@pytest.mark.parametrize("kind", ["filled_twice", "where_other", "where_chosen", "opened_again", "upper_of_choice"])
def test_choices_among_choices_keep_what_they_say(kind: str) -> None:
    result = compare(_sdpa(lambda padding: _nested(padding, kind)), packed())
    assert not result.problems, result.reasons
    assert result.fused("masked_attention") == (kind in ("filled_twice", "where_other", "where_chosen"))
