"""Recogniser: a key or value that has just been appended to a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order, mutated
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import static_int, storages, tensor


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


@dataclass(frozen=True)
class Append:
    """New tokens that are written into a static cache in place, and then read along with the whole cache.

    Attributes:
        cache: [B, H_kv, S_max, head_dim].
        source: the new tokens [B, H_kv, S_new, head_dim].
        positions: where they go, [S_new] integers.
        write: the node that writes.
    """

    cache: Node
    source: Node
    positions: Node
    write: Node


@dataclass(frozen=True)
class Counter:
    """Positions that are counted on the device: arange(n) + length, and then length += n.

    Attributes:
        length: the number of tokens in the cache, an integer tensor without dimensions.
        advance: the node that adds n to it.
        nodes: the nodes of the positions and of the addition.
    """

    length: Node
    advance: Node
    nodes: frozenset[Node]


def match_append(node: Node, order: Order, before: Node) -> Append:
    """The write into a static cache whose result `before` reads as `node`.

    Spelling: `cache.index_copy_(2, positions, new)`, read as the cache or as the call's result.

    Raises:
        Miss: with the reason why `node` is no static cache, or not one with a single write that nothing else sees.
    """
    call = call_of(node)
    cache = call["input"] if call is not None and call.op == "index_copy" and call.inplace else node
    if not isinstance(cache, Node) or cache.op not in ("placeholder", "get_attr"):
        raise Miss(f"{node.name} is no input of the graph that is written in place", node)
    found, at = storages(cache), order.index[before]
    writes = [w for w in order.writers if order.index[w] < at and any(storages(m) & found for m in mutated(w))]
    if len(writes) != 1:
        raise Miss(f"{cache.name} is written {len(writes)} times before it is read", cache)
    call = call_of(writes[0])
    if call is None or call.op != "index_copy" or not call.inplace or call["input"] is not cache:
        raise Miss(f"{cache.name} is written by {writes[0].name}, not by index_copy_", writes[0])
    source, positions = tensor(call["source"]), tensor(call["index"])
    if call["dim"] not in (2, -2) or source is None or positions is None or source.dim() != 4 or positions.dim() != 1:
        raise Miss(f"{writes[0].name} does not write tokens of [B, H, S, head_dim]", writes[0])
    return Append(cache, call["source"], call["index"], writes[0])


def match_counter(positions: Node, order: Order, before: Node) -> Counter | None:
    """Recognises positions that are counted on the device; None when they are not, or something else reads the count.

    Inductor might compute that other value after an op has counted, see `define_op`.
    """
    call, found = call_of(positions), tensor(positions)
    if call is None or call.op != "add" or call.inplace or call["alpha"] != 1 or found is None:
        return None
    for steps, length in ((call["input"], call["other"]), (call["other"], call["input"])):
        if not isinstance(length, Node) or length.op not in ("placeholder", "get_attr") or not _counts(steps):
            continue
        shown, number = tensor(length), static_int(found.shape[0])
        if shown is None or shown.dim() != 0 or shown.dtype != torch.int64 or number is None:
            continue
        if shown.device != found.device:  # it may be on the CPU, where no kernel reads it
            continue
        writes = [w for w in order.writers if any(storages(m) & storages(length) for m in mutated(w))]
        add = call_of(writes[0]) if len(writes) == 1 else None
        if add is None or add.op != "add" or not add.inplace or add["input"] is not length or writes[0].users:
            continue
        if add["other"] != number or add["alpha"] != 1:
            continue
        if not order.index[positions] < order.index[writes[0]] < order.index[before]:
            continue
        nodes = frozenset({positions, steps, writes[0]})
        if set(readers_before(storages(length), order, before)) - nodes:
            continue
        return Counter(length, writes[0], nodes)
    return None


def _counts(node: object) -> bool:
    """Whether a node is arange(n): 0, 1, 2, ..."""
    if not isinstance(node, Node) or node.target is not torch.arange or len(node.args) != 1:
        return False
    return not set(node.kwargs) - {"device", "dtype"}


def readers_before(found: set[StorageWeakRef], order: Order, before: Node) -> list[Node]:
    """The nodes in front of another that read or write any of the storages `found`."""
    return [
        node
        for node in order.nodes[: order.index[before]]
        if any(storages(source) & found for source in node.all_input_nodes)
    ]
