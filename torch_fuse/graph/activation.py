"""Recogniser: GELU, as `F.gelu` in both flavours or written out with erf, tanh or sigmoid in any association.

A written-out GELU is multiplied out, as a polynomial in its input x and in f, the value of its erf (tanh, sigmoid):
x/2 + x f/2 for erf and tanh, x f for sigmoid; and so is the argument of f, a polynomial in x alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.values import same_shape, tensor

# Coefficients of x^i f^j, by (i, j).
Polynomial = dict[tuple[int, int], float]

_TANH = math.sqrt(2 / math.pi)
_HALVES: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
# What f is: the flavour, the result in x and f, the argument of f in x.
_FORMS: dict[str, tuple[Literal["none", "tanh"], Polynomial, Polynomial]] = {
    "erf": ("none", _HALVES, {(1, 0): math.sqrt(0.5)}),
    "tanh": ("tanh", _HALVES, {(1, 0): _TANH, (3, 0): 0.044715 * _TANH}),
    "sigmoid": ("tanh", {(1, 1): 1.0}, {(1, 0): 2 * _TANH, (3, 0): 2 * 0.044715 * _TANH}),
}
_TOLERANCE = 1e-4  # of constants, relative: models write 0.7978845608 and 0.79788
_ARITHMETIC = ("mul", "div", "add", "sub", "neg", "pow", "square", "cast")
_MOST_NODES = 24  # of a written-out GELU; the longest spelling known has 9
_MOST_TERMS = 8


@dataclass(frozen=True)
class Gelu:
    """A GELU.

    Attributes:
        node: the result, of the input's shape and dtype.
        input: what it is applied to, before any cast inside.
        approximate: "none" (erf) or "tanh", as `torch.nn.functional.gelu` takes it.
        nodes: all nodes from the input to the result.
    """

    node: Node
    input: Node
    approximate: Literal["none", "tanh"]
    nodes: frozenset[Node]


def gelus(nodes: Iterable[Node]) -> list[Gelu]:
    """All GELUs among a graph's nodes, which come in the graph's order; of two in one another, the outer."""
    behind: set[Node] = set()  # an erf, tanh, sigmoid or gelu, with only arithmetic in between
    for node in nodes:
        call = call_of(node)
        if call is None:
            continue
        arithmetic = call.op in _ARITHMETIC and any(source in behind for source in node.all_input_nodes)
        if arithmetic or call.op == "gelu" or call.op in _FORMS:
            behind.add(node)
    found = [gelu for node in nodes if node in behind and (gelu := match_gelu(node)) is not None]
    return [gelu for gelu in found if not any(gelu is not outer and gelu.node in outer.nodes for outer in found)]


def match_gelu(node: Node) -> Gelu | None:
    """Recognises a GELU whose result is `node`; None for anything else."""
    seen = {node}
    inner = strip_casts(node, seen)
    call, result, before = call_of(inner), tensor(node), tensor(inner)
    if call is None or call.inplace or result is None or before is None:
        return None
    if node is not inner and result.dtype == before.dtype:
        return None  # casts that change nothing, or that round: the GELU ends before them
    if call.op == "gelu":
        if call["approximate"] not in ("none", "tanh") or not isinstance(call["input"], Node):
            return None
        return _typed(node, call["input"], call["approximate"], seen | {inner})
    if call.op not in ("mul", "div", "add"):
        return None
    found = _written_out(inner)
    return None if found is None else _typed(node, found[0], found[1], seen | found[2])


def _typed(node: Node, source: Node, approximate: Literal["none", "tanh"], nodes: set[Node]) -> Gelu | None:
    """The GELU from before a widening cast of its input, where that has the result's dtype."""
    result = tensor(node)
    casts: set[Node] = set()
    for candidate in (strip_casts(source, casts), source):
        x, wide = tensor(candidate), tensor(source)
        if x is None or wide is None or result is None or not same_shape(x.shape, result.shape):
            continue
        if x.dtype == result.dtype and torch.promote_types(x.dtype, wide.dtype) == wide.dtype:
            return Gelu(node, candidate, approximate, frozenset(nodes | (casts if candidate is not source else set())))
    return None


