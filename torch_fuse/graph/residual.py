"""Recogniser: a*x + b*y in every association: gates, skips, `addcmul`, `lerp`, casts in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.values import same_shape, tensor


@dataclass(frozen=True)
class Weighted:
    """A summand: `tensor` times all of `factors` (numbers or broadcast tensors), with a sign."""

    tensor: Node
    factors: tuple[Any, ...] = ()
    sign: int = 1


@dataclass(frozen=True)
class Residual:
    """A sum of two or more weighted tensors of the result's shape.

    Attributes:
        node: the result, after any cast.
        terms: the summands.
        nodes: all nodes of the sum.
    """

    node: Node
    terms: tuple[Weighted, ...]
    nodes: frozenset[Node]


def match_residual(node: Node) -> Residual | None:
    """Recognises a sum of weighted tensors whose result is `node`; None for anything else."""
    seen: set[Node] = {node}
    inner = strip_casts(node, seen)
    call = call_of(inner)
    if call is None or call.op not in ("add", "sub", "addcmul", "lerp") or tensor(inner) is None:
        return None
    terms = _sum(inner, 1, seen)
    if len(terms) < 2 or not _all_full(terms, inner):
        return None
    return Residual(node, tuple(terms), frozenset(seen))


def _all_full(terms: list[Weighted], result: Node) -> bool:
    return all(_full(term.tensor, result) for term in terms)


def _full(node: Node, result: Node) -> bool:
    found, whole = tensor(node), tensor(result)
    return found is not None and whole is not None and same_shape(found.shape, whole.shape)


def _sum(node: Node, sign: int, seen: set[Node]) -> list[Weighted]:
    """The summands of a value: those of a sum that nothing else reads, or the value itself, weighted or not."""
    node = strip_casts(node, seen)
    call = call_of(node)
    if call is None or call.inplace or tensor(node) is None:
        return [Weighted(node, (), sign)]
    if call.op in ("add", "sub") and tensor(call["input"]) is not None and tensor(call["other"]) is not None:
        seen.add(node)
        other_sign = -sign if call.op == "sub" else sign
        factors = () if call["alpha"] == 1 else (call["alpha"],)
        second = _operand(call["other"], other_sign, seen)
        return _operand(call["input"], sign, seen) + [
            Weighted(term.tensor, term.factors + factors, term.sign) for term in second
        ]
    if call.op == "addcmul":
        seen.add(node)
        factor = () if call["value"] == 1 else (call["value"],)
        product = _product(node, call["tensor1"], call["tensor2"], factor, sign)
        return [*_operand(call["input"], sign, seen), product]
    if call.op == "lerp":
        seen.add(node)
        weight = call["weight"]
        return [Weighted(call["input"], (("1-", weight),), sign), Weighted(call["end"], (weight,), sign)]
    if call.op == "mul":
        seen.add(node)
        return [_product(node, call["input"], call["other"], (), sign)]
    return [Weighted(node, (), sign)]


def _operand(node: Node, sign: int, seen: set[Node]) -> list[Weighted]:
    """The summands of an operand; a value that others read too, such as the residual stream, stays whole.

    So does one with a summand of another shape: a bias, or a table of positions.
    """
    if len(node.users) == 1:
        used: set[Node] = set()
        terms = _sum(node, sign, used)
        if _all_full(terms, node):
            seen |= used
            return terms
    return [Weighted(strip_casts(node, seen), (), sign)]


def _product(node: Node, a: Any, b: Any, factors: tuple[Any, ...], sign: int) -> Weighted:
    first, second = tensor(a), tensor(b)
    result = tensor(node)
    assert result is not None
    if first is None:
        return Weighted(b, (a, *factors), sign)
    if second is None or same_shape(first.shape, result.shape):
        return Weighted(strip_casts(a), (b, *factors), sign)
    return Weighted(strip_casts(b), (a, *factors), sign)
