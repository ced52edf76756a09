"""What written-out masks and biases do to whole rows of scores, and whether `scaled_dot_product_attention` does it too.

They differ in rows in which every key is excluded. Written out, -inf everywhere gives NaN and a finite minimum gives
equal weights (the scores are absorbed by it); SDPA gives zeros, NaN or equal weights, depending on its backend, and
backends that recompute the weights from a log-sum-exp give other gradients. So it has to be proven that there is no
such row, or such rows have to be computed apart: see `MaskPlan.apart`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import Node

from torch_fuse._compat import ShapeEnv
from torch_fuse.graph.effects import Order
from torch_fuse.graph.mask import match_kept_keys
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.score_bias import EXCLUDING, MODERATE, excluded_value, is_moderate, read_by_proofs
from torch_fuse.graph.score_steps import Fill, Term
from torch_fuse.graph.values import tensor
from torch_fuse.graph.written_attention import WrittenOut

# A score that is replaced by a number from here down has a weight of zero next to any score of a real model.
LOW_FILL = -1e9
LOW_FILL_FLOAT16 = -6e4
# The lowest number of float32 times this still takes a key out.
SMALLEST_FACTOR = 1e-6


@dataclass(frozen=True)
class MaskPlan:
    """How the mask of an SDPA is made.

    Attributes:
        fills: boolean masks, all of which have to keep a key.
        terms: tensors to be added to the scores, each exact in the dtype of the query.
        apart: rows that are computed apart since all their keys may be excluded: those of the fills, those of the one
            term that excludes, or none (None).
        mean: such rows get the mean of the values; else they get NaN.
        note: what was proven.
    """

    fills: tuple[Fill, ...]
    terms: tuple[Term, ...]
    apart: Literal["fills", "term"] | None
    mean: bool
    note: str
    excluding: Node | None = None


def plan_mask(written: WrittenOut, order: Order, shape_env: ShapeEnv | None) -> MaskPlan:
    """Decides what becomes of the masks and biases of an attention written out.

    Raises:
        Miss: with the reason why SDPA would give something else.
    """
    out, before = tensor(written.node), written.node
    assert out is not None
    for looked_at in (*(term.node for term in written.terms), *(fill.number for fill in written.fills)):
        order.check_unwritten(read_by_proofs(looked_at), order.index[before])
    kept: list[frozenset[str]] = []  # for each mask, the keys that it is proven to keep for every query
    terms, excluding = [], []
    for term in written.terms:
        proven = match_kept_keys(term.node, order, before, shape_env)
        if proven or _excludes(term.node):
            kept.append(proven)
            excluding.append(term)
            _check_factors(term)
            terms.append(replace(term, factors=()))  # unscaled, it excludes the same keys
        else:
            terms.append(_moderate(term, order, written))
    if len(terms) - len(excluding) > 1 and _wider(written):
        raise Miss(f"several biases are added in a wider dtype than {out.dtype}", before)
    for fill in written.fills:
        check_low(fill, written)
        kept.append(match_kept_keys(fill.mask, order, before, shape_env, inverted=fill.inverted))
    note = _describe(written, len(excluding))
    if not kept or frozenset.intersection(*kept):
        return MaskPlan(written.fills, tuple(terms), None, True, note)
    return _apart(written, terms, excluding, f"{note}; rows without keys computed apart")


def _apart(written: WrittenOut, terms: list[Term], excluding: list[Term], note: str) -> MaskPlan:
    """The plan when a row of the masks may exclude every key."""
    out = tensor(written.node)
    assert out is not None
    row = "a row of the mask may exclude every key"
    if excluding and (len(excluding) > 1 or written.fills):
        raise Miss(f"{row}: several masks are added", written.node)
    if excluding:
        if out.requires_grad:
            raise Miss(f"{row}: SDPA's gradients are others then", excluding[0].node)
        low = excluded_value(excluding[0].node)
        assert low is not None
        return MaskPlan((), tuple(terms), "term", low != float("-inf"), note, excluding[0].node)
    values = {fill.value for fill in written.fills}
    if len(values) != 1:
        raise Miss(f"{row}: scores are replaced by different numbers", written.node)
    (filled,) = values
    later = written.terms[: max(fill.terms_after for fill in written.fills)]
    if later and filled > EXCLUDING:
        raise Miss(f"{row}: a bias is added to the scores replaced by {filled}", written.node)
    if any(tensor(term.node).requires_grad for term in later):  # type: ignore[union-attr]
        raise Miss(f"{row}: the gradient of the bias is another then", written.node)
    return MaskPlan(written.fills, tuple(terms), "fills", filled != float("-inf"), note)


def _excludes(node: Node) -> bool:
    low = excluded_value(node)
    return low is not None and low <= EXCLUDING


def _check_factors(term: Term) -> None:
    """Raises Miss unless a mask is still one after its sum with the scores is scaled, and does not overflow."""
    scale = 1.0
    for factor in term.factors:
        if not isinstance(factor.number, (int, float)):
            raise Miss("the mask is scaled by a tensor after it is added", term.node)
        if factor.number <= 0:
            raise Miss(f"the mask is scaled by {factor.number} after it is added", term.node)
        scale = scale / factor.number if factor.divides else scale * factor.number
    if not SMALLEST_FACTOR <= scale <= 1:
        raise Miss(f"the mask is scaled by {scale} after it is added", term.node)


def check_low(fill: Fill, written: WrittenOut) -> None:
    """Raises Miss unless replaced scores have a weight of zero."""
    scores = tensor(written.scores)
    assert scores is not None
    lowest = LOW_FILL_FLOAT16 if scores.dtype == torch.float16 else LOW_FILL
    if not fill.value <= lowest:
        raise Miss(f"scores are replaced by {fill.value}, which does not take a key out of the softmax", fill.mask)


def _wider(written: WrittenOut) -> bool:
    """Whether scores are summed in a wider dtype than the attention's."""
    out = tensor(written.node)
    assert out is not None
    found = [tensor(node) for node in written.nodes]
    return any(x is not None and x.dtype.is_floating_point and x.dtype.itemsize > out.dtype.itemsize for x in found)


