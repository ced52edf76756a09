"""The activation behind a linear layer, for kernels that compute it in their epilogue."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from torch_fuse.graph.activation import gelus
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order

_MOST_STEPS = 24  # of a written-out GELU


def gelu_behind(node: Node, before: Collection[Node], order: Order) -> tuple[Node, str, frozenset[Node]] | None:
    """(result, name, nodes) of the GELU of a layer's result that nothing else reads; the name as the ops take it.

    Args:
        node: the layer's result.
        before: the nodes of the layer.
        order: the graph's.
    """
    ahead: dict[Node, None] = {}
    pending = [node]
    while pending and len(ahead) < _MOST_STEPS:
        for user in pending.pop(0).users:
            if user not in ahead and user in order.index:
                ahead[user] = None
                pending.append(user)
    for gelu in gelus(sorted(ahead, key=order.index.__getitem__)):
        inside = {node, *before, *gelu.nodes}
        if gelu.input is not node or any(u not in inside for n in {node, *gelu.nodes} - {gelu.node} for u in n.users):
            continue
        return gelu.node, "gelu" if gelu.approximate == "none" else "gelu_tanh", gelu.nodes
    return None


def activation_behind(node: Node, before: Collection[Node], order: Order) -> tuple[Node, str, frozenset[Node]] | None:
    """The same for GELU and SiLU."""
    call = call_of(next(iter(node.users))) if len(node.users) == 1 else None
    if call is not None and call.op == "silu" and not call.inplace:
        (silu,) = node.users
        return silu, "silu", frozenset({silu})
    return gelu_behind(node, before, order)