def _written_out(root: Node) -> tuple[Node, Literal["none", "tanh"], set[Node]] | None:
    """(input, flavour, nodes) of a GELU spelled with elementwise operators."""
    functions, inputs = _ancestors(root)
    if len(functions) != 1:
        return None
    (f,) = functions
    call = call_of(f)
    assert call is not None
    approximate, result, argument = _FORMS[call.op]
    for x in inputs:
        nodes: set[Node] = {f}
        outer = _polynomial(root, x, f, nodes)
        if outer is None or not _close(outer, result):
            continue
        inner = _polynomial(call["input"], x, None, nodes)
        if inner is not None and _close(inner, argument):
            return x, approximate, nodes
    return None


def _ancestors(root: Node) -> tuple[list[Node], list[Node]]:
    """The erf, tanh and sigmoid that a value is computed from by arithmetic, and the nodes that could be its input."""
    functions: list[Node] = []
    visited: dict[Node, None] = {}
    pending = [root]
    while pending and len(visited) <= _MOST_NODES:
        node = pending.pop(0)
        if node in visited:
            continue
        visited[node] = None
        call = call_of(node)
        if call is None or call.inplace:
            continue
        if call.op in _FORMS:
            functions.append(node)
        if call.op in _FORMS or call.op in _ARITHMETIC:
            pending += node.all_input_nodes
    # The argument of erf is x times a number: its input comes before what that was computed from.
    return functions, [node for node in visited if node is not root and node not in functions and len(node.users) > 1]


def _polynomial(node: Any, x: Node, f: Node | None, nodes: set[Node]) -> Polynomial | None:
    """A value as a polynomial in x and f, or None; casts count for nothing. Collects the nodes it is made of."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return {(0, 0): float(node)}
    if node is x:
        return {(1, 0): 1.0}
    if f is not None and node is f:
        return {(0, 1): 1.0}
    call = call_of(node)
    if call is None or call.inplace or call.op not in _ARITHMETIC or len(nodes) > _MOST_NODES:
        return None
    nodes.add(node)
    if call.op == "cast":
        return None if strip_casts(node) is node else _polynomial(call["input"], x, f, nodes)
    operands = [_polynomial(operand, x, f, nodes) for operand in _operands(call.args)]
    if any(operand is None for operand in operands):
        return None
    known = [operand for operand in operands if operand is not None]
    return _combined(call.op, call.args, known)


def _operands(args: Any) -> Iterator[Any]:
    yield args["input"]
    if "other" in args:
        yield args["other"]


def _combined(op: str, args: Any, operands: list[Polynomial]) -> Polynomial | None:
    first = operands[0]
    if op == "neg":
        return _scaled(first, -1.0)
    if op in ("pow", "square"):
        exponent = args.get("exponent", 2)
        if exponent not in (2, 3):
            return None
        squared = _times(first, first)
        return squared if exponent == 2 or squared is None else _times(squared, first)
    second = operands[1]
    if op == "mul":
        return _times(first, second)
    if op == "div":
        number = second.get((0, 0), 0.0)
        if args["rounding_mode"] is not None or len(second) != 1 or number == 0:
            return None
        return _scaled(first, 1 / number)
    alpha = args["alpha"]
    if not isinstance(alpha, (int, float)):
        return None
    total = dict(first)
    for power, value in _scaled(second, -alpha if op == "sub" else alpha).items():
        total[power] = total.get(power, 0.0) + value
    return total


def _scaled(p: Polynomial, number: float) -> Polynomial:
    return {power: value * number for power, value in p.items()}


def _times(p: Polynomial, q: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for (i, j), a in p.items():
        for (k, m), b in q.items():
            total[i + k, j + m] = total.get((i + k, j + m), 0.0) + a * b
    return total if len(total) <= _MOST_TERMS else None


def _close(found: Polynomial, wanted: Polynomial) -> bool:
    terms = found.keys() | wanted.keys()
    return all(
        math.isclose(found.get(term, 0.0), wanted.get(term, 0.0), rel_tol=_TOLERANCE, abs_tol=1e-9) for term in terms
    )
