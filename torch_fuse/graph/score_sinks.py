"""Recogniser: the column of sinks that is joined to attention scores, and the row's maximum that is subtracted."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.index_views import DIM, Views
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, keeps_reals, tensor

_SINK = sympy.Function("sink")


def joined_sinks(call: Call, found: torch.Tensor) -> tuple[Node, Node, frozenset[Node]] | None:
    """(scores, sinks [H], the nodes between) of a `cat` of scores [B, H, S_q, S_k] and a column that repeats sinks."""
    parts = call["tensors"]
    last = found.dim() - 1
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or call["dim"] not in (-1, last) or found.dim() != 4:
        return None
    scores, column = parts
    x, y = tensor(scores), tensor(column)
    if x is None or y is None or x.dim() != 4 or not equal(y.shape[-1], 1):
        return None
    views = _PerHead()
    try:
        element = views.trace(column)
    except Miss:
        return None
    heads = found.shape[1]
    if views.sinks is None or not equal(tensor(views.sinks).shape[0], heads):  # type: ignore[union-attr]
        return None
    of_its_head = element == _SINK(DIM[1]) or (equal(heads, 1) and element == _SINK(0))
    return (scores, views.sinks, frozenset(views.nodes)) if of_its_head else None


class _PerHead(Views):
    """Which element of a 1-D tensor each element of a view of it is."""

    def __init__(self) -> None:
        self.sinks: Node | None = None
        self.nodes: set[Node] = set()

    def trace(self, node: Any) -> Any:
        """The element at (d0, d1, ...). Raises Miss for anything but views, casts and copies of one 1-D tensor."""
        found, call = tensor(node), call_of(node)
        if found is not None and found.dim() == 1:
            self.sinks = node
            return _SINK(DIM[0])
        handler = None if call is None or call.inplace else getattr(self, f"_{call.op}", None)
        if found is None or handler is None:
            raise Miss("the column is no view of one number a head", node)
        self.nodes.add(node)
        return handler(node, call, found)

    def _cast(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        before = tensor(call["input"])
        if before is None or not keeps_reals(before, found):
            raise Miss("the column is cast", node)
        return self.trace(call["input"])

    _contiguous = _clone = _cast

    def _repeat(self, node: Node, call: Call, found: torch.Tensor) -> Any:
        source, times = tensor(call["input"]), call["repeats"]
        if source is None or len(times) != source.dim():
            raise Miss("the column is repeated in more dimensions", node)
        by_index = {}
        for d, size in enumerate(source.shape):
            if equal(size, 1):
                by_index[DIM[d]] = sympy.Integer(0)
            elif times[d] != 1:
                raise Miss("the heads are repeated", node)
        return self.trace(call["input"]).subs(by_index, simultaneous=True)


def drops_last_column(node: Node, call: Call) -> bool:
    """Whether a slice leaves out the last column, and nothing else."""
    before, after = tensor(call.args.get("input")), tensor(node)
    if before is None or after is None or before.dim() != after.dim():
        return False
    if not equal(after.shape[-1] + 1, before.shape[-1]):
        return False
    if call.op == "narrow":
        return call["dim"] in (-1, before.dim() - 1) and call["start"] == 0
    index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
    *others, last = index
    spelled_out = Ellipsis in others or len(index) == before.dim()
    whole = all(part is Ellipsis or part == slice(None) for part in others)
    return spelled_out and whole and isinstance(last, slice) and last.start in (None, 0) and last.step in (None, 1)


def row_maximum(node: Any, scores: Any) -> set[Node] | None:
    """The nodes that compute the maximum of each row of `scores`, or None when `node` is something else.

    What is subtracted from a whole row changes neither its softmax nor the gradient.
    """
    nodes: set[Node] = set()
    while isinstance(node, Node) and _passes_on(node):
        nodes.add(node)
        node = node.args[0]
    if not isinstance(node, Node) or not node.args or node.args[0] is not scores:
        return None
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    found = tensor(scores)
    if name not in ("max", "amax") or found is None:
        return None
    names = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    dim = names.get("dim")
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if dim not in (-1, found.dim() - 1) or names.get("keepdim") is not True:
        return None
    return nodes | {node}


def _passes_on(node: Node) -> bool:
    """Whether it is the maximum that is taken out of (maximum, index), or detached from the gradients."""
    if node.op == "call_method":
        return node.target == "detach"
    if node.op != "call_function" or len(node.args) < 1:
        return False
    taken = node.args[1:] in ((0,), ("values",)) and node.target in (operator.getitem, getattr)
    return taken or node.target is torch.detach
