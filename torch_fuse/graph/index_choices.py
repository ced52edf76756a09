"""Elements written as expressions: choices between numbers, loaded values, and what a number type holds exactly."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from torch_fuse.graph.index_views import DIM

# Up to which number types hold whole numbers exactly; smaller types wrap or round at usual lengths.
_EXACT = {torch.int32: 2**31, torch.int64: 2**63, torch.float32: 2**24, torch.float64: 2**53}
_LONGEST = 2**20  # a size that is not known is taken to be at most this


def holds_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether an integer type holds all values of another type of integers or truth values."""
    if wide == narrow or narrow == torch.bool:
        return True
    if wide.is_floating_point or narrow.is_floating_point or wide == torch.bool:
        return False
    outer, inner = torch.iinfo(wide), torch.iinfo(narrow)
    return outer.min <= inner.min and inner.max <= outer.max


def is_exact(element: Any, found: torch.Tensor) -> bool:
    """Whether a tensor's type holds what its indices say; choices between numbers are not looked at."""
    if found.dtype == torch.bool or isinstance(element, sympy.Piecewise) or not element.free_symbols & set(DIM):
        return True
    if found.dtype not in _EXACT or loads(element):
        return found.dtype in _EXACT
    sizes = {DIM[d]: size for d, size in enumerate(found.shape) if isinstance(size, int)}
    longest = {symbol: sizes.get(symbol, _LONGEST) for symbol in element.free_symbols}
    terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(element)))
    largest = sum(abs(number) * abs(rest.subs(longest)) for number, rest in terms)
    return bool(largest < _EXACT[found.dtype])


def choice_of(condition: Any, chosen: Any, other: Any) -> sympy.Piecewise:
    """`chosen` where a condition holds, else `other`; choices among choices become one."""
    first = [(x, sympy.And(condition, c)) for x, c in cases_of(chosen)]
    return sympy.Piecewise(*first, *(other.args if isinstance(other, sympy.Piecewise) else [(other, sympy.true)]))


def cases_of(element: Any) -> list[tuple[Any, Any]]:
    """Each value with the condition under which it is taken, of which one holds everywhere; zeros, which keep, first.

    What a mask keeps is then the condition of the first value, without that no other one holds.
    """
    cases, taken = [], sympy.false
    for number, condition in element.args if isinstance(element, sympy.Piecewise) else [(element, sympy.true)]:
        cases.append((number, sympy.And(condition, sympy.Not(taken))))
        taken = sympy.Or(taken, condition)
    return sorted(cases, key=lambda case: case[0] != 0)


def loads(expr: Any) -> set[AppliedUndef]:
    """The runtime values that an element depends on."""
    return expr.atoms(AppliedUndef)
