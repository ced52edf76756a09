"""Recogniser: consecutive lanes of another value's last dimension, unchanged."""

from __future__ import annotations

import torch
from torch.fx import Node

from torch_fuse.graph.effects import Order
from torch_fuse.graph.lane_terms import leaf_and_lane
from torch_fuse.graph.lanes import LaneTrace


def match_slice(node: Node, order: Order, source: Node) -> tuple[int, frozenset[Node]] | None:
    """Recognises consecutive lanes of `source`, unchanged: (first lane, the nodes in between), or None.

    Raises:
        Miss: when the lanes of `node` are not understood.
    """
    trace = LaneTrace(order, lambda n: n is source)
    terms = trace.trace(node)
    if trace.leaves != [source] or len(terms) != 1 or node is source:
        return None
    term = terms[0]
    _, lanes = leaf_and_lane(term.a)
    first = int(lanes[0])
    same = bool((lanes == first + torch.arange(len(lanes))).all())
    if not same or bool((term.b != 0).any()) or bool((term.sign != 1).any()):
        return None
    return first, frozenset(trace.nodes)
