"""The ways in which compilers and rewriters have given wrong answers before (docs of pytorch, onnxscript, vLLM, Liger).

One test for each class; most tell by `agrees` that the rewritten graph leaves behind what the graph as it was does.
The twin of them all is `test_the_plain_block_fires`: what they change a little is something that is fused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Comparison, Rewriter, compare, rewritten
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

PATTERN = "norm_qkv_rope_attention"
B, S, H, D = 2, 5, 2, 8


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention summed over lanes, so that its own layout does not show."""
    return F.scaled_dot_product_attention(q, k, v).sum(-1)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def tables(length: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(float(length)), 0.5 ** torch.arange(D // 2))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qkv(dtype: torch.dtype = torch.float32, batch: int = B, length: int = S) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(batch, length, H, D, dtype=dtype, requires_grad=True) for _ in range(3))


def compared(model: Callable[..., Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Comparison:
    """`model(q, k, v, cos, sin)`, q, k and v being [B, S, H, D]."""
    kwargs.setdefault("executor", "aot_eager")
    return compare(model, (*qkv(dtype), *tables(dtype=dtype)), **kwargs)


def agrees(model: Callable[..., Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Comparison:
    result = compared(model, dtype, **kwargs)
    assert not result.problems, result.reasons
    return result


def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin), heads_first(v))


def test_the_plain_block_fires() -> None:
    assert agrees(plain).fused(PATTERN) == 1


# -- constants that a matcher may take for any other -------------------------------------------------------------------


def test_alpha_of_an_addition_counts() -> None:
    def model(q, k, v, cos, sin):
        def turn(x):
            return torch.add(x * cos, rotate_half(x) * sin, alpha=2)

        return attend(turn(heads_first(q)), turn(heads_first(k)), heads_first(v))

    agrees(model)


def test_the_rounding_mode_of_a_division_counts() -> None:
    def model(q, k, v, cos, sin):
        def norm(x):
            return torch.div(x, torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), rounding_mode="floor")

        return attend(rope(heads_first(norm(q)), cos, sin), rope(heads_first(norm(k)), cos, sin), heads_first(v))

    agrees(model)


def test_a_norm_named_by_keyword_is_applied_once() -> None:
    def model(q, k, v, cos, sin):
        def norm(x):
            flat = F.rms_norm(x.reshape(B, S, H * D), (H * D,), None, 0.5)
            return torch.reshape(input=flat, shape=(B, S, H, D))

        return attend(rope(heads_first(norm(q)), cos, sin), rope(heads_first(norm(k)), cos, sin), heads_first(v))

    agrees(model)


def test_a_bit_cast_is_not_a_reshape() -> None:
    def model(q, k, v, cos, sin):
        q, k = (heads_first(x).contiguous().view(torch.int16).view(torch.float16) for x in (q, k))
        q, k = (torch.nan_to_num(x, 1.0, 1.0, 1.0).clamp(-2, 2) for x in (q, k))
        q, k = (rope(x, cos.half(), sin.half()).contiguous().view(torch.bfloat16) for x in (q, k))
        return attend(q, k, heads_first(v))

    args = (*[x.detach() for x in qkv(torch.bfloat16)], *tables(dtype=torch.bfloat16))
    rewriter = Rewriter()
    torch.testing.assert_close(rewritten(model, rewriter)(*args), model(*args), equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_softmax_over_another_dimension_is_no_attention(dim: int) -> None:
    def model(q, k, v, cos, sin):
        q, k = rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin)
        return (torch.softmax(q @ k.transpose(-1, -2) * 0.3, dim=dim) @ heads_first(v)).sum(-1)

    result = agrees(model)
    assert not [site for site in result.report.sites if site.kind == "attention"]


# -- values that are read elsewhere ----------------------------------------------------------------------------------


def test_shared_intermediates_keep_their_values() -> None:
    def model(q, k, v, cos, sin):
        q, k = heads_first(q), heads_first(k)
        product = q * cos
        turned = product + rotate_half(q) * sin
        key = rope(k, cos, sin)
        return attend(turned, key, heads_first(v)), product.sum(-1), key.sum(-1), rotate_half(k).sum(-1)

    assert agrees(model).fused(PATTERN) == 1


def test_one_key_serves_two_attentions() -> None:
    def model(q, k, v, cos, sin):
        key = rope(heads_first(k), cos, sin)
        one = attend(rope(heads_first(q), cos, sin), key, heads_first(v))
        return one + attend(rope(heads_first(q * 2), cos, sin), key, heads_first(v))

    agrees(model)


def test_two_blocks_may_be_computed_side_by_side() -> None:
    def model(q, k, v, cos, sin):
        q1, k1, q2, k2 = heads_first(q) + 0, heads_first(k) + 0, heads_first(q) * 2, heads_first(k) * 2
        q2, k2 = rope(q2, cos, sin), rope(k2, cos, sin)
        q1, k1 = rope(q1, cos, sin), rope(k1, cos, sin)
        return attend(q1, k1, heads_first(v)), attend(q2, k2, heads_first(v))

    assert agrees(model).fused(PATTERN) == 2


def test_an_attention_may_feed_another() -> None:
    def model(q, k, v, cos, sin):
        first = F.scaled_dot_product_attention(
            rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin), heads_first(v)
        )
        return attend(rope(first, cos, sin), rope(heads_first(k) * 2, cos, sin), heads_first(v))

    assert agrees(model).fused(PATTERN) == 2


# -- values that are computed twice and are not the same ------------------------------------------------------------


def test_tables_of_angles_that_change_in_between_differ() -> None:
    def model(q, k, v, cos, sin):
        angles = cos.clone()
        query = rope(heads_first(q), torch.cos(angles), torch.sin(angles))
        angles.add_(1.0)
        return attend(query, rope(heads_first(k), torch.cos(angles), torch.sin(angles)), heads_first(v))

    agrees(model)


@pytest.mark.parametrize(
    "noise",
    [
        lambda cos: torch.rand(S, D), lambda cos: torch.rand_like(cos), lambda cos: F.dropout(cos, 0.5),
        lambda cos: torch.bernoulli(cos.abs() / 2), lambda cos: cos + torch.randn(S, D),
        lambda cos: cos.clone().normal_(),
    ],
    ids=["rand", "rand_like", "dropout", "bernoulli", "randn", "normal_"],
)  # fmt: skip
def test_two_draws_of_random_tables_differ(noise: Callable[[Tensor], Tensor]) -> None:
    def model(q, k, v, cos, sin):
        query = rope(heads_first(q), noise(cos), sin)
        return attend(query, rope(heads_first(k), noise(cos), sin), heads_first(v))

    args = (*qkv(), *tables())
    torch.manual_seed(3)
    expected = model(*args)
    compiled = rewritten(model, Rewriter())
    compiled(*args)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(*args), expected)


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


# -- gradients -------------------------------------------------------------------------------------------------------


def test_no_grad_regions_keep_their_gradients() -> None:
    def model(q, k, v, cos, sin):
        with torch.no_grad():
            key = rope(heads_first(k), cos, sin)
        return attend(rope(heads_first(q), cos, sin), key, heads_first(v))

    agrees(model)


@pytest.mark.parametrize("where", ["source", "product", "result"])
def test_detached_values_get_no_gradient(where: str) -> None:
    def model(q, k, v, cos, sin):
        q = heads_first(q).detach() if where == "source" else heads_first(q)
        product = (q * cos).detach() if where == "product" else q * cos
        query = product + rotate_half(q) * sin
        query = query.detach() if where == "result" else query
        return attend(query, rope(heads_first(k), cos, sin), heads_first(v))

    agrees(model)


def test_tables_that_learn_get_their_gradient() -> None:
    cos, sin = (table.requires_grad_() for table in tables())
    result = compare(plain, (*qkv(), cos, sin), executor="aot_eager")
    assert not result.problems, result.reasons


class ThreeTimesTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        return rope(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad, None, None


def test_a_gradient_of_the_users_own_is_kept() -> None:
    def model(q, k, v, cos, sin):
        query = ThreeTimesTheGradient.apply(heads_first(q), cos, sin)
        return attend(query, ThreeTimesTheGradient.apply(heads_first(k), cos, sin), heads_first(v))

    agrees(model)


class WholeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin):
        return plain(q, k, v, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        wide = heads_first(grad)[..., None].expand(B, S, H, D)
        return wide * 2, wide * 3, wide, None, None


def test_an_attention_inside_an_autograd_function_keeps_its_backward() -> None:
    agrees(WholeAttention.apply)


def test_hooks_on_the_rotated_query_run() -> None:
    def model(q, k, v, cos, sin):
        query = rope(heads_first(q), cos, sin)
        query.register_hook(lambda grad: 2 * grad)
        return attend(query, rope(heads_first(k), cos, sin), heads_first(v))

    agrees(model)


def test_checkpointed_blocks_are_fused_and_agree() -> None:
    def model(q, k, v, cos, sin):
        return checkpoint(plain, q, k, v, cos, sin, use_reentrant=False)

    assert agrees(model).fused(PATTERN) == 1


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_function_transforms_inside_the_graph_agree(transform: str) -> None:
    def weighted(q, k, v, cos, sin):
        q, k = rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin)
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ heads_first(v)

    def model(q, k, v, cos, sin):
        if transform == "grad":
            return torch.func.grad(lambda x: weighted(x, k, v, cos, sin).sum())(q.detach())
        if transform == "jvp":
            return torch.func.jvp(lambda x: weighted(x, k, v, cos, sin), (q.detach(),), (torch.ones_like(q),))
        pairs = (torch.stack((x, 2 * x)) for x in (q, k, v))
        return torch.vmap(lambda x, y, z: weighted(x, y, z, cos, sin))(*pairs)

    agrees(model, grad=transform == "vmap", strides=transform != "grad")  # of gradients no strides are promised


@pytest.mark.parametrize("transform", ["jvp", "dual", "grad", "jvp of a checkpoint"])
def test_nothing_is_fused_inside_a_function_transform(transform: str) -> None:
    """A custom op without a rule for it has a forward-mode derivative of zero, and torch does not complain."""

    def block(q, k, v, cos, sin):
        q, k = rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin)
        return (torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ heads_first(v)).sum()

    def model(q, k, v, cos, sin):
        q, k, v = (x.detach() for x in (q, k, v))

        def one(x):
            if transform == "jvp of a checkpoint":
                return checkpoint(block, x, k, v, cos, sin, use_reentrant=False)
            return block(x, k, v, cos, sin)

        if transform == "grad":
            return torch.func.grad(one)(q)
        if transform == "dual":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(one(forward_ad.make_dual(q, torch.ones_like(q)))).tangent
        return torch.func.jvp(one, (q,), (torch.ones_like(q),))

    result = agrees(model, grad=False, strides=False, executor="eager")
    fitting = [site for site in result.report.sites if site.pattern == PATTERN]
    assert fitting and all("for which fused ops have no rule" in site.reason for site in fitting)
    assert "fused" not in {site.status for site in result.report.sites}


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


