"""Recogniser: what an attention mask means. Proven from what it is computed of, never taken from its name.

The mask's elements are written as a condition on the indices (batch, head, query i, key j) by running the graph on
symbolic index expressions. Padding is a condition on values that are only known when the graph runs: which keys of a
batch are kept. Masks of other data (packed positions, chunks after padding) have no such condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from torch_fuse._compat import ShapeEnv, known_true
from torch_fuse.graph.effects import Order
from torch_fuse.graph.fold import fold_constant
from torch_fuse.graph.index_expr import DIM, IndexTrace, loads, size_expr
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
        keep, finite = _keep_condition(trace.trace(node), found, node)
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
        keep, _ = _keep_condition(trace.trace(node), found, node)
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
            not part.atoms(AppliedUndef) and _truth(part, sizes, shape_env) for part in _conjuncts(keep.subs(j, key))
        )
    )


def _keep_condition(element: sympy.Basic, found: torch.Tensor, node: Node) -> tuple[sympy.Basic, bool]:
    """The condition under which a pair is attended to, and whether others are excluded by a finite number only."""
    if found.dtype == torch.bool:
        return element, False
    if not found.dtype.is_floating_point:
        raise Miss(f"the mask has dtype {found.dtype}", node)
    branches = element.args if isinstance(element, sympy.Piecewise) else [(element, sympy.true)]
    keep, taken, finite = sympy.false, sympy.false, False
    for value, condition in branches:
        here = sympy.And(condition, sympy.Not(taken))
        taken = sympy.Or(taken, condition)
        if value.has(sympy.nan):
            raise Miss("the mask adds NaN to scores", node)
        if value == 0:
            keep = sympy.Or(keep, here)
        elif not _excludes(value, found.dtype):
            if value == sympy.oo:
                raise Miss("the mask adds inf to scores", node)
            shown = f"{float(value):g}" if value.is_number else "a number for each place"
            raise Kept(f"the mask adds {shown} to scores: a bias, which excludes no key for certain", node)
        else:
            finite |= value != -sympy.oo
    return keep, finite


def _excludes(value: sympy.Basic, dtype: torch.dtype) -> bool:
    """Whether adding `value` to a score removes it from the softmax exactly, as long as another score is finite.

    The lowest number of float32, bfloat16 and float64 lies so far below any score that the exponential is zero;
    float16's lowest, -65504, does not.
    """
    if value == -sympy.oo:
        return True
    if dtype == torch.float16 or not value.is_number:
        return False
    return bool(value <= -1e38)


def _decide(keep: sympy.Basic, found: torch.Tensor, node: Node, shape_env: ShapeEnv | None, trace: IndexTrace) -> Mask:
    rank = found.dim()
    i, j = DIM[rank - 2], DIM[rank - 1]
    sizes = {DIM[d]: size_expr(size) for d, size in enumerate(found.shape)}
    of_values: dict[str, list[sympy.Basic]] = {"keys": [], "queries": []}
    bounds: dict[str, list[int]] = {"left": [], "right": []}
    broadcast = {DIM[d]: sympy.Integer(0) for d, size in enumerate(found.shape) if equal(size, 1)}
    for conjunct in _conjuncts(keep.subs(broadcast)):
        if conjunct.atoms(AppliedUndef):
            of_values[_side(conjunct, rank, trace)].append(conjunct)
            continue
        truth = _truth(conjunct, sizes, shape_env)
        if truth is False:
            raise Miss("the mask removes every key", node)
        if truth is None:
            side, distance = _bound(conjunct, i, j, node)
            bounds[side].append(distance)
    left, right = (min(bounds[side], default=None) for side in ("left", "right"))
    keys, queries = (sympy.And(*of_values[side]) for side in ("keys", "queries"))
    names = sorted({load.func.__name__ for load in loads(keys) | loads(queries)})
    return Mask(left, right, keys, queries, {name: trace.sources[name] for name in names}, rank)


def _conjuncts(condition: sympy.Basic) -> Iterator[sympy.Basic]:
    """Conditions all of which have to hold; that none of several holds is one for each."""
    if isinstance(condition, sympy.And):
        for part in condition.args:
            yield from _conjuncts(part)
    elif isinstance(condition, sympy.Not) and isinstance(condition.args[0], sympy.Or):
        for part in condition.args[0].args:
            yield from _conjuncts(sympy.Not(part))
    else:
        yield condition


def _side(conjunct: sympy.Basic, rank: int, trace: IndexTrace) -> str:
    """What a condition on loaded values is one on: "keys" or "queries" of a batch.

    Raises:
        Miss: when it is neither.
    """
    batch = {DIM[0]} if rank == 4 else set()
    values = loads(conjunct)
    plain = conjunct.xreplace({load: sympy.Dummy(load.func.__name__) for load in values})
    for side, position in (("keys", DIM[rank - 1]), ("queries", DIM[rank - 2])):
        if not plain.free_symbols & set(DIM) and all(_reads(load, {position} | batch) for load in values):
            return side
    for load in sorted(values, key=str):
        if load.free_symbols >= {DIM[rank - 2], DIM[rank - 1]} and trace.is_input(load):
            raise Miss(
                f"the mask is input {trace.shown(load)}, which has a value for each query and key: "
                "what it keeps is known only when the graph runs", trace.sources[load.func.__name__],
            )  # fmt: skip
    raise trace.reasons[min(values, key=str).func.__name__]


def _reads(load: AppliedUndef, allowed: set[sympy.Symbol]) -> bool:
    """Whether a value is loaded by some of the allowed indices alone, each used once."""
    indices = [index for index in load.args if not index.is_Integer]
    return set(indices) <= allowed and len(set(indices)) == len(indices)


def _bound(conjunct: sympy.Basic, i: sympy.Symbol, j: sympy.Symbol, node: Node) -> tuple[str, int]:
    """A condition as the side and the distance to which a query sees: j <= i + right or j >= i - left."""
    difference = _difference(conjunct)
    factor = sympy.Integer(0) if difference is None else difference.coeff(i)
    if factor.is_Integer and factor != 0:
        rest = sympy.expand(difference - factor * (i - j))
        if rest.is_Integer:
            return "right" if factor > 0 else "left", int(sympy.floor(rest / abs(factor)))
    raise Miss(f"the mask keeps {_readable(str(conjunct), i, j)}, which is no distance between query and key", node)


def _keeps_a_key(mask: Mask, found: torch.Tensor, shape_env: ShapeEnv | None) -> bool:
    """Whether every query is known to attend to at least one key."""
    if mask.keys != sympy.true or mask.queries != sympy.true or (mask.right is not None and mask.right < 0):
        return False
    queries, keys = (size_expr(size) for size in found.shape[-2:])
    return mask.left is None or (mask.left >= 0 and known_true(sympy.Le(queries - mask.left, keys), shape_env))


def _readable(text: str, i: sympy.Symbol, j: sympy.Symbol) -> str:
    return text.replace(str(i), "q").replace(str(j), "k")


def _difference(condition: sympy.Basic) -> sympy.Expr | None:
    """f with whole coefficients such that an inequality between whole indices reads f >= 0; None for anything else."""
    if isinstance(condition, (sympy.Ge, sympy.Gt)):
        difference = sympy.expand(condition.lhs - condition.rhs)
    elif isinstance(condition, (sympy.Le, sympy.Lt)):
        difference = sympy.expand(condition.rhs - condition.lhs)
    else:
        return None
    constant, rest = difference.as_coeff_Add()
    if not constant.is_number or any(not c.is_integer for c in rest.as_coefficients_dict().values()):
        return None
    strict = isinstance(condition, (sympy.Gt, sympy.Lt))
    return rest + (sympy.ceiling(constant) - 1 if strict else sympy.floor(constant))


def _truth(condition: sympy.Basic, sizes: dict[sympy.Symbol, sympy.Expr], shape_env: ShapeEnv | None) -> bool | None:
    """Whether a condition holds at all indices, at none, or (None) is not known to do either."""
    if condition in (sympy.true, sympy.false):
        return condition == sympy.true
    difference = _difference(condition)
    if difference is None:
        return None
    lowest = highest = difference
    for index, size in sizes.items():
        factor = difference.coeff(index)
        if difference.has(index) and sympy.expand(difference - factor * index).has(index):
            return None
        if not factor.is_number:
            return None
        low, high = (0, size - 1) if factor > 0 else (size - 1, 0)
        lowest, highest = lowest.subs(index, low), highest.subs(index, high)
    if known_true(sympy.Ge(lowest, 0), shape_env):
        return True
    return False if known_true(sympy.Lt(highest, 0), shape_env) else None


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
