"""A refusal that carries its reason: recognisers and patterns raise it instead of returning False."""

from __future__ import annotations

from torch.fx import Node


class Miss(Exception):
    """The subgraph is not what was looked for.

    Attributes:
        reason: what was expected and what was seen, in the words of the report.
        node: where it was seen, or None.
        depth: how far the match had come; the report shows the deepest miss.
    """

    def __init__(self, reason: str, node: Node | None = None, depth: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.depth = depth
