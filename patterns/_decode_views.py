"""What a view shows, element by element: found by running the graph's own views on numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import static_int, tensor, value

VIEWS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "select", "narrow",
         "getitem", "chunk", "split", "unbind", "contiguous", "clone"}  # fmt: skip
MOST_VIEWS = 16


def straight(node: Node, source: Node) -> set[Node] | None:
    """The nodes behind `source` up to `node`, when they only give its elements another shape, in their order."""
    nodes: set[Node] = set()
    try:
        source_of(node, lambda below: below is source, nodes)
    except Miss:
        return None
    return nodes - {source}


def source_of(node: Node, ends: Callable[[Node], bool], nodes: set[Node]) -> Node:
    """What `node` is a view of, with all elements in the same order."""
    source, elements = replayed(node, ends, nodes)
    if not torch.equal(elements.flatten(), torch.arange(value(source).numel(), device="cpu")):
        raise Miss(f"{node.name} has the elements of {source.name} in another order", node)
    return source


def replayed(node: Node, ends: Callable[[Node], bool], nodes: set[Node]) -> tuple[Node, torch.Tensor]:
    """Which elements of what it is a view of a value has: found by running the views on their numbers."""
    chain: list[Node] = []
    source = node
    while not ends(source):
        call = call_of(source)
        below = None if call is None or call.inplace or len(chain) == MOST_VIEWS else call.args.get("input")
        if call is None or not isinstance(below, Node) or not (call.op in VIEWS or _changes_nothing(source)):
            raise Miss(f"{source.name} is no view of what the op before it computes", source)
        chain.append(source)
        source = below
    found = tensor(source)
    assert found is not None
    shape = [static_int(size) for size in found.shape]
    if None in shape:
        raise Miss(f"{source.name} has a size that is not static", source)
    elements: Any = torch.arange(found.numel(), device="cpu").reshape(shape)  # type: ignore[arg-type]
    for step in reversed(chain):
        elements = elements if _changes_nothing(step) else _replay(step, elements)
    nodes |= {source, *chain}
    return source, elements


def _changes_nothing(node: Node) -> bool:
    """Whether a node is a dropout that drops nothing, or a cast to the type that there is."""
    call = call_of(node)
    if call is None or call.inplace or call.op not in ("dropout", "cast"):
        return False
    if call.op == "dropout":
        return call["training"] is False or call["p"] == 0
    before, after = tensor(call["input"]), tensor(node)
    return before is not None and after is not None and (before.dtype, before.device) == (after.dtype, after.device)


def _replay(node: Node, elements: Any) -> Any:
    call = call_of(node)
    assert call is not None

    def given(other: Node) -> Any:
        number = elements if other is call["input"] else static_int(value(other))
        if number is None:
            raise Miss(f"{node.name} is a view with a size that is not static", node)
        return number

    args, kwargs = map_arg((node.args, node.kwargs), given)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
