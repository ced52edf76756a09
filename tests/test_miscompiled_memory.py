"""Miscompilations by writes and layouts: a write between two reads, aliases, strides, copies; see test_miscompiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from rotated_attention import PATTERN, B, D, H, S, agrees, attend, heads_first, plain, qkv, rope, rotate_half, tables
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# -- writes between reads ------------------------------------------------------------------------------------------


def _mul(x: Tensor) -> None:
    x.mul_(2.0)


def _imul(x: Tensor) -> None:
    x *= 2.0


def _setitem(x: Tensor) -> None:
    x[:, :, 0] = 1.0


def _view(x: Tensor) -> None:
    x.transpose(0, 1)[0].add_(1.0)


def _foreach(x: Tensor) -> None:
    torch._foreach_mul_([torch.zeros(2), x], 2.0)


def _out(x: Tensor) -> None:
    torch.neg(x, out=x)


def _out_of_two(x: Tensor) -> None:
    torch.sort(x.clone(), dim=-1, out=(x, torch.empty(x.shape, dtype=torch.long)))


def _copy(x: Tensor) -> None:
    x.copy_(x.flip(-1))


def _index(x: Tensor) -> None:
    x.index_copy_(2, torch.tensor([1]), torch.ones(B, H, 1, D, dtype=x.dtype))


def _relu(x: Tensor) -> None:
    F.relu(x, inplace=True)


def _checkpointed(x: Tensor) -> None:
    checkpoint(lambda y: y.mul_(2.0), x, use_reentrant=False)


def _custom(x: Tensor) -> None:
    torch.ops.torch_fuse_tests.double_(x)


@torch.library.custom_op("torch_fuse_tests::double_", mutates_args={"x"})
def _double(x: Tensor) -> None:
    x.mul_(2.0)


WRITES = [_mul, _imul, _setitem, _view, _foreach, _out, _out_of_two, _copy, _index, _relu, _checkpointed, _custom]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("where", ["before", "inside", "between", "after"])
def test_a_write_is_seen_by_the_reads_after_it_alone(write: Callable[[Tensor], None], where: str) -> None:
    def model(q, k, v, cos, sin):
        q, k = heads_first(q).detach().clone(), heads_first(k)
        if where == "before":
            write(q)
        first = q * cos
        if where == "inside":
            write(q)
        query = first + rotate_half(q) * sin
        if where == "between":
            write(q)
        key = rope(k, cos, sin)
        if where == "after":
            write(q)
        return attend(query, key, heads_first(v)), q.sum(-1)

    agrees(model)


@pytest.mark.parametrize("write", [_mul, _setitem, _view, _out, _custom])
def test_a_write_to_a_rotated_key_is_seen(write: Callable[[Tensor], None]) -> None:
    def model(q, k, v, cos, sin):
        key = rope(heads_first(k.detach()), cos, sin)
        write(key)
        return attend(rope(heads_first(q), cos, sin), key, heads_first(v)), key.sum(-1)

    agrees(model)


def test_a_write_to_an_input_is_seen_through_its_other_view() -> None:
    def model(whole, part, k, v, cos, sin):
        first = heads_first(whole) * cos
        part.mul_(2.0)
        query = first + rotate_half(heads_first(whole)) * sin
        return attend(query, rope(heads_first(k), cos, sin), heads_first(v))

    q, k, v = (x.detach() for x in qkv())
    expected_whole, whole = q.clone(), q.clone()
    expected = model(expected_whole, expected_whole[:, :3], k, v, *tables())
    found = rewritten(model, Rewriter(executor="aot_eager"))(whole, whole[:, :3], k, v, *tables())
    torch.testing.assert_close(found, expected)


# -- layouts that change ---------------------------------------------------------------------------------------------


FLATTENINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape_to_tokens": lambda k: k.transpose(1, 2).reshape(B, S, -1),
    "reshape_to_heads": lambda k: k.reshape(B * H, S * D),
    "contiguous": lambda k: k.contiguous(),
    "contiguous_tokens": lambda k: k.transpose(1, 2).contiguous(),
    "flatten": lambda k: k.flatten(1),
    "flatten_tokens": lambda k: k.transpose(1, 2).flatten(1),
    "view": lambda k: k.view(B, -1),
    "to_contiguous": lambda k: k.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("flatten", FLATTENINGS.values(), ids=FLATTENINGS)
@pytest.mark.parametrize("written", ["result", "source"])
def test_a_copy_stays_a_copy_and_an_alias_an_alias(flatten: Callable[[Tensor], Tensor], written: str) -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(heads_first(x).contiguous(), cos, sin) for x in (q, k))
        flat = flatten(key)
        (flat if written == "result" else key).mul_(2.0)
        return attend(query, key, heads_first(v)), flat.sum(-1)

    agrees(model)


def test_strides_that_the_model_wrote_down_still_hold() -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(heads_first(x).contiguous(), cos, sin) for x in (q, k))
        again = torch.as_strided(key, (B, H, S, D), (H * S * D, S * D, D, 1))
        return attend(query, key, heads_first(v)), again * 1

    agrees(model)


@torch.library.custom_op("torch_fuse_tests::raw_sums", mutates_args=())
def _raw_sums(x: Tensor) -> Tensor:
    """Cumulative sums of the elements as they lie in memory, the way a kernel reads a contiguous input."""
    return torch.as_strided(x, (x.numel(),), (1,)).cumsum(0)


@_raw_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


def test_a_kernel_of_the_user_gets_the_contiguous_key_it_asked_for() -> None:
    def model(q, k, v, cos, sin):
        key = rope(heads_first(k), cos, sin).contiguous()
        return attend(rope(heads_first(q), cos, sin), key, heads_first(v)), _raw_sums(key.detach())

    agrees(model)


def test_results_keep_their_strides() -> None:
    def model(q, k, v, cos, sin):
        query, key = rope(heads_first(q), cos, sin), rope(heads_first(k).contiguous(), cos, sin)
        return attend(query, key, heads_first(v)), query, key, key.transpose(1, 2), key.contiguous()

    agrees(model)


def test_an_attention_that_is_returned_flattened_is_fused() -> None:
    def model(q, k, v, cos, sin):
        query, key = (rope(heads_first(x).contiguous(), cos, sin) for x in (q, k))
        out = F.scaled_dot_product_attention(query, key, heads_first(v))
        return out.transpose(1, 2).reshape(B, S, -1)

    assert agrees(model).fused(PATTERN) == 1


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)], ids=["no_batch", "no_tokens", "one_token"])
def test_empty_and_single_batches_agree(shape: tuple[int, int]) -> None:
    batch, length = shape
    result = compare(plain, (*qkv(batch=batch, length=length), *tables(length)), executor="aot_eager")
    assert not result.problems, result.reasons


def test_inputs_of_any_strides_agree() -> None:
    q, k, v = (torch.randn(H, B, D, 2 * S).permute(1, 3, 0, 2)[:, ::2].requires_grad_() for _ in range(3))
    result = compare(plain, (q, k, v[:, :1].detach().expand(B, S, H, D), *tables()), executor="aot_eager")
    assert not result.problems
    assert result.fused(PATTERN) == 1, result.reasons
