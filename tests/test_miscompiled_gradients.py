"""Miscompilations of gradients, hooks and function transforms; see test_miscompiles."""

from __future__ import annotations

import pytest
import torch
from harness import compare
from rotated_attention import PATTERN, B, D, H, S, agrees, attend, heads_first, plain, qkv, rope, rotate_half, tables
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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
