"""However a residual sum, its norms and what modulates them are written: rewritten, they leave behind the same.

`HYPOTHESIS_PROFILE=hunt pytest tests/test_residual_norm_properties.py` draws new examples, and many more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_fuse import Options

HUNT = os.environ.get("HYPOTHESIS_PROFILE") == "hunt"
OPTIONS = Options(kernels="reference", on_error="raise", only=("gated_residual_norm",))

# Where sizes are equal, nothing but its place tells which dimension a gate is for.
SHAPES = [(2, 5, 8), (5, 5, 5), (5, 5), (3, 3), (1, 4, 4), (4, 1, 4)]
FACTORS = ["", "C", "1", "SC", "S1", "1SC", "BS1", "BSC", "B1C", "B11"]
NORMS = ["layer", "bare", "call", "llama", "t5", "gemma", "wide"]
WRITES = ["x", "gate", "r", "h", "view of r"]


@dataclass(frozen=True)
class Term:
    """A summand: a linear layer's result with gates, and how it is put to the sum."""

    gates: tuple[str, ...] = ()
    how: str = "add"
    cast: str = ""


@dataclass(frozen=True)
class Sum:
    """A residual sum with norms of it, what modulates the first, what is written to behind it and what is returned."""

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    nested: bool
    norms: tuple[str, ...]
    scale: str | None
    shift: str | None
    by_sum: str
    write: str
    result: str
    transposed: bool
    dtype: torch.dtype


class Written(nn.Module):
    """What a `Sum` says, with weights of its own."""

    def __init__(self, spelled: Sum) -> None:
        super().__init__()
        self.spelled = spelled
        width = spelled.shape[-1]
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.weights, self.biases = (nn.Parameter(torch.randn(3, width)) for _ in range(2))
        self.to(spelled.dtype)

    def factor(self, name: str, x: Tensor, at: int) -> Tensor:
        """A gate, scale or shift of a shape, of values that differ from layer to layer."""
        value = self.layers[at](x)
        batch = value if value.dim() == 3 else value[None]
        shaped = {"": batch[0, 0, 0], "C": batch[0, 0], "1": batch[0, 0, :1], "SC": batch[0], "S1": batch[0, :, :1],
                  "1SC": batch[:1], "BS1": batch[..., :1], "BSC": batch, "B1C": batch[:, :1],
                  "B11": batch[:, :1, :1]}  # fmt: skip
        found = shaped[name]
        return found[0] if found.dim() > x.dim() else found

    def term(self, term: Term, x: Tensor, at: int, gates: list[Tensor]) -> Tensor:
        y = self.layers[at](x)
        for name in term.gates:
            gates.append(self.factor(name, x, 3 + at % 2))
            y = y * gates[-1]
        return {"": y, "float": y.float(), "half": y.half()}[term.cast]

    def sum(self, x: Tensor, gates: list[Tensor]) -> Tensor:
        r: Tensor | float = x
        terms = [self.term(term, x, i, gates) for i, term in enumerate(self.spelled.terms)]
        if self.spelled.nested and len(terms) > 1:
            terms = [terms[0] + terms[1], *terms[2:]]
        for y, term in zip(terms, self.spelled.terms, strict=False):
            if term.how == "alpha":
                r = torch.add(r, y, alpha=0.5)
            elif term.how == "addcmul":
                r = torch.addcmul(r, y, self.weights[2], value=-1)
            else:
                r = {"add": lambda a, b: a + b, "from": lambda a, b: b - a, "sub": lambda a, b: a - b,
                     "swap": lambda a, b: b + a, "scaled": lambda a, b: a + 2 * b}[term.how](r, y)  # fmt: skip
        assert isinstance(r, Tensor)
        return r

    def norm(self, name: str, r: Tensor, i: int) -> Tensor:
        weight, bias, size = self.weights[i], self.biases[i], (r.shape[-1],)
        wide = r.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if name == "t5":
            unit = (r * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(weight.dtype)
        return {
            "layer": lambda: F.layer_norm(r.to(weight.dtype), size, weight, bias),
            "bare": lambda: F.layer_norm(r, size, None, None, 1e-4),
            "call": lambda: F.rms_norm(r, size, weight.to(r.dtype), 1e-5),
            "llama": lambda: weight * unit.to(weight.dtype),
            "t5": lambda: weight * unit,
            "gemma": lambda: (unit * (1.0 + weight.float())).to(weight.dtype),
            "wide": lambda: F.layer_norm(wide, size, weight.float(), bias.float()).to(weight.dtype),
        }[name]()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        s = self.spelled
        x = x.transpose(0, -2) if s.transposed else x
        x, gates = x * 1, []
        scale = None if s.scale is None else self.factor(s.scale, x, 5)
        shift = None if s.shift is None else self.factor(s.shift, x, 4)
        r = self.sum(x, gates)
        scale = r if s.by_sum == "scale" else scale
        shift = r if s.by_sum == "shift" else shift
        if s.write in ("x", "gate") and (s.write == "x" or gates):
            (x if s.write == "x" else gates[0]).mul_(2)
        hs = [self.norm(name, r, i) for i, name in enumerate(s.norms)]
        if s.write == "h":
            hs[0].mul_(2)
        h = hs[0] if scale is None else hs[0] * (1 + scale)
        h = h if shift is None else h + shift
        if s.write == "r":
            r.mul_(2)
        if s.write == "view of r":
            r.view(-1)[:2].zero_()
        results = [self.layers[0](g.to(self.weights.dtype)) for g in (h, *hs[1:])]
        return {"none": (*results,), "r": (*results, r), "h": (*results, hs[0]), "all": (*results, r, h, x)}[s.result]


TERMS = st.builds(
    Term,
    st.lists(st.sampled_from(FACTORS), max_size=2).map(tuple),
    st.sampled_from(["add", "add", "swap", "sub", "from", "alpha", "addcmul", "scaled"]),
    st.sampled_from(["", "", "", "float"]),
)
SUMS = st.builds(
    Sum,
    st.sampled_from(SHAPES),
    st.lists(TERMS, max_size=3).map(tuple),
    st.booleans(),
    st.lists(st.sampled_from(NORMS), min_size=1, max_size=3).map(tuple),
    st.sampled_from([None, None, *FACTORS]),
    st.sampled_from([None, None, *FACTORS]),
    st.sampled_from(["", "", "", "", "scale", "shift"]),
    st.sampled_from(["", "", "", *WRITES]),
    st.sampled_from(["none", "r", "h", "all"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)


@settings(max_examples=1000 if HUNT else 20, deadline=None)
@given(SUMS)
def test_however_it_is_written_it_leaves_behind_the_same(spelled: Sum) -> None:
    torch.manual_seed(0)
    model = Written(spelled)
    x = torch.randn(spelled.shape, dtype=spelled.dtype, requires_grad=True)
    result = compare(model, (x,), grad=not spelled.write, options=OPTIONS, draws=2)
    assert not result.problems, f"{result.problems}\n{result.reasons}"
