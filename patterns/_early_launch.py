"""Whether a launch that streams weights may begin before the launch before it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import storages


def may_launch_early(order: Order, constants: Sequence[Node], activation: Node) -> bool:
    """Whether `constants` can be read before the launch in front of an op has ended.

    They can when they are inputs that the graph does not write to, and a launch of this graph computes `activation`
    before the op: what came before the graph has ended by then. Ops of this package that launch early wait for
    the one before them before they let the next begin, so no launch overlaps with more than its neighbour.
    """
    inputs = [node for node in order.nodes if node.op in ("placeholder", "get_attr")]
    if any(node.op not in ("placeholder", "get_attr") for node in constants):
        return False
    given = set().union(*(storages(node) for node in inputs)) if inputs else set()
    if not storages(activation) or storages(activation) & given:
        return False
    try:
        order.check_unwritten(list(constants), len(order.nodes))
    except Miss:
        return False
    return True
