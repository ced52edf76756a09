"""`verify="first_call"` notices a wrong rewrite on the real inputs and goes on unfused."""

import logging

import pytest
import torch
import torch.nn.functional as F

import torch_fuse
from torch_fuse.rewrite import registry
from torch_fuse.rewrite.pattern import Match, Pattern
from torch_fuse.verify import compare


@pytest.fixture
def wrong_pattern():
    @torch_fuse.register
    class Wrong(Pattern):
        """Forgets the scale."""

        name = "zz_wrong"
        kind = "attention"

        def match(self, view, anchor):
            return Match(anchor, {}, (anchor,), frozenset({anchor}), tuple(anchor.all_input_nodes))

        def rewrite(self, match, builder, options):
            q, k, v = match.inputs[:3]
            return {match.anchor: builder.call(F.scaled_dot_product_attention, q, k, v, scale=1.0)}

    torch._dynamo.reset()
    yield
    registry._patterns.pop("zz_wrong")


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("verify", ["off", "first_call"])
def test_a_wrong_rewrite_is_found_on_the_first_call(wrong_pattern, verify, caplog):
    inputs = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    compiled = torch.compile(attention, backend="fuse", options={"verify": verify})
    with caplog.at_level(logging.WARNING, logger="torch_fuse"), torch.no_grad():
        first, second = compiled(*inputs), compiled(*inputs)
    right = attention(*inputs)
    assert torch.allclose(first, right, atol=1e-5) == (verify == "first_call")
    assert torch.allclose(second, right, atol=1e-5) == (verify == "first_call")
    assert ("disagrees" in caplog.text) == (verify == "first_call")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x, ""),
        (lambda x: x * (1 + 1e-6), ""),
        (lambda x: x * 1.01, "root mean square"),
        (lambda x: x.double(), "instead of"),
        (lambda x: x[:2], "instead of"),
        (lambda x: x.t().contiguous().t(), "strides"),
        (lambda x: x.clone().fill_(float("nan")), "NaN"),
    ],
)
def test_compare_says_what_differs(change, problem):
    x = torch.randn(4, 3)
    found = compare(x, change(x))
    assert (found == "") if not problem else (problem in found)