# -- modules over time -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        cos, sin = tables()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (projection(x).view(*x.shape[:2], H, D) for projection in (self.q, self.k, self.v))
        return plain(self.norm(q), self.norm(k), v, self.cos, self.sin)


def _module() -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(), torch.randn(B, S, H * D)


def test_tied_weights_sum_their_gradients() -> None:
    module, x = _module()
    module.k.weight = module.q.weight
    result = compare(module, (x,), executor="aot_eager")
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


def test_weights_loaded_after_compilation_are_used() -> None:
    module, x = _module()
    other = Attention()
    with torch.no_grad():
        other.cos.mul_(0.5)
        other.norm.weight.mul_(3.0)
    rewriter = Rewriter(executor="aot_eager")
    compiled = rewritten(module, rewriter)
    compiled(x)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    assert len(rewriter.report.graphs) == 1
    assert (PATTERN, "fused") in rewriter.statuses


class LowRank(nn.Module):
    """LoRA: a linear layer plus a product of two thin ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(H * D, 2, bias=False), nn.Linear(2, H * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_an_adapter_put_in_after_compilation_is_used() -> None:
    module, x = _module()
    rewriter = Rewriter(executor="aot_eager")
    compiled = rewritten(module, rewriter)
    compiled(x)
    module.q = LowRank(module.q)
    torch.testing.assert_close(compiled(x), module(x))
    assert [site.status for site in rewriter.report.sites if site.pattern == PATTERN] == ["fused", "fused"]


def test_a_graph_break_leaves_two_graphs_that_agree() -> None:
    def model(q, k, v, cos, sin):
        first = plain(q, k, v, cos, sin)
        torch._dynamo.graph_break()
        return first + plain(2 * q, k, v, cos, sin)

    result = agrees(model)
    assert len(result.report.graphs) == 2
    assert result.fused(PATTERN) == 2


def test_a_graph_break_inside_a_rotation_agrees() -> None:
    def model(q, k, v, cos, sin):
        first = heads_first(q) * cos
        torch._dynamo.graph_break()
        query = first + rotate_half(heads_first(q)) * sin
        return attend(query, rope(heads_first(k), cos, sin), heads_first(v))

    agrees(model)


def test_one_dynamic_graph_serves_all_shapes() -> None:
    def model(q, k, v, cos, sin):
        q, k, v = (x.view(*x.shape[:2], H, D) for x in (q, k, v))
        return plain(q, k, v, cos, sin)

    rewriter = Rewriter()
    compiled = rewritten(model, rewriter, dynamic=True)
    for batch, length in ((3, 5), (4, 9), (6, 7)):  # none is equal to another size
        args = (*(x.detach().flatten(2) for x in qkv(batch=batch, length=length)), *tables(length))
        torch.testing.assert_close(compiled(*args), model(*args))
    assert len(rewriter.report.graphs) == 1
    assert (PATTERN, "fused") in rewriter.statuses, str(rewriter.report)


def test_a_length_of_one_after_others_agrees() -> None:
    compiled = rewritten(plain, Rewriter())
    for length in (5, 1, 7):
        args = (*qkv(length=length), *tables(length))
        torch.testing.assert_close(compiled(*args), plain(*args))


def test_a_deep_copy_of_a_compiled_module_is_independent() -> None:
    module, x = _module()
    compiled = rewritten(module, Rewriter())
    before = compiled(x)
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.q.weight.zero_()
    torch.testing.assert_close(compiled(x), before)


# -- what Inductor itself gets wrong -----------------------------------------------------------------------------------


def permuted_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k: [B, S, H, D], laid out as [B, H, D, S] in one permutation."""
    return (q @ k.permute(0, 2, 3, 1) * 0.35).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "dim"), [(16, 16), (16, 8), (2, 16)])
def test_inductors_reading_of_a_permuted_key_does_not_reach_our_users(heads: int, dim: int) -> None:
    """pytorch #195320, #195282: up to torch 2.14 Inductor takes any permutation of the key for its transpose."""
    torch.manual_seed(0)
    q, v = torch.randn(1, heads, 16, dim), torch.randn(1, heads, 16, dim)
    k = torch.randn(1, 16, heads, dim)
    torch._dynamo.reset()
    found = torch.compile(permuted_key, backend="fuse")(q, k, v)
    torch.testing.assert_close(found, permuted_key(q, k, v), atol=1e-5, rtol=1e-4)
