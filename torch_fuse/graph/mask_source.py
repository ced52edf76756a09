"""Masks that are no choice of keys by positions or padding: what makes them biases, or choices that the model makes."""

from __future__ import annotations

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.score_bias import constant, excluded_value, is_moderate
from torch_fuse.graph.values import tensor

_LEARNED = {"linear", "matmul", "bmm", "baddbmm", "einsum", "embedding", "topk", "conv1d", "softmax"}
_MOVES = {
    "cast", "contiguous", "clone", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze",
    "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "getitem",
}  # fmt: skip


def learned_source(mask: Node) -> str | None:
    """The product, lookup or selection of data that a mask is computed with; None when there is none.

    Such a mask is a bias or a choice of keys that the model makes, whatever the positions.
    """
    pending, seen = [mask], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_method") and name in _LEARNED:
            return name
        pending += node.all_input_nodes
    return None


def bias_source(mask: Node, order: Order, before: Node) -> Node | None:
    """The bias of moderate numbers (ALiBi, say) that an additive mask adds to scores that it keeps, or None."""
    found = tensor(mask)
    call = call_of(mask)
    if found is None or not found.dtype.is_floating_point or constant(mask) is not None:
        return None
    if excluded_value(mask) is None and is_moderate(mask, order, before):
        return None if _of_conditions(mask) else mask
    if call is None or call.inplace:
        return None
    sides = {"add": ("input", "other"), "where": ("input", "other"), "masked_fill": ("input",)}.get(call.op, ())
    sides = ("input",) if call.op in _MOVES else sides
    parts = [call[name] for name in sides if isinstance(call[name], Node)]
    return next((bias for part in parts if (bias := bias_source(part, order, before)) is not None), None)


def _of_conditions(node: Node) -> bool:
    """Whether a value is computed of truth values: the ones of an inverted mask are those that it then fills."""
    pending, seen = [node], set[Node]()
    while pending:
        current = pending.pop()
        found = tensor(current)
        if found is not None and found.dtype == torch.bool:
            return True
        seen.add(current)
        pending += [source for source in current.all_input_nodes if source not in seen]
    return False
