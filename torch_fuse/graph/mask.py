"""Recogniser: what an attention mask means. Proven from what it is computed of, never taken from its name.

The mask's elements are written as a condition on the indices (batch, head, query i, key j) by running the graph on
symbolic index expressions. Padding is a condition on values that are only known when the graph runs: which keys of a
batch are kept. Masks of other data (packed positions, chunks after padding) have no such condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from torch_fuse._compat import ShapeEnv, known_true
from torch_fuse.graph.effects import Order
from torch_fuse.graph.fold import fold_constant
from torch_fuse.graph.index_choices import loads
from torch_fuse.graph.index_expr import IndexTrace
from torch_fuse.graph.index_views import DIM, size_expr
from torch_fuse.graph.mask_conditions import conjuncts, distance_of, keep_condition, side_of, truth_of
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import equal, tensor


@dataclass(frozen=True)
class Mask:
    """Query i of a batch attends to key j where i - left <= j <= i + right, and `keys` and `queries` hold.

    Attributes:
        left: how far back a query sees, or None for any distance; a causal window of w keys has w - 1.
        right: how far ahead; causal masks have 0.
        keys: condition on values of the keys, `sympy.true` when there is none. The values are applied functions of
            `DIM[rank - 4]` (batch) and `DIM[rank - 1]` (key), named as in `sources`.
        queries: condition on values of the queries, likewise with `DIM[rank - 2]`; where it fails, no key is kept.
        sources: boolean and integer tensors of the graph that `keys` and `queries` load from.
        rank: of the mask.
    """

    left: int | None = None
    right: int | None = None
    keys: sympy.Basic = sympy.true
    queries: sympy.Basic = sympy.true
    sources: Mapping[str, Node] = field(default_factory=dict)
    rank: int = 4

    @property
    def keeps_all(self) -> bool:
        """Whether every query attends to every key."""
        return self.left is None and self.right is None and self.keys == self.queries == sympy.true

    @property
    def is_causal(self) -> bool:
        """Whether queries attend to the keys up to their own index, and to all of them."""
        return self.left is None and self.right == 0 and self.keys == self.queries == sympy.true


def match_mask(
    node: Node, order: Order, before: Node, shape_env: ShapeEnv | None, *, inverted: bool = False, any_row: bool = False
) -> Mask:
    """What a mask keeps.

    Args:
        node: boolean mask (True: attend) or additive mask, broadcastable to [B, H, S_q, S_k].
        order: positions of the graph's nodes.
        before: the attention that reads the mask.
        shape_env: of the graph, for dynamic sizes.
        inverted: the mask is boolean, and True means that the key is not attended to.
        any_row: also take masks that exclude by a finite number and may exclude every key of a row.

    Raises:
        Miss: with the reason why nothing is proven.
    """
    found = tensor(node)
    if found is None or not 2 <= found.dim() <= 4:
        raise Miss("the mask is not a tensor of 2 to 4 dimensions", node)
    trace = IndexTrace()
    try:
        keep, finite = keep_condition(trace.trace(node), found, node)
        keep = sympy.Not(keep) if inverted else keep
        order.check_unwritten(list(trace.nodes), order.index[before])
        mask = _decide(keep, found, node, shape_env, trace)
        if finite and not any_row and not _keeps_a_key(mask, found, shape_env):
            raise Miss("the mask adds a finite number: rows without a key would average all values", node)
        return mask
    except Miss as symbolic:
        folded = fold_constant(node, order, before)
        if folded is None:
            raise
        folded = ~folded if inverted else folded
        meaning = _evaluate(folded)
        if meaning is None:
            raise _constant_miss(folded, symbolic) from None
        return meaning


def match_kept_keys(
    node: Node, order: Order, before: Node, shape_env: ShapeEnv | None, *, inverted: bool = False
) -> frozenset[str]:
    """Keys that a mask is proven to keep for every query: "own" (of the query's index), "first".

    Args:
        node: boolean mask (True: attend) or additive mask, broadcastable to [B, H, S_q, S_k].
        order: positions of the graph's nodes.
        before: the attention that reads the mask.
        shape_env: of the graph, for dynamic sizes.
        inverted: the mask is boolean, and True means that the key is not attended to.

    Returns:
        Empty when neither is proven, in particular for masks that depend on data.
    """
    found = tensor(node)
    if found is None or not 2 <= found.dim() <= 4:
        return frozenset()
    rank = found.dim()
    i, j = DIM[rank - 2], DIM[rank - 1]
    trace = IndexTrace()
    try:
        keep, _ = keep_condition(trace.trace(node), found, node)
        order.check_unwritten(list(trace.nodes), order.index[before])
    except Miss:
        return frozenset()
    if inverted:
        keep = sympy.Not(keep)
    sizes = {DIM[d]: size_expr(size) for d, size in enumerate(found.shape)}
    keep = keep.subs({DIM[d]: sympy.Integer(0) for d, size in enumerate(found.shape) if equal(size, 1)})
    keys: dict[str, sympy.Expr] = {"first": sympy.Integer(0)}
    if equal(found.shape[-2], 1):
        keys["own"] = j  # one row for all queries: whichever key is a query's own, it is kept if all are
    elif known_true(sympy.Ge(sizes[j], sizes[i]), shape_env):
        keys["own"] = i
    return frozenset(
        name
        for name, key in keys.items()
        if all(
            not part.atoms(AppliedUndef) and truth_of(part, sizes, shape_env) for part in conjuncts(keep.subs(j, key))
        )
    )


def _decide(keep: sympy.Basic, found: torch.Tensor, node: Node, shape_env: ShapeEnv | None, trace: IndexTrace) -> Mask:
    rank = found.dim()
    i, j = DIM[rank - 2], DIM[rank - 1]
    sizes = {DIM[d]: size_expr(size) for d, size in enumerate(found.shape)}
    of_values: dict[str, list[sympy.Basic]] = {"keys": [], "queries": []}
    bounds: dict[str, list[int]] = {"left": [], "right": []}
    broadcast = {DIM[d]: sympy.Integer(0) for d, size in enumerate(found.shape) if equal(size, 1)}
    for conjunct in conjuncts(keep.subs(broadcast)):
        if conjunct.atoms(AppliedUndef):
            of_values[side_of(conjunct, rank, trace)].append(conjunct)
            continue
        truth = truth_of(conjunct, sizes, shape_env)
        if truth is False:
            raise Miss("the mask removes every key", node)
        if truth is None:
            side, distance = distance_of(conjunct, i, j, node)
            bounds[side].append(distance)
    left, right = (min(bounds[side], default=None) for side in ("left", "right"))
    keys, queries = (sympy.And(*of_values[side]) for side in ("keys", "queries"))
    names = sorted({load.func.__name__ for load in loads(keys) | loads(queries)})
    return Mask(left, right, keys, queries, {name: trace.sources[name] for name in names}, rank)


def _keeps_a_key(mask: Mask, found: torch.Tensor, shape_env: ShapeEnv | None) -> bool:
    """Whether every query is known to attend to at least one key."""
    if mask.keys != sympy.true or mask.queries != sympy.true or (mask.right is not None and mask.right < 0):
        return False
    queries, keys = (size_expr(size) for size in found.shape[-2:])
    return mask.left is None or (mask.left >= 0 and known_true(sympy.Le(queries - mask.left, keys), shape_env))


def _constant_miss(mask: torch.Tensor, symbolic: Miss) -> Miss:
    """Why a constant mask is no band; the symbolic reason where its numbers say more."""
    kept = mask if mask.dtype == torch.bool else mask == 0
    if isinstance(symbolic, Kept) or not bool((kept | _excluded(mask)[0]).all() & kept.any()):
        return type(symbolic)(symbolic.reason, symbolic.node)
    if _evaluate(kept) is not None:
        return Miss("the mask adds a finite number: rows without a key would average all values", symbolic.node)
    share = kept.double().mean().item()
    return Kept(f"the mask is constant and keeps {share:.0%} of the pairs, which are no band of keys", symbolic.node)


def _excluded(mask: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What a constant mask excludes, and whether by a finite number."""
    if mask.dtype == torch.bool:
        return ~mask, False
    lowest = mask == torch.finfo(mask.dtype).min
    if mask.dtype == torch.float16:
        return mask == -torch.inf, False
    return (mask == -torch.inf) | lowest, bool(lowest.any())


def _evaluate(mask: torch.Tensor) -> Mask | None:
    """The meaning of a constant mask, from its values."""
    excluded, finite = _excluded(mask)
    if mask.dtype != torch.bool:
        if not bool((excluded | (mask == 0)).all()):
            return None
        mask = ~excluded
    if not bool(mask.any()) or (finite and not bool(mask.any(-1).all())):
        return None
    if bool(mask.all()):
        return Mask()
    queries, keys = mask.shape[-2:]
    if queries == 1 or keys == 1:  # broadcast: its index is not the query's or the key's
        return None
    distance = torch.arange(keys) - torch.arange(queries)[:, None]
    kept = distance.expand(mask.shape)[mask]
    first, last = int(kept.min()), int(kept.max())
    if not bool((mask == ((distance >= first) & (distance <= last))).all()):
        return None
    return Mask(None if first == 1 - queries else -first, None if last == keys - 1 else last)
