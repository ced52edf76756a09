"""Recogniser: a key or value that has just been appended to a cache."""

from __future__ import annotations

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.values import tensor


def appended(node: Node, order: Order, before: Node) -> Node:
    """The new part of a cached key or value, as `before` reads it; `node` itself when there is no cache.

    Spellings: `cat([past, new], 2)`, `cache.index_copy_(2, position, new)`, `cache[:, :, position] = new`.
    """
    call = call_of(node)
    found = tensor(node)
    if found is None or found.dim() != 4:
        return node
    if call is not None and call.op == "cat":
        parts = call["tensors"]
        if isinstance(parts, (list, tuple)) and len(parts) == 2 and call["dim"] in (2, -2) and _is_input(parts[0]):
            return parts[1]
        return node
    if call is not None and call.op == "index_copy":
        return call["source"] if call["dim"] in (2, -2) else node
    if node.op not in ("placeholder", "get_attr"):
        return node
    writes = []
    for user in node.users:
        write = call_of(user)
        if write is None or order.index[user] > order.index[before]:
            continue
        if write.op == "index_copy" and write.inplace and write["input"] is node:
            writes.append(write["source"])
        elif write.op == "setitem" and write["input"] is node:
            writes.append(write["value"])
    return writes[0] if len(writes) == 1 and tensor(writes[0]) is not None else node


def _is_input(node: object) -> bool:
    """Whether a value comes from outside the graph, but for views."""
    while (call := call_of(node)) is not None and call.op in ("view", "reshape", "transpose", "getitem", "cast"):
        node = call["input"]
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")
