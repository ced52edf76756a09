"""Sums of products that stand for the elements of a value's last dimension: the arithmetic of `lanes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_fuse.graph.miss import Miss

LEAF = 1 << 20  # a reference is (leaf number + 1) * LEAF + lane; 0 stands for the factor 1
MAX_TERMS = 8


@dataclass(frozen=True)
class Term:
    """sign * a * b for every lane; a and b are references (b = 0 for a single factor); sign 0 is no term."""

    sign: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Term:
        return Term(function(self.sign), function(self.a), function(self.b))


Lanes = list[Term]


def times(first: Lanes, second: Lanes) -> Lanes | None:
    """The products of two sums of single factors; None when one has products already."""
    terms = []
    for x in first:
        for y in second:
            if bool((x.b != 0).any()) or bool((y.b != 0).any()):
                return None
            sign, a, b = torch.broadcast_tensors(x.sign * y.sign, x.a, y.a)
            terms.append(Term(sign, torch.maximum(a, b), torch.minimum(a, b)))
    return terms


def stacked(
    parts: list[Lanes], dim: int, join: Callable[[list[torch.Tensor], int], torch.Tensor] = torch.stack
) -> Lanes:
    """The terms of values that are joined along a dimension: the k-th terms of all parts make up the k-th term."""
    traced = [broadcast(terms) for terms in parts]
    count = max(len(terms) for terms in traced)
    padded = [terms + [nothing(terms[0])] * (count - len(terms)) for terms in traced]
    return [Term(*(join([getattr(t[k], n) for t in padded], dim) for n in ("sign", "a", "b"))) for k in range(count)]


def nothing(like: Term) -> Term:
    zero = torch.zeros_like(like.sign)
    return Term(zero, zero.clone(), zero.clone())


def broadcast(terms: Lanes) -> Lanes:
    if len({t.sign.shape for t in terms} | {t.a.shape for t in terms}) <= 1:
        return terms
    shape = torch.broadcast_shapes(*(t.sign.shape for t in terms))
    return [t.map(lambda x: x.expand(shape)) for t in terms]


def merged(terms: Lanes) -> Lanes:
    """Drops terms that are nothing everywhere.

    Raises:
        Miss: when there are more terms than a rotary embedding has.
    """
    kept = [t for t in terms if bool((t.sign != 0).any())]
    if len(kept) > MAX_TERMS:
        raise Miss(f"the value is a sum of {len(kept)} terms, more than a rotary embedding has")
    return kept or terms[:1]


def leaf_and_lane(refs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits references into leaf numbers (-1 for the factor 1) and lanes."""
    return refs // LEAF - 1, refs % LEAF
