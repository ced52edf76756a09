"""However scores are scaled, masked and biased, and whichever rows have no keys: fused or not, results agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from harness import compare
from hypothesis import given
from hypothesis import strategies as st
from test_properties import examples
from test_written_out_attention import PATTERN, qkv
from torch import Tensor

from torch_fuse.rewrite.registry import patterns

LOW = {"inf": -math.inf, "lowest": None, "-1e9": -1e9, "-1e4": -1e4, "-3": -3.0}


@dataclass(frozen=True)
class Step:
    """One thing done to the scores.

    Attributes:
        kind: "fill", "where", "add_mask", "bias", "scale", "float" or "view".
        mask: "data" (rows of it may keep nothing), "causal", "window", "own_excluded".
        low: name of the number that excludes.
    """

    kind: str
    mask: str
    low: str

    def __call__(self, scores: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        low = LOW[self.low]
        low = torch.finfo(scores.dtype).min if low is None else low
        kept = self.keep(scores, keep)
        if self.kind == "fill":
            return scores.masked_fill(~kept, low)
        if self.kind == "where":
            return torch.where(kept, scores, low)
        if self.kind == "add_mask":
            return scores + torch.where(kept, torch.zeros((), dtype=scores.dtype), low)
        if self.kind == "view":
            return scores.flatten(0, 1).view(scores.shape)
        return {"bias": lambda: bias + scores, "scale": lambda: scores * 0.7, "float": lambda: scores.float()}[
            self.kind
        ]()

    def keep(self, scores: Tensor, keep: Tensor) -> Tensor:
        i = torch.arange(scores.shape[-1])
        q, k = i[:, None], i[None, :]
        return {"data": keep, "causal": k <= q, "window": (k <= q) & (k > q - 3), "own_excluded": k != q}[self.mask]


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["fill", "fill", "where", "add_mask", "add_mask", "bias", "scale", "float", "view"]),
        st.sampled_from(["data", "data", "causal", "window", "own_excluded"]),
        st.sampled_from(["inf", "lowest", "lowest", "-1e9", "-1e4", "-3"]),
    ),
    max_size=4,
)


@examples(40)
@given(STEPS, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.booleans())
def test_results_agree_and_every_site_has_a_reason(
    steps: list[Step], dtype: torch.dtype, grad: bool, bias_grad: bool
) -> None:
    torch.manual_seed(0)
    keep = torch.rand(2, 1, 6, 6) > 0.4
    keep[1, :, 2] = False

    def model(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Any:
        scores = q @ k.transpose(-1, -2)
        for step in steps:
            scores = step(scores, keep, bias)
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    bias = torch.randn(1, 3, 6, 6, dtype=dtype).requires_grad_(grad and bias_grad)
    result = compare(model, (*qkv(dtype, 2, 3, 6, 8, grad=grad), keep, bias), grad=grad, draws=1)
    assert not result.problems, f"{steps}\n{result.reasons}"
    (site,) = [site for site in result.report.sites if site.pattern == PATTERN]
    assert site.reason and PATTERN in patterns()
