"""The two summands of a skip combination: a coefficient times a value, which is a linear layer's result or the skip."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torch_fuse.graph.linear import Linear, from_linear
from torch_fuse.graph.modulate import broadcasts
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.residual import Factors
from torch_fuse.graph.values import same_shape, tensor


@dataclass(frozen=True)
class Coefficient:
    """number * factors, of which the inverted ones divide."""

    number: float = 1.0
    factors: tuple[tuple[Node, bool], ...] = ()

    @property
    def is_one(self) -> bool:
        """Whether nothing is multiplied."""
        return self.number == 1 and not self.factors

    def times(self, other: Coefficient) -> Coefficient:
        """The product of two."""
        return Coefficient(self.number * other.number, self.factors + other.factors)


@dataclass(frozen=True)
class Side:
    """A summand as coefficient * node; the linear layer behind it, where it is one, and the views between."""

    node: Node
    coefficient: Coefficient
    linear: Linear | None
    nodes: frozenset[Node]


def lerp_end(node: Node, total: Node, projected: Collection[Node]) -> Side:
    """An end of a lerp."""
    steps: set[Node] = set()
    inner = strip_casts(node, steps)
    before = _from_projected(inner, steps | {total}, projected)
    if before is None:
        return Side(inner, Coefficient(), None, frozenset(steps))
    return Side(inner, Coefficient(), before[0], frozenset({*steps, *before[1]}))


def summand_of(factors: Factors | None, total: Node, projected: Collection[Node]) -> Side | None:
    """A summand: of its leaves of full shape one is the value, the projection where there is one."""
    if factors is None:
        return None
    full = [leaf for leaf, divides in factors.leaves if not divides and _is_full(leaf, total)]
    found = None
    for leaf in full:
        found = _from_projected(leaf, {*factors.nodes, total}, projected)
        if found is not None:
            break
    if not full:
        return None
    chosen = leaf if found is not None else full[0]
    rest = list(factors.leaves)
    rest.remove((chosen, False))
    if not all(broadcasts(factor, total) for factor, _ in rest):
        return None
    coefficient = Coefficient(factors.number, tuple(rest))
    if found is None:
        return Side(chosen, coefficient, None, factors.nodes)
    return Side(chosen, coefficient, found[0], frozenset({*factors.nodes, *found[1]}))


def _is_full(node: Node, total: Node) -> bool:
    small, whole = tensor(node), tensor(total)
    return small is not None and whole is not None and same_shape(small.shape, whole.shape)


def _from_projected(
    node: Node, readers: Collection[Node], projected: Collection[Node]
) -> tuple[Linear, set[Node]] | None:
    """The linear layer behind a projected value that only these nodes read, and the nodes from it on."""
    if node not in projected:
        return None
    found = from_linear(node, frozenset({*readers, *node.users}))
    if found is None:
        return None
    linear, views = found
    return linear, {*linear.nodes, *views}


def scale_of(call: Any, node: Node, result: Node) -> Coefficient | None:
    """What `result` multiplies `node` by, where that is smaller than it, or None."""
    other = call["other"] if call["input"] is node else call["input"]
    divides = call.op == "div"
    if other is node or (divides and call["input"] is not node) or not _is_full(node, result):
        return None
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return None if divides and other == 0 else Coefficient(1.0 / other if divides else float(other))
    if not broadcasts(other, result) or _is_full(other, result):
        return None
    return Coefficient(1.0, ((other, divides),))
