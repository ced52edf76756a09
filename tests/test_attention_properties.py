"""Whatever is written in place, and wherever; however masks are summed, filled and chosen: attention stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from harness import Rewriter, rewritten
from hypothesis import given
from hypothesis import strategies as st
from test_properties import examples
from torch import Tensor
from torch.nn import functional as F

B, H, S, D = 2, 3, 6, 4


def assert_same(model: Callable[..., Any], *inputs: Tensor) -> Rewriter:
    """The rewritten model gives what the model gives, and leaves its inputs as the model does."""
    rewriter = Rewriter()
    ours, theirs = ([x.clone() for x in inputs] for _ in range(2))
    try:
        expected = model(*theirs)
    except RuntimeError:  # shapes that do not broadcast
        return rewriter
    torch.testing.assert_close(rewritten(model, rewriter)(*ours), expected, equal_nan=True)
    torch.testing.assert_close(ours, theirs)
    assert all(site.reason for graph in rewriter.report.graphs for site in graph.sites)
    return rewriter


class Written:
    """Attention written out, whose intermediate results are written in place after some stage."""

    def __init__(self, form: str, bias: str, writes: list[tuple[int, str]]) -> None:
        self.form, self.bias, self.writes = form, bias, writes

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, padding: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        for number, stage in enumerate((self.heads, self.merge, self.masks, self.scores, self.masked, self.weights)):
            seen |= stage(seen, q, k, v, table, padding)
            for after, name in self.writes:
                if after == number and name in seen:
                    self.write(seen[name])
        return torch.bmm(seen["weights"], seen["v3"]).view(B, H, S, D).transpose(1, 2).flatten(2)

    @staticmethod
    def write(x: Tensor) -> None:
        if x.dtype == torch.bool:
            x.logical_not_()
        else:
            x.mul_(0.5).sub_(1)

    def heads(self, seen: Any, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> dict[str, Tensor]:
        return {name: (x + 0).view(B, S, H, D).transpose(1, 2) for name, x in (("q", q), ("k", k), ("v", v))}

    def merge(self, seen: Any, *_: Tensor) -> dict[str, Tensor]:
        return {f"{name}3": seen[name].reshape(B * H, S, D) for name in "qkv"}

    def masks(self, seen: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, padding: Tensor) -> dict[str, Tensor]:
        i = torch.arange(S)
        bias = {"none": torch.zeros(H, 1, 1), "slopes": -(i[None] - i[:, None]).abs() * table, "tanh": table.tanh()}
        found = {
            "bias": bias[self.bias].expand(H, S, S) + 0,
            "absent": (padding == 0)[:, None, None] | (i[None] > i[:, None]),
            "low": torch.full((), -math.inf if self.form != "lowest" else torch.finfo(q.dtype).min),
            "zero": torch.zeros(S, S),
        }
        return {**found, "mask": torch.where(found["absent"], found["low"], found["zero"])}

    def scores(self, seen: Any, *_: Tensor) -> dict[str, Tensor]:
        return {"scores": torch.bmm(seen["q3"], seen["k3"].mT).view(B, H, S, S)}

    def masked(self, seen: Any, *_: Tensor) -> dict[str, Tensor]:
        scores = seen["scores"] * 0.3
        if self.bias != "none":
            scores = scores + seen["bias"]
        if self.form == "filled":
            return {"masked": scores.masked_fill(seen["absent"], -math.inf)}
        return {"masked": scores + seen["mask"]}

    def weights(self, seen: Any, *_: Tensor) -> dict[str, Tensor]:
        return {"weights": seen["masked"].softmax(-1).view(B * H, S, S)}


NAMES = ["q", "k", "v", "q3", "k3", "v3", "bias", "absent", "low", "zero", "mask", "scores", "masked", "weights"]


@examples(50)
@given(
    st.sampled_from(["filled", "inf", "lowest"]),
    st.sampled_from(["none", "slopes", "tanh"]),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(NAMES)), max_size=2),
)
def test_a_write_anywhere_is_seen_where_the_graph_sees_it(form: str, bias: str, writes: list[tuple[int, str]]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(B, S, H * D) for _ in range(3)]
    table = torch.randn(H, 1, 1)
    padding = torch.tensor([[1] * S, [1] * 4 + [0] * (S - 4)])
    rewriter = assert_same(Written(form, bias, writes), *inputs, table, padding)
    if not writes and bias != "slopes":
        assert ("written_out_attention", "fused") in rewriter.statuses, rewriter.report


# -- additive masks ----------------------------------------------------------------------------------------------------

KEEP: dict[str, Callable[[Tensor, int], Tensor]] = {
    "causal": lambda p, n: torch.arange(p.shape[1])[None] <= torch.arange(n)[:, None],
    "shifted": lambda p, n: torch.arange(p.shape[1])[None] <= torch.arange(n)[:, None] + p.shape[1] - n,
    "window": lambda p, n: torch.arange(p.shape[1])[None] > torch.arange(n)[:, None] - 3,
    "ahead": lambda p, n: torch.arange(p.shape[1])[None] > torch.arange(n)[:, None] + 1,
    "padding": lambda p, n: (p != 0)[:, None, None],
    "first": lambda p, n: (p[:1] != 0)[None],
    "queries": lambda p, n: (p[:, :n] != 0)[:, None, :, None],
    "diagonal": lambda p, n: torch.eye(n, p.shape[1], dtype=torch.bool),
}


def additive(recipe: Any, p: Tensor, n: int) -> Tensor:
    """A leaf is a mask and a number; else a way to join two masks, or a mask and a condition."""
    how, a, b = recipe
    if how in KEEP:
        return torch.where(KEEP[how](p, n), a, b)
    if how == "sum":
        return additive(a, p, n) + additive(b, p, n)
    inner, keep = additive(a, p, n), KEEP[b](p, n)
    if how == "filled":
        shape = torch.broadcast_shapes(inner.shape, keep.shape)
        return inner.expand(shape).masked_fill(~keep, -math.inf)
    return torch.where(keep, inner, -math.inf) if how == "chosen" else torch.where(keep, 0.0, inner)


NUMBERS = st.sampled_from([0.0, 0.0, -math.inf, torch.finfo(torch.float32).min, -2.0])
LEAVES = st.tuples(st.sampled_from(sorted(KEEP)), NUMBERS, NUMBERS)
RECIPES = st.recursive(
    LEAVES,
    lambda inner: (
        st.tuples(st.just("sum"), inner, inner)
        | st.tuples(st.sampled_from(["filled", "chosen", "opened"]), inner, st.sampled_from(sorted(KEEP)))
    ),
    max_leaves=3,
)


@examples(60)
@given(RECIPES, st.integers(1, 8), st.integers(0, 2**12 - 1))
def test_additive_masks_of_any_making_mean_what_they_say(recipe: Any, queries: int, bits: int) -> None:
    torch.manual_seed(0)
    padding = torch.tensor([bits >> i & 1 for i in range(12)]).view(2, S)

    def model(x: Tensor, y: Tensor, z: Tensor, p: Tensor) -> Tensor:
        q, k, v = (t.view(B, -1, H, D).transpose(1, 2) for t in (x, y, z))
        mask = additive(recipe, p, queries)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    assert_same(model, torch.randn(B, queries, H * D), *(torch.randn(B, S, H * D) for _ in range(2)), padding)
