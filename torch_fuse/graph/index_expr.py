"""Elements of tensors computed from indices (arange, comparisons, `tril`, ...) as expressions in those indices.

A boolean or integer tensor whose values are only known when the graph runs is a function of its indices: "loads".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.index_choices import cases_of, choice_of, holds_all, is_exact, loads
from torch_fuse.graph.index_views import DIM, Views, constant, is_bool, size_expr
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, tensor, value

_RELATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": sympy.Eq, "ne": sympy.Ne, "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: sympy.floor(a / b),
}
_LOGIC: dict[str, Callable[..., Any]] = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}
_CONSTANTS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


def _name(node: Node) -> str:
    return node.name.removeprefix("l_").removeprefix("kwargs_").strip("_")


@dataclass
class IndexTrace(Views):
    """Writes elements of tensors as expressions in d0, d1, ... (their own indices).

    Attributes:
        nodes: every node that was looked through.
        sources: the tensors that are loaded from, by the name of their function.
        reasons: why they could not be looked through.
    """

    nodes: set[Node] = field(default_factory=set)
    sources: dict[str, Node] = field(default_factory=dict)
    reasons: dict[str, Miss] = field(default_factory=dict)
    _memo: dict[Node, Any] = field(default_factory=dict)

    def trace(self, node: Any) -> Any:
        """The element of `node` at (d0, d1, ...).

        Raises:
            Miss: when it depends on a floating-point input, or through an operator that is not understood.
        """
        if node not in self._memo:
            found = tensor(node)
            if found is None:
                raise Miss(f"{node} is not a tensor", node if isinstance(node, Node) else None)
            self.nodes.add(node)
            try:
                element = self._element(node, found)
                if not is_exact(element, found):
                    raise Miss(f"the mask is computed with indices in {found.dtype}, which may wrap or round", node)
            except Miss as miss:
                element = self._load(node, found, miss)
            self._memo[node] = element
        return self._memo[node]

    def _load(self, node: Node, found: torch.Tensor, reason: Miss) -> Any:
        """The element of a tensor that is read as it is. A floating-point one may be NaN: no condition describes it."""
        if found.dtype.is_floating_point or found.dtype.is_complex or not 1 <= found.dim() <= len(DIM):
            raise reason
        self.sources[node.name], self.reasons[node.name] = node, reason
        element = sympy.Function(node.name, integer=True)(*DIM[: found.dim()])
        return sympy.Ne(element, 0) if found.dtype == torch.bool else element

    def is_input(self, load: AppliedUndef) -> bool:
        """Whether a value is loaded from an input of the graph, and not from what could not be looked through."""
        return self.sources[load.func.__name__].op in ("placeholder", "get_attr")

    def shown(self, load: AppliedUndef) -> str:
        """The name of an input, for reasons."""
        return _name(self.sources[load.func.__name__])

    def _element(self, node: Node, found: torch.Tensor) -> Any:
        if node.op in ("placeholder", "get_attr"):
            if found.dtype.is_floating_point:
                raise Miss(
                    f"the mask adds numbers of input {_name(node)}, which are known only when the graph runs", node
                )
            raise Miss(f"the mask depends on the values of input {_name(node)}", node)
        if node.op == "call_function" and node.target is torch.arange:
            return self._arange(node)
        call = call_of(node)
        handler = None if call is None or call.inplace else getattr(self, f"_{call.op}", None)
        if call is not None and not call.inplace:
            if call.op in _RELATIONS or call.op in _ARITHMETIC or call.op in _LOGIC:
                return self._binary(node, call, found)
            if call.op in _CONSTANTS:
                return constant(_CONSTANTS[call.op], found.dtype)
            if call.op in ("full", "full_like", "new_full") and isinstance(call["fill_value"], (int, float)):
                return constant(call["fill_value"], found.dtype)
        if call is None or handler is None:
            shown = getattr(node.target, "__name__", node.target)
            raise Miss(f"the mask is computed with {shown}, which is not understood", node)
        return handler(node, call, found)

    # -- operands --------------------------------------------------------------------------------------------

    def _binary(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        a, b = self._both(call, found)
        if call.args.get("alpha", 1) != 1:
            raise Miss("the mask is computed with alpha != 1", node)
        if call.op in _LOGIC:
            if not (is_bool(a) and is_bool(b)):
                raise Miss("the mask combines integers bit by bit", node)
            return _LOGIC[call.op](a, b)
        if is_bool(a) or is_bool(b):
            return self._of_booleans(node, call.op, a, b)
        if isinstance(a, sympy.Piecewise) or isinstance(b, sympy.Piecewise):
            return self._of_choices(node, call.op, a, b)
        loaded = loads(a) | loads(b)
        if loaded and not (call.op in _RELATIONS and (a.is_number or b.is_number)):  # sums may wrap
            raise self.reasons[next(iter(loaded)).func.__name__]
        if isinstance(a, sympy.Abs) and call.op in ("lt", "le"):
            return sympy.And(_RELATIONS[call.op](a.args[0], b), _RELATIONS[call.op](-a.args[0], b))
        if a.has(sympy.Abs) or b.has(sympy.Abs):
            raise Miss(f"the mask is computed with {call.op} of an absolute value", node)
        if call.op in _RELATIONS:
            difference = sympy.expand(a - b)
            return _RELATIONS[call.op](difference, 0) if difference.is_number else _RELATIONS[call.op](a, b)
        return sympy.expand(_ARITHMETIC[call.op](a, b))

    def _both(self, call: Call, found: torch.Tensor) -> tuple[Any, Any]:
        return self._operand(call["input"], found), self._operand(call["other"], found)

    def _of_booleans(self, node: Node, op: str, a: Any, b: Any) -> Any:
        if is_bool(a) and is_bool(b) and op in ("eq", "ne", "mul"):
            same = sympy.Not(sympy.Xor(a, b))
            return {"eq": same, "ne": sympy.Not(same), "mul": sympy.And(a, b)}[op]
        if op == "eq" and b in (0, 1):
            return a if b == 1 else sympy.Not(a)
        raise Miss(f"the mask is computed with {op} of a boolean", node)

    def _of_choices(self, node: Node, op: str, a: Any, b: Any) -> Any:
        """An operator on a choice between numbers, and a number; or the sum of two choices."""
        apply = {**_RELATIONS, **_ARITHMETIC}[op]
        if op == "add" and isinstance(a, sympy.Piecewise) and isinstance(b, sympy.Piecewise):
            return self._sum_of_choices(node, a, b)
        chosen, other = (a, b) if isinstance(a, sympy.Piecewise) else (b, a)
        if not other.is_number or any(not number.is_number for number, _ in chosen.args):
            raise Miss(f"the mask is computed with {op} of two choices", node)
        results = [
            (apply(number, other) if chosen is a else apply(other, number), condition)
            for number, condition in chosen.args
        ]
        if op in _ARITHMETIC:
            return sympy.Piecewise(*results)
        holds, taken = sympy.false, sympy.false
        for result, condition in results:
            holds = sympy.Or(holds, sympy.And(condition, sympy.Not(taken), result))
            taken = sympy.Or(taken, condition)
        return holds

    def _sum_of_choices(self, node: Node, a: sympy.Piecewise, b: sympy.Piecewise) -> Any:
        """A causal mask plus a padding mask; a mask that keeps what both keep has its zeros first."""
        sums = [(x + y, sympy.And(c, d)) for x, c in cases_of(a) for y, d in cases_of(b)]
        if len(sums) > 9 or any(not number.is_number for number, _ in sums):
            raise Miss("the mask is computed with add of two choices", node)
        sums.sort(key=lambda case: case[0] != 0)
        return sympy.Piecewise(*sums[:-1], (sums[-1][0], sympy.true))

    # -- sources and views -----------------------------------------------------------------------------------

    def _arange(self, node: Node) -> Any:
        args = [value(item) for item in node.args]
        start = value(node.kwargs.get("start", args[0] if len(args) > 1 else 0))
        step = value(node.kwargs.get("step", args[2] if len(args) > 2 else 1))
        if isinstance(start, float) or isinstance(step, float):
            raise Miss("the mask uses a fractional arange", node)
        return size_expr(start) + size_expr(step) * DIM[0]

    def _cast(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        element = self.trace(call["input"])
        source = tensor(call["input"])
        assert source is not None
        if found.dtype == torch.bool and source.dtype != torch.bool:
            if isinstance(element, sympy.Piecewise):
                return self._of_choices(node, "ne", element, sympy.Integer(0))
            return sympy.Ne(element, 0)
        if source.dtype == torch.bool and found.dtype != torch.bool:
            return sympy.Piecewise((sympy.Integer(1), element), (sympy.Integer(0), True))
        if source.dtype.is_floating_point and not found.dtype.is_floating_point:
            raise Miss("the mask rounds to integers", node)
        if loads(element) and not isinstance(element, sympy.Piecewise) and not holds_all(found.dtype, source.dtype):
            load = min(loads(element), key=str)
            if found.dtype.is_floating_point and self.is_input(load):
                name = self.shown(load)
                raise Miss(
                    f"the mask adds numbers made of input {name}, which are known only when the graph runs", node
                )
            raise self.reasons[load.func.__name__]
        return element

    _contiguous = _clone = _cast

    def _not(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        element = self.trace(call["input"])
        if not is_bool(element):
            raise Miss("the mask inverts integers bit by bit", node)
        return sympy.Not(element)

    def _neg(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        return self._without_loads(-self.trace(call["input"]))

    def _abs(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        element = self._without_loads(self.trace(call["input"]))
        if is_bool(element) or isinstance(element, sympy.Piecewise):
            raise Miss("the mask is computed with abs of a choice", node)
        return sympy.Abs(element, evaluate=False)

    def _without_loads(self, element: Any) -> Any:
        for load in loads(element):
            raise self.reasons[load.func.__name__]
        return element

    def _where(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        condition = self._operand(call["condition"], found)
        chosen, other = self._operand(call["input"], found), self._operand(call["other"], found)
        if is_bool(chosen) and is_bool(other):
            return sympy.Or(sympy.And(condition, chosen), sympy.And(sympy.Not(condition), other))
        if is_bool(chosen) or is_bool(other):
            raise Miss("the mask chooses between a boolean and a number", node)
        return choice_of(condition, chosen, other)

    def _masked_fill(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        condition = self._operand(call["mask"], found)
        filled, kept = self._operand(call["value"], found), self._operand(call["input"], found)
        if found.dtype == torch.bool:
            filled = sympy.true if filled not in (0, sympy.false) else sympy.false
            return sympy.Or(sympy.And(condition, filled), sympy.And(sympy.Not(condition), kept))
        return choice_of(condition, filled, kept)

    def _tril(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        i, j = DIM[found.dim() - 2], DIM[found.dim() - 1]
        offset = sympy.Integer(call["diagonal"]) if isinstance(call["diagonal"], int) else None
        if offset is None:
            raise Miss("the mask's diagonal is not a number", node)
        inside = sympy.Ge(j, i + offset) if call.op == "triu" else sympy.Le(j, i + offset)
        element = self.trace(call["input"])
        if is_bool(element):
            return sympy.And(inside, element)
        return choice_of(inside, element, sympy.Integer(0))

    _triu = _tril

    # -- packed sequences ------------------------------------------------------------------------------------

    def _diff(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        """Differences of neighbours along the last dimension, when they are all the same."""
        last = found.dim() - 1
        if call["n"] != 1 or call["dim"] not in (-1, last) or call["append"] is not None:
            raise Miss("the mask is computed with an unusual diff", node)
        element, index = self.trace(call["input"]), DIM[last]
        if is_bool(element):
            raise Miss("the mask is computed with diff of booleans", node)
        step = sympy.expand(element.subs(index, index + 1) - element)
        if call["prepend"] is not None:
            before = tensor(call["prepend"])
            if before is None or before.dim() != found.dim() or not equal(before.shape[-1], 1):
                raise Miss("the mask is computed with an unusual diff", node)
            first = element.subs(index, 0) - self._operand(call["prepend"], found).subs(index, 0)
            if sympy.expand(first - step) != 0:
                raise Miss("the mask is computed with diff and an unusual first element", node)
        return step

    def _cumsum(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        element, index = self.trace(call["input"]), DIM[call["dim"] % found.dim()]
        element = {sympy.true: sympy.Integer(1), sympy.false: sympy.Integer(0)}.get(element, element)
        if is_bool(element) or element.has(index) or isinstance(element, sympy.Piecewise):
            raise Miss("the mask is computed with cumsum of something that is not constant", node)
        return sympy.expand(element * (index + 1))
