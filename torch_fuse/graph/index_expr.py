"""Elements of index-only tensors (arange, comparisons, `tril`, ...) as expressions in their indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, tensor, value

DIM = [sympy.Symbol(f"d{i}", integer=True, nonnegative=True) for i in range(8)]

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
# Types that hold every index exactly; smaller ones wrap or round.
_EXACT = {torch.bool, torch.int32, torch.int64, torch.float32, torch.float64}
_CONSTANTS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}


def size_expr(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _constant(number: Any, dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return sympy.true if number else sympy.false
    if isinstance(number, float):
        if number in (float("inf"), float("-inf")):
            return sympy.oo if number > 0 else -sympy.oo
        return sympy.Integer(int(number)) if number.is_integer() else sympy.Float(number)
    return sympy.Integer(number)


def _is_bool(expr: Any) -> bool:
    """Whether an element is a truth value (sympy counts symbols among its Booleans)."""
    return isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol)


@dataclass
class IndexTrace:
    """Writes elements of tensors as expressions in d0, d1, ... (their own indices).

    Attributes:
        nodes: every node that was looked through.
    """

    nodes: set[Node] = field(default_factory=set)
    _memo: dict[Node, Any] = field(default_factory=dict)

    def trace(self, node: Any) -> Any:
        """The element of `node` at (d0, d1, ...).

        Raises:
            Miss: when it depends on an input, or through an operator that is not understood.
        """
        if node not in self._memo:
            found = tensor(node)
            if found is None:
                raise Miss(f"{node} is not a tensor", node if isinstance(node, Node) else None)
            self.nodes.add(node)
            element = self._element(node, found)
            if (
                found.dtype not in _EXACT
                and element.free_symbols & set(DIM)
                and not isinstance(element, sympy.Piecewise)
            ):
                raise Miss(f"the mask is computed with indices in {found.dtype}, which may wrap or round", node)
            self._memo[node] = element
        return self._memo[node]

    def _element(self, node: Node, found: torch.Tensor) -> Any:
        if node.op in ("placeholder", "get_attr"):
            name = node.name.removeprefix("l_").removeprefix("kwargs_").strip("_")
            raise Miss(f"the mask depends on the values of input {name}", node)
        if node.op == "call_function" and node.target is torch.arange:
            return self._arange(node)
        call = call_of(node)
        handler = None if call is None or call.inplace else getattr(self, f"_{call.op}", None)
        if call is not None and not call.inplace:
            if call.op in _RELATIONS or call.op in _ARITHMETIC or call.op in _LOGIC:
                return self._binary(node, call, found)
            if call.op in _CONSTANTS:
                return _constant(_CONSTANTS[call.op], found.dtype)
            if call.op in ("full", "full_like", "new_full") and isinstance(call["fill_value"], (int, float)):
                return _constant(call["fill_value"], found.dtype)
        if call is None or handler is None:
            shown = getattr(node.target, "__name__", node.target)
            raise Miss(f"the mask is computed with {shown}, which is not understood", node)
        return handler(node, call, found)

    # -- operands --------------------------------------------------------------------------------------------

    def _operand(self, item: Any, result: torch.Tensor, rank: int | None = None) -> Any:
        """An operand's element in the indices of the result it is broadcast to."""
        rank = result.dim() if rank is None else rank
        found = tensor(item)
        if found is not None:
            shift = rank - found.dim()
            by_index = {
                DIM[d]: sympy.Integer(0) if equal(size, 1) else DIM[d + shift] for d, size in enumerate(found.shape)
            }
            return self.trace(item).subs(by_index, simultaneous=True)
        number = value(item)
        if isinstance(number, torch.SymInt):
            return number.node.expr
        if isinstance(number, bool):
            return sympy.true if number else sympy.false
        if isinstance(number, (int, float)):
            return _constant(number, torch.float32 if isinstance(number, float) else torch.int64)
        raise Miss(f"an operand is {number!r}", item if isinstance(item, Node) else None)

    def _binary(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        a, b = self._operand(call["input"], found), self._operand(call["other"], found)
        if call.args.get("alpha", 1) != 1:
            raise Miss("the mask is computed with alpha != 1", node)
        if call.op in _LOGIC:
            if not (_is_bool(a) and _is_bool(b)):
                raise Miss("the mask combines integers bit by bit", node)
            return _LOGIC[call.op](a, b)
        if _is_bool(a) or _is_bool(b):
            return self._of_booleans(node, call.op, a, b)
        if isinstance(a, sympy.Piecewise) or isinstance(b, sympy.Piecewise):
            return self._of_choices(node, call.op, a, b)
        if call.op in _RELATIONS:
            difference = sympy.expand(a - b)
            return _RELATIONS[call.op](difference, 0) if difference.is_number else _RELATIONS[call.op](a, b)
        return sympy.expand(_ARITHMETIC[call.op](a, b))

    def _of_booleans(self, node: Node, op: str, a: Any, b: Any) -> Any:
        if _is_bool(a) and _is_bool(b) and op in ("eq", "ne", "mul"):
            same = sympy.Not(sympy.Xor(a, b))
            return {"eq": same, "ne": sympy.Not(same), "mul": sympy.And(a, b)}[op]
        if op == "eq" and b in (0, 1):
            return a if b == 1 else sympy.Not(a)
        raise Miss(f"the mask is computed with {op} of a boolean", node)

    def _of_choices(self, node: Node, op: str, a: Any, b: Any) -> Any:
        """An operator on a choice between numbers, and a number."""
        apply = {**_RELATIONS, **_ARITHMETIC}[op]
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
        return element

    _contiguous = _clone = _cast

    def _not(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        element = self.trace(call["input"])
        if not _is_bool(element):
            raise Miss("the mask inverts integers bit by bit", node)
        return sympy.Not(element)

    def _neg(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        return -self.trace(call["input"])

    def _where(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        condition = self._operand(call["condition"], found)
        chosen, other = self._operand(call["input"], found), self._operand(call["other"], found)
        if _is_bool(chosen) and _is_bool(other):
            return sympy.Or(sympy.And(condition, chosen), sympy.And(sympy.Not(condition), other))
        if _is_bool(chosen) or _is_bool(other):
            raise Miss("the mask chooses between a boolean and a number", node)
        return sympy.Piecewise((chosen, condition), (other, True))

    def _masked_fill(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        condition = self._operand(call["mask"], found)
        filled, kept = self._operand(call["value"], found), self._operand(call["input"], found)
        if found.dtype == torch.bool:
            filled = sympy.true if filled not in (0, sympy.false) else sympy.false
            return sympy.Or(sympy.And(condition, filled), sympy.And(sympy.Not(condition), kept))
        return sympy.Piecewise((filled, condition), (kept, True))

    def _tril(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        i, j = DIM[found.dim() - 2], DIM[found.dim() - 1]
        offset = sympy.Integer(call["diagonal"]) if isinstance(call["diagonal"], int) else None
        if offset is None:
            raise Miss("the mask's diagonal is not a number", node)
        inside = sympy.Ge(j, i + offset) if call.op == "triu" else sympy.Le(j, i + offset)
        element = self.trace(call["input"])
        if _is_bool(element):
            return sympy.And(inside, element)
        return sympy.Piecewise((element, inside), (sympy.Integer(0), True))

    _triu = _tril

    def _permuted(self, source: Any, dims: list[int]) -> Any:
        """Element of a tensor whose dimension d is the source's dimension dims[d]."""
        by_index = {DIM[old]: DIM[new] for new, old in enumerate(dims)}
        return self.trace(source).subs(by_index, simultaneous=True)

    def _transpose(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        dims = list(range(found.dim()))
        a, b = call["dim0"] % found.dim(), call["dim1"] % found.dim()
        dims[a], dims[b] = b, a
        return self._permuted(call["input"], dims)

    def _permute(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        return self._permuted(call["input"], [d % found.dim() for d in call["dims"]])

    def _t(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        return self._permuted(call["input"], [1, 0] if found.dim() == 2 else [0])

    _numpy_T = _t

    def _expand(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        return self._operand(call["input"], found)

    _expand_as = _expand

    def _unsqueeze(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        at = call["dim"] % found.dim()
        by_index = {DIM[d]: DIM[d + 1] for d in range(at, found.dim() - 1)}
        return self.trace(call["input"]).subs(by_index, simultaneous=True)

    def _reshaped(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        """A reshape that only adds or removes dimensions of size 1."""
        source = tensor(call["input"])
        assert source is not None
        old = [d for d, size in enumerate(source.shape) if not equal(size, 1)]
        new = [d for d, size in enumerate(found.shape) if not equal(size, 1)]
        kept = zip(old, new, strict=False)
        if len(old) != len(new) or not all(equal(source.shape[a], found.shape[b]) for a, b in kept):
            raise Miss("the mask is reshaped", node)
        by_index = {DIM[d]: sympy.Integer(0) for d in range(source.dim())}
        by_index.update({DIM[a]: DIM[b] for a, b in zip(old, new, strict=True)})
        return self.trace(call["input"]).subs(by_index, simultaneous=True)

    _view = _reshape = _squeeze = _flatten = _unflatten = _reshaped

    def _getitem(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        source, index = tensor(call["input"]), call["index"]
        if source is None:
            raise Miss("the mask is taken out of a list", node)
        parts = list(index) if isinstance(index, tuple) else [index]
        if parts and all(tensor(part) is not None for part in parts) and len(parts) <= source.dim():
            return self._gathered(call["input"], parts, found)
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            missing = source.dim() - sum(part is not None and part is not Ellipsis for part in parts)
            parts[at : at + 1] = [slice(None)] * missing
        by_index, new, old = {}, 0, 0
        for part in parts + [slice(None)] * (source.dim() - sum(part is not None for part in parts)):
            if part is None:
                new += 1
            elif isinstance(part, int) and not isinstance(part, bool) and part >= 0:
                by_index[DIM[old]] = sympy.Integer(part)
                old += 1
            elif isinstance(part, slice):
                by_index[DIM[old]] = self._sliced(part, DIM[new], node)
                old, new = old + 1, new + 1
            else:
                raise Miss(f"the mask is indexed with {part!r}", node)
        return self.trace(call["input"]).subs(by_index, simultaneous=True)

    def _sliced(self, part: slice, index: sympy.Symbol, node: Node) -> Any:
        start, step = value(part.start) or 0, value(part.step) or 1
        if isinstance(start, torch.SymInt) or not isinstance(step, int):
            raise Miss("the mask is sliced from a dynamic start", node)
        if start < 0:
            raise Miss("the mask is sliced from the end", node)
        return start + step * index

    def _gathered(self, source: Any, indices: list[Any], found: torch.Tensor) -> Any:
        """source[i0, i1, ...] with index tensors for the leading dimensions."""
        base = tensor(source)
        assert base is not None
        gathered_rank = found.dim() - (base.dim() - len(indices))
        by_index = {}
        for d, item in enumerate(indices):
            element = self._operand(item, found, gathered_rank)
            if _is_bool(element):
                raise Miss("the mask is selected by a mask", item)
            if element.is_nonnegative is not True:
                raise Miss("the mask is gathered with indices that may be negative", item)
            by_index[DIM[d]] = element
        for d in range(len(indices), base.dim()):
            by_index[DIM[d]] = DIM[d - len(indices) + gathered_rank]
        return self.trace(source).subs(by_index, simultaneous=True)

    # -- packed sequences ------------------------------------------------------------------------------------

    def _diff(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        """Differences of neighbours along the last dimension, when they are all the same."""
        last = found.dim() - 1
        if call["n"] != 1 or call["dim"] not in (-1, last) or call["append"] is not None:
            raise Miss("the mask is computed with an unusual diff", node)
        element, index = self.trace(call["input"]), DIM[last]
        if _is_bool(element):
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
        if _is_bool(element) or element.has(index) or isinstance(element, sympy.Piecewise):
            raise Miss("the mask is computed with cumsum of something that is not constant", node)
        return sympy.expand(element * (index + 1))