def _moderate(term: Term, order: Order, written: WrittenOut) -> Term:
    """The term, in a dtype that the query's holds exactly."""
    found, out = tensor(term.node), tensor(written.node)
    assert found is not None and out is not None
    name = term.node.name.strip("_")
    if not found.dtype.is_floating_point:
        raise Miss(f"{name}, of dtype {found.dtype}, is added to the scores", term.node)
    low = excluded_value(term.node)
    if low is not None and low < -MODERATE:
        raise Miss(f"the mask adds {low}, too low to be exact and not low enough to exclude a key", term.node)
    if low is None and not is_moderate(term.node, order, written.node):
        raise Miss(f"whether {name} excludes every key of a row is not known", term.node)
    node = term.node
    if torch.promote_types(found.dtype, out.dtype) != out.dtype:
        node = _narrowed(node, out.dtype)
    if term.factors and _wider(written):
        raise Miss(f"the bias is scaled in a wider dtype than {out.dtype}", term.node)
    return Term(node, term.rank, term.factors)


def _narrowed(node: Node, dtype: torch.dtype) -> Node:
    source = strip_casts(node)
    found = tensor(source)
    if found is None or found.dtype != dtype:
        raise Miss(f"the bias is {tensor(node).dtype}, which SDPA would round to {dtype}", node)  # type: ignore[union-attr]
    return source


def _describe(written: WrittenOut, excluding: int) -> str:
    parts = []
    if written.fills or excluding:
        parts.append("a mask" if len(written.fills) + excluding == 1 else "masks")
    if len(written.terms) > excluding:
        parts.append("a bias")
    return "written out" + (f", with {' and '.join(parts)}" if parts else "")
