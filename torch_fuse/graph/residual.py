"""Recogniser: a*x + b*y in every association: gates, skips, `addcmul`, `lerp`, casts in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.norm import match_norm, strip_casts
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
    if call is None or call.op not in ("add", "sub", "rsub", "addcmul", "lerp") or tensor(inner) is None:
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
    if call.op in ("add", "sub", "rsub") and tensor(call["input"]) is not None and tensor(call["other"]) is not None:
        seen.add(node)
        other_sign = sign if call.op == "add" else -sign
        factors = () if call["alpha"] == 1 else (call["alpha"],)
        second = _operand(call["other"], other_sign, seen)
        return _operand(call["input"], sign, seen) + [
            Weighted(term.tensor, term.factors + factors, term.sign) for term in second
        ]
    if call.op == "addcmul":
        seen.add(node)
        factor = () if call["value"] == 1 else (call["value"],)
        product = _product(node, call["tensor1"], call["tensor2"], factor, sign, seen)
        return [*_operand(call["input"], sign, seen), product]
    if call.op == "lerp":
        seen.add(node)
        weight = call["weight"]
        return [Weighted(call["input"], (("1-", weight),), sign), Weighted(call["end"], (weight,), sign)]
    if call.op == "mul":
        seen.add(node)
        return [_product(node, call["input"], call["other"], (), sign, seen)]
    return [Weighted(node, (), sign)]


@dataclass(frozen=True)
class Factors:
    """A product written out: number * leaves, of which the inverted ones divide.

    Attributes:
        number: the product of all numbers, with the sign.
        leaves: what is no product itself, each with whether it divides.
        nodes: the products, casts and dropouts that are left out.
    """

    number: float
    leaves: tuple[tuple[Node, bool], ...]
    nodes: frozenset[Node]


def factors_of(term: Weighted) -> Factors | None:
    """The factors of a summand, looking into products of products, divisions, signs and dropouts that drop nothing.

    None where a factor is neither a number nor a tensor. Smaller values that are broadcast stay whole.
    """
    return _factors(
        [(term.tensor, False), *((factor, False) for factor in term.factors)], float(term.sign), term.tensor
    )


def _factors(pending: list[tuple[Any, bool]], number: float, whole: Node) -> Factors | None:
    leaves: list[tuple[Node, bool]] = []
    nodes: set[Node] = set()
    while pending:
        value, divides = pending.pop(0)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if divides and value == 0:
                return None
            number = number / value if divides else number * value
        elif tensor(value) is None:
            return None
        elif divides or not _full(value, whole):
            leaves.append((value, divides))
        else:
            steps: set[Node] = set()
            inner = strip_casts(value, steps)
            inside = _inside(inner)
            nodes |= steps
            if inside is None:
                leaves.append((inner, False))
            else:
                nodes.add(inner)
                number *= inside[0]
                pending += inside[1]
    return Factors(number, tuple(leaves), frozenset(nodes))


def _inside(node: Node) -> tuple[int, list[tuple[Any, bool]]] | None:
    """The sign and the factors of a product that nothing else reads and that is no norm, or None."""
    call = call_of(node)
    if call is None or call.inplace or len(node.users) != 1 or match_norm(node) is not None:
        return None
    if call.op == "mul":
        return 1, [(call["input"], False), (call["other"], False)]
    if call.op == "div":
        return 1, [(call["input"], False), (call["other"], True)]
    if call.op == "neg":
        return -1, [(call["input"], False)]
    if call.op == "dropout" and (call["training"] is False or call["p"] == 0):
        return 1, [(call["input"], False)]
    return None


def _operand(node: Node, sign: int, seen: set[Node]) -> list[Weighted]:
    """The summands of an operand; a value that others read too, such as the residual stream, stays whole.

    So does one with a summand of another shape: a bias, or a table of positions.
    """
    used: set[Node] = set()
    inner = strip_casts(node, used)
    if all(len(step.users) == 1 for step in (inner, *used)):
        terms = _sum(inner, sign, used)
        if _all_full(terms, node):
            seen |= used
            return terms
    return [Weighted(strip_casts(node, seen), (), sign)]


def _product(node: Node, a: Any, b: Any, factors: tuple[Any, ...], sign: int, seen: set[Node]) -> Weighted:
    first, second = tensor(a), tensor(b)
    result = tensor(node)
    assert result is not None
    if first is None:
        return Weighted(b, (a, *factors), sign)
    if second is None or same_shape(first.shape, result.shape):
        return Weighted(strip_casts(a, seen), (b, *factors), sign)
    return Weighted(strip_casts(b, seen), (a, *factors), sign)
