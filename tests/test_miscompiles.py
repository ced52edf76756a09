"""The ways in which compilers and rewriters have given wrong answers before (docs of pytorch, onnxscript, vLLM, Liger).

One test for each class; most tell by `agrees` that the rewritten graph leaves behind what the graph as it was does.
The twin of them all is `test_the_plain_block_fires`: what they change a little is something that is fused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, rewritten
from rotated_attention import PATTERN, B, D, H, S, agrees, attend, heads_first, plain, qkv, rope, rotate_half, tables
from torch import Tensor


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
