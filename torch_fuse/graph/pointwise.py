"""Recogniser: an elementwise function of one tensor that lies in memory, such as c_skip(t) = 1 / (t^2 + 1).

A kernel that is given t and the function needs no kernel before it that computes the coefficient. The function is
written in prefix notation, as `torch_fuse.kernels._pointwise` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.memory import in_memory
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.values import equal, same_shape, tensor

IDENTITY = "x"
MOST_TOKENS = 48  # a value that is read twice is written twice

_UNARY = {"neg", "square", "sqrt", "rsqrt", "reciprocal", "exp", "sigmoid", "tanh", "cos", "sin"}
_POWERS = {2: "square", 0.5: "sqrt", -1: "reciprocal", -0.5: "rsqrt"}
_BINARY = {"add": "add", "sub": "sub", "rsub": "sub", "mul": "mul", "div": "div"}  # of "input" and "other", in all
_VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous"}


@dataclass(frozen=True)
class Pointwise:
    """function(leaf), viewed in another shape.

    Attributes:
        leaf: a tensor in memory.
        function: in prefix notation; "x" is the leaf.
        shape: to view the leaf in, one size at most unknown (-1).
    """

    leaf: Node
    function: str
    shape: tuple[int, ...]


def match_pointwise(factors: Sequence[tuple[Node, bool]], dtypes: tuple[torch.dtype, torch.dtype], gradients: bool,
                    order: Order, before: Node) -> Pointwise | None:  # fmt: skip
    """The product of `factors` (of which some divide) as a function of one tensor in memory, or None.

    Args:
        factors: values of which all sizes but one are 1.
        dtypes: in which the function is computed: no step may be in a wider one; and of what it goes into: no step
            may round to a narrower one that the leaf has not.
        gradients: whether gradients are recorded: then each step has to pass them on to the leaf.
        order: the graph's.
        before: where the function is computed; nothing that it reads may be written to until there.
    """
    reader = _Reader()
    programs = [("reciprocal " if divides else "") + reader.read(factor) for factor, divides in factors]
    if not programs or len(reader.leaves) != 1:
        return None
    function = "mul " * (len(programs) - 1) + " ".join(programs)
    leaf = next(iter(reader.leaves))
    if function == IDENTITY or len(function.split(" ")) > MOST_TOKENS or not in_memory(leaf):
        return None
    steps = reader.known.keys() - {leaf}
    places = {_place(factor) for factor, _ in factors}
    if len(places) != 1 or not _alike(leaf, steps, dtypes, gradients):
        return None
    try:
        order.check_unwritten([leaf, *steps], order.index[before])
    except Miss:
        return None
    place = places.pop()
    return Pointwise(leaf, function, (1,) if place is None else (-1, *[1] * place))


class _Reader:
    """Writes values as functions of what they are computed from.

    Attributes:
        leaves: what is no elementwise function of anything, in order.
        known: all nodes read, with their functions.
    """

    def __init__(self) -> None:
        self.leaves: dict[Node, None] = {}
        self.known: dict[Node, str] = {}

    def read(self, node: Node) -> str:
        """The function up to a node; of too many tokens where it is too long."""
        if node not in self.known:
            found = self._step(node)
            if found is None:
                self.leaves[node] = None
                found = IDENTITY
            self.known[node] = found if len(found) < 1024 else IDENTITY + " " * MOST_TOKENS
        return self.known[node]

    def _step(self, node: Node) -> str | None:
        """The function by those of a node's operands, or None where it is no elementwise one."""
        call = call_of(node)
        if call is None or call.inplace:
            return None
        source = call.args.get("input")
        if call.op in _BINARY and call.args.get("alpha", 1) == 1:
            return self._binary(_BINARY[call.op], source, call["other"])
        if not isinstance(source, Node):
            return None
        adds_sizes = call.op == "getitem" and _only_adds_sizes(call["index"])
        if call.op in _VIEWS or adds_sizes or strip_casts(node) is not node:
            return self.read(source)
        if call.op in _UNARY:
            return f"{call.op} {self.read(source)}"
        exponent = call.args.get("exponent")
        if call.op == "pow" and isinstance(exponent, (int, float)) and exponent in _POWERS:
            return f"{_POWERS[exponent]} {self.read(source)}"
        return None

    def _binary(self, op: str, left: Any, right: Any) -> str | None:
        if isinstance(left, Node) and isinstance(right, Node):
            return f"{op} {self.read(left)} {self.read(right)}"
        number = right if isinstance(left, Node) else left
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            return None
        if isinstance(right, Node):
            return f"{ {'sub': 'rsub', 'div': 'rdiv'}.get(op, op) }:{float(number)!r} {self.read(right)}"
        if op == "div" and (number == 0 or not math.isfinite(1 / number)):
            return None
        op, number = {"sub": ("add", -number), "div": ("mul", 1 / (number or 1))}.get(op, (op, number))
        return f"{op}:{float(number)!r} {self.read(left)}"


def _only_adds_sizes(index: Any) -> bool:
    """Whether an index is like that of x[:, None]."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


def _place(node: Node) -> int | None:
    """How many sizes come behind the one that need not be 1; None where all are 1, -1 for several."""
    value = tensor(node)
    sizes = () if value is None else value.shape[::-1]
    places = [i for i, size in enumerate(sizes) if not equal(size, 1)]
    return None if not places else places[0] if len(places) == 1 else -1


def _alike(leaf: Node, steps: Collection[Node], dtypes: tuple[torch.dtype, torch.dtype], gradients: bool) -> bool:
    """Whether all steps have the leaf's values in the leaf's order, no wider or rounding dtype, and its gradient."""
    widest, narrowest = (dtype.itemsize for dtype in dtypes)
    first = tensor(leaf)
    for node in (leaf, *steps):
        value = tensor(node)
        if first is None or value is None or value.device != first.device:
            return False
        least = max(2, min(narrowest, first.dtype.itemsize))
        if not value.dtype.is_floating_point or not least <= value.dtype.itemsize <= widest:
            return False
        if gradients and value.requires_grad != first.requires_grad:
            return False
        sizes, wanted = ([size for size in x.shape if not equal(size, 1)] for x in (value, first))
        if len(sizes) > 1 or not same_shape(sizes, wanted):
            return False
    return True
