"""What may lie between attention weights and the product of query and key: factors, terms, masks, caps, sinks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Node


@dataclass(frozen=True)
class Factor:
    """Scores are multiplied by `number` (or divided by it): a Python number, a symbolic one, or a tensor."""

    number: Any
    divides: bool = False


@dataclass(frozen=True)
class Term:
    """A tensor that is added to scores [*batch, S_q, S_k].

    Attributes:
        node: what is added.
        rank: number of dimensions of the scores that it is added to.
        factors: what the sum is multiplied by later.
    """

    node: Node
    rank: int
    factors: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Fill:
    """Scores that are replaced by a number.

    Attributes:
        mask: boolean, broadcastable to the scores.
        inverted: True in the mask means that the score is replaced (`masked_fill`), not that it is kept (`where`).
        value: the number, below zero.
        number: the number as the graph has it, maybe a constant tensor.
        rank: number of dimensions of the scores.
        terms_after: number of terms that are added later (those are first in the list of terms).
    """

    mask: Node
    inverted: bool
    value: float
    number: Any
    rank: int
    terms_after: int


@dataclass(frozen=True)
class Cap:
    """Scores that go through tanh.

    Attributes:
        factors: what they are multiplied by then.
        terms: number of terms that are added later.
        fills: number of masks that replace them later.
    """

    factors: tuple[Factor, ...]
    terms: int
    fills: int


@dataclass(frozen=True)
class Walk:
    """What was seen on the way back from the result."""

    nodes: frozenset[Node]
    steps: int = 0
    heads: tuple[Any, Any] | None = None
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    fills: tuple[Fill, ...] = ()
    dropout_p: Any = 0.0
    softmax: Node | None = field(default=None)
    cap: Cap | None = None
    sinks: Node | None = None
    sink_nodes: frozenset[Node] = frozenset()
    drops_sinks: bool = False
    refusal: str = ""

    def over(self, node: Node, **changes: Any) -> Walk:
        """One step further."""
        return replace(self, nodes=self.nodes | {node}, steps=self.steps + 1, **changes)

    def refuse(self, reason: str) -> str:
        """The first reason not to take the attention."""
        return self.refusal or reason

    @property
    def touched(self) -> bool:
        """Whether anything was seen between the softmax and here."""
        return bool(self.factors or self.terms or self.fills or self.cap)
