"""Conditions on the indices and values of a mask: taken apart, decided for all indices, read as distances."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from torch_fuse._compat import ShapeEnv, known_true
from torch_fuse.graph.index_choices import loads
from torch_fuse.graph.index_expr import IndexTrace
from torch_fuse.graph.index_views import DIM
from torch_fuse.graph.miss import Kept, Miss


def keep_condition(element: sympy.Basic, found: torch.Tensor, node: Node) -> tuple[sympy.Basic, bool]:
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


def conjuncts(condition: sympy.Basic) -> Iterator[sympy.Basic]:
    """Conditions all of which have to hold; that none of several holds is one for each."""
    if isinstance(condition, sympy.And):
        for part in condition.args:
            yield from conjuncts(part)
    elif isinstance(condition, sympy.Not) and isinstance(condition.args[0], sympy.Or):
        for part in condition.args[0].args:
            yield from conjuncts(sympy.Not(part))
    else:
        yield condition


def side_of(conjunct: sympy.Basic, rank: int, trace: IndexTrace) -> str:
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


def distance_of(conjunct: sympy.Basic, i: sympy.Symbol, j: sympy.Symbol, node: Node) -> tuple[str, int]:
    """A condition as the side and the distance to which a query sees: j <= i + right or j >= i - left."""
    difference = _difference(conjunct)
    factor = sympy.Integer(0) if difference is None else difference.coeff(i)
    if factor.is_Integer and factor != 0:
        rest = sympy.expand(difference - factor * (i - j))
        if rest.is_Integer:
            return "right" if factor > 0 else "left", int(sympy.floor(rest / abs(factor)))
    raise Miss(f"the mask keeps {_readable(str(conjunct), i, j)}, which is no distance between query and key", node)


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


def truth_of(condition: sympy.Basic, sizes: dict[sympy.Symbol, sympy.Expr], shape_env: ShapeEnv | None) -> bool | None:
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
