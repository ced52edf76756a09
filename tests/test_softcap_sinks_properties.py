"""Whatever is done to scores before the softmax, in whatever order: results agree, and every site has a reason.

`HYPOTHESIS_PROFILE=hunt` draws new examples, and many more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import compare
from hypothesis import event, given
from hypothesis import strategies as st
from test_properties import examples
from torch import Tensor

NUMBERS = st.sampled_from([0.5, 2.0, -1.5])
MASKS = st.sampled_from(["causal", "window", "padding", "absent_queries", "bias"])
LOWS = st.sampled_from([-math.inf, torch.finfo(torch.bfloat16).min, -3.0])
STEPS = st.one_of(
    st.tuples(st.sampled_from(["mul", "div"]), NUMBERS),
    st.tuples(st.just("cap"), st.sampled_from([0.5, 3.0])),
    st.tuples(st.just("tanh"), st.just(0)),
    st.tuples(st.sampled_from(["add", "fill", "where"]), st.tuples(MASKS, LOWS)),
    st.tuples(st.just("join"), st.sampled_from(["heads", "queries"])),
    st.tuples(st.just("maximum"), st.sampled_from([-1, 2])),
)


def keeps(kind: str, scores: Tensor, padding: Tensor) -> Tensor:
    """Which pairs a mask keeps; a joined column is one more key."""
    i, j = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])[None]
    if kind == "causal":
        return j <= i
    if kind == "window":
        return (j <= i) & (j > i - 3)
    present = padding[:, None, :, None] if kind == "absent_queries" else padding[:, None, None, :]
    if kind != "absent_queries" and scores.shape[3] > padding.shape[1]:
        present = torch.cat([present, present[..., :1]], -1)
    return (j <= i) & (present != 0)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor, padding: Tensor, steps: Any) -> Tensor:
    scores, joined = q @ k.mT, 0
    for step, how in steps:
        if step in ("mul", "div"):
            scores = scores * how if step == "mul" else scores / how
        elif step in ("cap", "tanh"):
            scores = torch.tanh(scores / how) * how if step == "cap" else scores.tanh()
        elif step == "join" and not joined:
            column = sinks[:4, None, None] if how == "heads" else sinks[:, None]
            scores, joined = torch.cat([scores, column.expand(q.shape[0], 4, q.shape[2], 1)], -1), 1
        elif step == "maximum":
            scores = scores - scores.amax(how, keepdim=True)
        elif step in ("add", "fill", "where"):
            kind, low = how
            if kind == "bias":
                scores = scores + bias[..., :1]
                continue
            keep = keeps(kind, scores, padding)
            if step == "add":
                scores = scores + torch.where(keep, 0.0, low)
            else:
                scores = scores.masked_fill(~keep, low) if step == "fill" else torch.where(keep, scores, low)
    weights = scores.softmax(-1).to(v.dtype)
    return ((weights[..., :-1] if joined else weights) @ v).transpose(1, 2).flatten(2) * 2


USUAL = st.tuples(
    st.lists(st.tuples(st.just("mul"), st.just(0.5)), max_size=1),
    st.lists(st.tuples(st.just("cap"), st.just(3.0)), max_size=1),
    st.lists(st.tuples(st.sampled_from(["add", "fill", "where"]), st.tuples(MASKS, LOWS)), max_size=1),
    st.lists(st.tuples(st.just("join"), st.just("heads")), max_size=1),
    st.lists(st.tuples(st.just("maximum"), st.just(-1)), max_size=1),
).map(lambda parts: [step for part in parts for step in part])


@examples(25)
@given(USUAL | st.lists(STEPS, max_size=5), st.booleans(), st.booleans())
def test_results_agree_and_every_site_has_a_reason(steps: list[Any], grad: bool, low_precision: bool) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low_precision else torch.float32
    q, k, v = (torch.randn(2, 5, 4, 8, dtype=dtype).transpose(1, 2).detach().requires_grad_(grad) for _ in range(3))
    sinks, bias = torch.randn(5, dtype=dtype, requires_grad=True), torch.randn(1, 4, 5, 5, dtype=dtype)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    result = compare(lambda *x: attend(*x, steps), (q, k, v, sinks, bias, padding), grad=grad)
    assert not result.problems, (steps, result.problems, result.reasons)
    assert all(site.reason for site in result.report.sites)
    event(", ".join(sorted({f"{site.pattern} {site.status}" for site in result.report.sites})))
