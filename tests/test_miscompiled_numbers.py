"""Miscompilations by dtypes, random numbers and masks; see test_miscompiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from rotated_attention import PATTERN, D, S, agrees, attend, heads_first, plain, qkv, rms, rope, tables
from torch import Tensor

# -- dtypes ----------------------------------------------------------------------------------------------------------


def test_float64_is_computed_in_float64() -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(heads_first(x), cos.double(), sin.double()) for x in (q, k))
        return attend(query, key, heads_first(v).double())

    args = (*[x.detach() for x in qkv()], *tables())
    torch.testing.assert_close(rewritten(model, Rewriter())(*args), model(*args), atol=1e-12, rtol=1e-12)


def test_a_norm_in_float64_is_computed_in_float64() -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(rms(heads_first(x).double()), cos, sin) for x in (q, k))
        return attend(query, key, heads_first(v).double())

    args = (*[x.detach() for x in qkv()], *tables())
    torch.testing.assert_close(rewritten(model, Rewriter())(*args), model(*args), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("where", ["before", "after"])
def test_simulated_quantisation_is_not_lost(where: str) -> None:
    """A cast to one byte and back is what quantisation-aware training consists of."""

    def quantised(x):
        return x.to(torch.float8_e4m3fn).to(x.dtype)

    def model(q, k, v, cos, sin):
        if where == "before":
            q, k = quantised(q), quantised(k)
        query, key = rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin)
        if where == "after":
            query, key = quantised(query), quantised(key)
        return attend(query, key, heads_first(v))

    agrees(model)


def test_an_overflow_in_half_precision_stays_an_infinity() -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(heads_first(x * 1e5).half().float(), cos, sin) for x in (q, k))
        return attend(query, key, heads_first(v))

    args = (*[x.detach() for x in qkv()], *tables())
    found, expected = rewritten(model, Rewriter())(*args), model(*args)
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("part", ["all", "query", "key", "attention"])
def test_autocast_of_any_part_agrees(part: str) -> None:
    def model(q, k, v, cos, sin):
        def cast(when):
            return torch.autocast("cpu", torch.bfloat16, enabled=part in ("all", when))

        eye = torch.eye(D)
        with cast("query"):
            query = rope(heads_first(q @ eye), cos, sin)
        with cast("key"):
            key = rope(heads_first(k @ eye), cos, sin)
        with cast("attention"):
            return attend(query.to(v.dtype), key.to(v.dtype), heads_first(v)).float()

    agrees(model)


def test_tables_of_another_dtype_promote() -> None:
    def model(q, k, v, cos, sin):
        return attend(*(rope(heads_first(x), cos.float(), sin.float()) for x in (q, k)), heads_first(v).float())

    assert agrees(model, torch.bfloat16).fused(PATTERN) == 1


# -- random numbers, masks -------------------------------------------------------------------------------------------


def test_dropout_of_attention_draws_the_same_numbers() -> None:
    def model(q, k, v, cos, sin):
        noise = torch.rand(3)
        query, key = rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin)
        keep = torch.arange(S)[:, None] >= torch.arange(S)
        out = F.scaled_dot_product_attention(query, key, heads_first(v), attn_mask=keep, dropout_p=0.3)
        return out.sum(-1), noise, torch.rand(3)

    args = (*qkv(), *tables())
    torch.manual_seed(3)
    expected = model(*args)
    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    compiled(*args)
    torch.manual_seed(3)
    found = compiled(*args)
    assert ("causal_mask", "fused") in rewriter.statuses
    torch.testing.assert_close(found, expected)


def _masked(mask: Callable[[], Tensor], dtype: torch.dtype = torch.float32, length: int = 9) -> Rewriter:
    """Runs an attention with a mask, rewritten; it has to give what the attention as it is gives."""

    def model(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask())

    args = [torch.randn(2, 3, length, 8, dtype=dtype) for _ in range(3)]
    rewriter = Rewriter()
    found, expected = rewritten(model, rewriter)(*args), model(*args)
    torch.testing.assert_close(found, expected, equal_nan=True)
    return rewriter


def _i(length: int = 9, dtype: torch.dtype | None = None) -> Tensor:
    return torch.arange(length, dtype=dtype)


def test_rows_without_a_key_stay_what_they_are() -> None:
    _masked(lambda: _i()[:, None] > _i())
    _masked(lambda: torch.where(_i()[:, None] > _i(), 0.0, float("-inf")))
    _masked(lambda: torch.where(_i()[:, None] > _i(), 0.0, torch.finfo(torch.float32).min))


def test_the_lowest_number_of_float16_does_not_exclude() -> None:
    low = torch.finfo(torch.float16).min
    rewriter = _masked(lambda: torch.where(_i()[:, None] >= _i(), 0.0, low).half(), torch.float16)
    assert ("causal_mask", "fused") not in rewriter.statuses


def test_the_lowest_number_of_bfloat16_does() -> None:
    low = torch.finfo(torch.bfloat16).min
    rewriter = _masked(lambda: torch.where(_i()[:, None] >= _i(), 0.0, low).bfloat16(), torch.bfloat16)
    assert ("causal_mask", "fused") in rewriter.statuses


@pytest.mark.parametrize("length", [9, 300])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float16])
def test_positions_that_wrap_or_round_are_not_whole_numbers(dtype: torch.dtype, length: int) -> None:
    def positions() -> Tensor:
        return torch.arange(length).to(dtype)

    _masked(lambda: positions()[:, None] >= positions(), length=length)
    _masked(lambda: positions()[:, None] - positions() >= 0, length=length)
    _masked(lambda: positions()[:, None] + 1 > positions(), length=length)


def test_zero_times_infinity_in_a_mask_is_nan_and_does_not_stop_the_rewriter() -> None:
    _masked(lambda: (1.0 - (_i()[:, None] >= _i()).float()) * float("-inf"))


@pytest.mark.parametrize("write", ["row", "view", "fill"])
def test_a_mask_that_is_written_to_is_not_causal(write: str) -> None:
    def mask() -> Tensor:
        keep = torch.ones(9, 9, dtype=torch.bool).tril()
        if write == "row":
            keep[3, 5] = True
        elif write == "view":
            keep[2:3].fill_(True)
        else:
            keep.masked_fill_(_i() == 5, True)
        return keep

    assert ("causal_mask", "fused") not in _masked(mask).statuses


def test_infinities_and_nans_show_in_the_same_places() -> None:
    q, k, v = qkv()
    with torch.no_grad():
        q[0, 1, 0, 2], k[1, 2, 1, 3] = float("inf"), float("nan")
    result = compare(plain, (q, k, v, *tables()), draws=1, grad=False)
    assert result.fused(PATTERN) == 1
    assert not result.problems
