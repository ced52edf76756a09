"""Recogniser: what an attention mask means. Proven from what it is computed of, never taken from its name.

The mask's elements are written as a condition on the indices (batch, head, query i, key j) by running the graph on
symbolic index expressions. A mask that depends on data (padding, packed positions) has no such condition.
"""

from __future__ import annotations

from typing import Literal

import sympy
import torch
from torch.fx import Node

from torch_fuse._compat import ShapeEnv, known_true
from torch_fuse.graph.effects import Order
from torch_fuse.graph.fold import fold_constant
from torch_fuse.graph.index_expr import DIM, IndexTrace, size_expr
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import tensor

Meaning = Literal["all", "causal"]


def match_mask(node: Node, order: Order, before: Node, shape_env: ShapeEnv | None) -> Meaning:
    """What a mask keeps: "all" keys, or ("causal") the keys up to the query's own index, top-left aligned.

    Args:
        node: boolean mask (True: attend) or additive mask, broadcastable to [B, H, S_q, S_k].
        order: positions of the graph's nodes.
        before: the attention that reads the mask.
        shape_env: of the graph, for dynamic sizes.

    Raises:
        Miss: with the reason why neither is proven.
    """
    found = tensor(node)
    if found is None or not 2 <= found.dim() <= 4:
        raise Miss("the mask is not a tensor of 2 to 4 dimensions", node)
    trace = IndexTrace()
    try:
        keep = _keep_condition(trace.trace(node), found, node)
        order.check_unwritten(list(trace.nodes), order.index[before])
        return _decide(keep, found, node, shape_env)
    except Miss as symbolic:
        folded = fold_constant(node, order, before)
        if folded is None:
            raise
        meaning = _evaluate(folded, node)
        if meaning is None:
            raise Miss(symbolic.reason, symbolic.node) from None
        return meaning


def _keep_condition(element: sympy.Basic, found: torch.Tensor, node: Node) -> sympy.Basic:
    """The condition under which a pair is attended to."""
    if found.dtype == torch.bool:
        return element
    if not found.dtype.is_floating_point:
        raise Miss(f"the mask has dtype {found.dtype}", node)
    branches = element.args if isinstance(element, sympy.Piecewise) else [(element, sympy.true)]
    keep, taken = sympy.false, sympy.false
    for value, condition in branches:
        here = sympy.And(condition, sympy.Not(taken))
        taken = sympy.Or(taken, condition)
        if value.has(sympy.nan):
            raise Miss("the mask adds NaN to scores", node)
        if value == 0:
            keep = sympy.Or(keep, here)
        elif not _excludes(value, found.dtype):
            raise Miss(f"the mask adds {value} to scores, which is neither 0 nor -inf", node)
    return keep


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


def _decide(keep: sympy.Basic, found: torch.Tensor, node: Node, shape_env: ShapeEnv | None) -> Meaning:
    rank = found.dim()
    i, j = DIM[rank - 2], DIM[rank - 1]
    sizes = {DIM[d]: size_expr(size) for d, size in enumerate(found.shape)}
    unproven = []
    for conjunct in sympy.And.make_args(keep):
        truth = _truth(conjunct, sizes, shape_env)
        if truth is False:
            raise Miss("the mask removes every key", node)
        if truth is None:
            unproven.append(conjunct)
    if not unproven:
        return "all"
    if len(unproven) == 1 and _difference(unproven[0]) == i - j:
        return "causal"
    shown = " and ".join(str(conjunct) for conjunct in unproven[:2])
    raise Miss(f"the mask keeps {_readable(shown, i, j)}, which is not causal", node)


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


def _evaluate(mask: torch.Tensor, node: Node) -> Meaning | None:
    """The meaning of a constant mask, from its values."""
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        excluded = mask == -torch.inf
        if mask.dtype != torch.float16:
            excluded |= mask == lowest
        if not bool((excluded | (mask == 0)).all()):
            return None
        mask = ~excluded
    if bool(mask.all()):
        return "all"
    queries, keys = mask.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    return "causal" if bool((mask == causal).all()) else None


def learned_source(mask: Node) -> str | None:
    """The product, lookup or selection of data that a mask is computed with; None when there is none.

    Such a mask is a bias or a choice of keys that the model makes, whatever the positions.
    """
    pending, seen = [mask], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_method") and name in _LEARNED:
            return name
        pending += node.all_input_nodes
    return None


_LEARNED = {"linear", "matmul", "bmm", "baddbmm", "einsum", "embedding", "topk", "conv1d", "softmax"}
