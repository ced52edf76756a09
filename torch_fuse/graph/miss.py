"""A refusal that carries its reason: recognisers and patterns raise it instead of returning False."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch.fx import Node


class Miss(Exception):
    """The subgraph is not what was looked for.

    Attributes:
        reason: what was expected and what was seen, in the words of the report.
        node: where it was seen, or None.
        depth: how far the match had come; the report shows the deepest miss.
        status: what the report calls the site.
    """

    status: ClassVar[Literal["kept", "missed"]] = "missed"

    def __init__(self, reason: str, node: Node | None = None, depth: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.depth = depth


class Kept(Miss):
    """The subgraph was recognised, and is better left as it is: the report says "kept" instead of "missed"."""

    status = "kept"
