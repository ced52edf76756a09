"""The interface of a fusion: what it looks for, what it checks, what it emits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.fx import Node

from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.view import GraphView

Stage = Literal["canonicalise", "fuse", "attend"]
STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True)
class Match:
    """A recognised subgraph.

    Attributes:
        anchor: the node that the site is reported at.
        bindings: what the recognisers found, by name.
        replaced: the nodes whose values the rewrite computes anew, in graph order.
        region: all nodes whose work the rewrite takes over (the replaced ones among them).
        inputs: the nodes that the rewrite reads.
        note: what was proven, for the report.
        op: qualified name of the op that it emits, where that is not the pattern's `op`.
    """

    anchor: Node
    bindings: dict[str, Any]
    replaced: tuple[Node, ...]
    region: frozenset[Node]
    inputs: tuple[Node, ...]
    note: str = ""
    op: str = ""


@dataclass(frozen=True)
class Example:
    """A small model that spells a pattern, or nearly does, for the shared property tests.

    Attributes:
        name: names the example in test output.
        make: builds (callable, example inputs) for a dtype; the callable is an `nn.Module` or a function.
        fuses: whether the pattern must fire (a spelling) or may not change anything (a near miss).
    """

    name: str
    make: Callable[[torch.dtype], tuple[Callable[..., Any], tuple[Any, ...]]]
    fuses: bool = True


class Pattern:
    """One fusion. Subclass it, set the class attributes, write the methods, and `register` it.

    Class attributes:
        name: unique, named by what it does.
        kind: the candidates it is tried on: "attention", "norm_linear", "combine", "dequant", or "" for its own
            `anchors`.
        stage: when it is tried: "canonicalise" patterns, which only respell so that others recognise more, come first,
            then "fuse" patterns, then "attend" patterns, which replace an attention itself and so come after those
            that look at what goes into it. Within a stage the order is alphabetical,
            lossy ones first.
        op: qualified name of the op that it emits, or "" when it emits PyTorch's own operators.
        lossy: family of `options["lossy"]` that the pattern needs to be tried at all; "" for exact patterns. In its
            stage it comes before them.
        needs_kernel: False when the rewrite uses PyTorch's own operators only and wins on every device.
        across_autocast: True when autocast changes no operator that it emits, so that a match may reach from where
            autocast is on to where it is off.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    stage: ClassVar[Stage] = "fuse"
    op: ClassVar[str] = ""
    lossy: ClassVar[str] = ""
    needs_kernel: ClassVar[bool] = True
    across_autocast: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(type(self)) or self.name).splitlines()[0]

    def anchors(self, view: GraphView) -> Iterable[Node]:
        """The nodes that the pattern is tried on: the candidates of its kind."""
        return view.candidates(self.kind)

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        """Recognises the pattern at `anchor`.

        Returns:
            The match, or None when the pattern has nothing to do with this site.

        Raises:
            Miss: when the site is one of the pattern's, but not recognised; the reason goes to the report.
        """
        raise NotImplementedError(f"{type(self).__name__}.match")

    def check(self, match: Match, options: Options) -> str | None:
        """Why a recognised site is better left to Inductor (device, shape, profit), or None to go on.

        With `options.kernels == "reference"` only what the reference cannot do counts.
        """
        return None

    def settle(self, match: Match, options: Options) -> Match:
        """The match after `check`: with the `op` and `note` of the replacement, where the pattern has several."""
        return match

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        """Emits the replacement with `builder` and returns, for each of `match.replaced`, its new node."""
        raise NotImplementedError(f"{type(self).__name__}.rewrite")

    def spellings(self) -> Iterator[Example]:
        """Models on which the pattern must fire and agree with the unfused graph."""
        return iter(())

    def near_misses(self) -> Iterator[Example]:
        """Models that look alike and on which the pattern must not fire, or must still agree."""
        return iter(())
