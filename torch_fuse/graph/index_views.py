"""Views of index-only tensors (transpose, reshape, getitem, gather) as substitutions of indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, less, tensor, value

DIM = [sympy.Symbol(f"d{i}", integer=True, nonnegative=True) for i in range(8)]


def size_expr(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _numel(shape: Sequence[Any], dims: list[int]) -> sympy.Expr:
    return sympy.prod([size_expr(shape[d]) for d in dims])


def _group(
    old_shape: Sequence[Any], old: list[int], new_shape: Sequence[Any], new: list[int]
) -> tuple[list[int], list[int]]:
    """The first dimensions of both shapes that have as many elements; none when that is not known."""
    if not old or not new:
        return [], []
    merged, split = [old[0]], [new[0]]
    before, after = old_shape[old[0]], new_shape[new[0]]
    while not equal(before, after):
        if less(before, after) and len(merged) < len(old):
            merged.append(old[len(merged)])
            before = before * old_shape[merged[-1]]
        elif less(after, before) and len(split) < len(new):
            split.append(new[len(split)])
            after = after * new_shape[split[-1]]
        else:
            return [], []
    return merged, split


def _without_fractions(element: Any, shape: Sequence[Any]) -> Any:
    """An element with floors of numbers below 1 as 0, and remainders of numbers below the divisor as they are."""
    largest = {DIM[d]: size_expr(size) - 1 for d, size in enumerate(shape)}

    def below(index: sympy.Expr, bound: sympy.Expr) -> bool:
        terms = index.as_coefficients_dict()
        grows = all(factor >= 0 and (term == 1 or term in largest) for term, factor in terms.items())
        return bool(grows and (bound - index.subs(largest)).is_positive)

    fractions = {x: sympy.Integer(0) for x in element.atoms(sympy.floor) if below(x.args[0], sympy.Integer(1))}
    element = element.xreplace(fractions)
    return element.xreplace({x: x.args[0] for x in element.atoms(sympy.Mod) if below(x.args[0], x.args[1])})


def is_bool(expr: Any) -> bool:
    """Whether an element is a truth value (sympy counts symbols among its Booleans)."""
    return isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol)


def constant(number: Any, dtype: torch.dtype) -> Any:
    """An element of a constant tensor."""
    if dtype == torch.bool:
        return sympy.true if number else sympy.false
    if isinstance(number, float):
        if number in (float("inf"), float("-inf")):
            return sympy.oo if number > 0 else -sympy.oo
        return sympy.Integer(int(number)) if number.is_integer() else sympy.Float(number)
    return sympy.Integer(number)


class Views:
    """The part of `IndexTrace` that moves elements without computing."""

    def trace(self, node: Any) -> Any:
        """The element of `node` at (d0, d1, ...)."""
        raise NotImplementedError

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
        if isinstance(number, (bool, int, float)):
            return constant(number, torch.bool if isinstance(number, bool) else torch.float32)
        raise Miss(f"an operand is {number!r}", item if isinstance(item, Node) else None)

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

    def _repeat_interleave(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        if not isinstance(call["repeats"], int) or not isinstance(call["dim"], int):
            raise Miss("the mask is repeated by a tensor or in one dimension", node)
        index = DIM[call["dim"] % found.dim()]
        element = self.trace(call["input"])
        source = tensor(call["input"])
        one = source is not None and equal(source.shape[call["dim"]], 1)
        return element.subs(index, sympy.Integer(0) if one else sympy.floor(index / call["repeats"]))

    def _repeat(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        """Repetition of dimensions of size 1; that of others starts again, which no band of keys does."""
        source, repeats = tensor(call["input"]), call["repeats"]
        repeats = repeats if isinstance(repeats, (list, tuple)) else (repeats,)
        assert source is not None
        outer = len(repeats) - source.dim()
        for size, count in zip(source.shape, map(value, repeats[outer:]), strict=True):
            if not (equal(size, 1) or equal(count, 1)):
                raise Miss("the mask is repeated", node)
        return self._operand(call["input"], found)

    def _unsqueeze(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        at = call["dim"] % found.dim()
        by_index = {DIM[d]: DIM[d + 1] for d in range(at, found.dim() - 1)}
        return self.trace(call["input"]).subs(by_index, simultaneous=True)

    def _reshaped(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        """A reshape: dimensions are kept, split and merged, and those of size 1 come and go."""
        source = tensor(call["input"])
        assert source is not None
        old = [d for d, size in enumerate(source.shape) if not equal(size, 1)]
        new = [d for d, size in enumerate(found.shape) if not equal(size, 1)]
        by_index = {DIM[d]: sympy.Integer(0) for d in range(source.dim())}
        while old or new:
            merged, split = _group(source.shape, old, found.shape, new)
            if not merged:
                raise Miss("the mask is reshaped", node)
            flat = sum((DIM[d] * _numel(found.shape, split[n + 1 :]) for n, d in enumerate(split)), sympy.Integer(0))
            for n, d in enumerate(merged):
                position = sympy.floor(flat / _numel(source.shape, merged[n + 1 :])) if merged[n + 1 :] else flat
                by_index[DIM[d]] = sympy.Mod(position, size_expr(source.shape[d])) if n else position
            old, new = old[len(merged) :], new[len(split) :]
        element = self.trace(call["input"]).subs(by_index, simultaneous=True)
        return _without_fractions(element, found.shape)

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
        start, step = (
            value(given) if given is not None else default for given, default in ((part.start, 0), (part.step, 1))
        )
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
            if is_bool(element):
                raise Miss("the mask is selected by a mask", item)
            if element.is_nonnegative is not True:
                raise Miss("the mask is gathered with indices that may be negative", item)
            by_index[DIM[d]] = element
        for d in range(len(indices), base.dim()):
            by_index[DIM[d]] = DIM[d - len(indices) + gathered_rank]
        return self.trace(source).subs(by_index, simultaneous=True)
