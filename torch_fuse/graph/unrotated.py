"""Whether a query or key without a recognised rotary embedding may have one that was not understood."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.norm import match_norm
from torch_fuse.graph.values import equal, tensor

# Operators that move or scale values, or change each by itself: nothing that they do is a rotation.
_NO_ROTATION = {
    "transpose", "permute", "view", "reshape", "unflatten", "flatten", "view_as", "reshape_as", "contiguous", "clone",
    "cast", "expand", "expand_as", "repeat", "unsqueeze", "repeat_interleave", "squeeze", "getitem", "chunk", "split",
    "tensor_split", "unbind", "select", "narrow", "dropout", "mul", "div", "zeros", "new_zeros", "gelu", "silu", "relu",
    "sigmoid", "tanh", "exp", "softmax", "neg", "masked_fill", "where",
}  # fmt: skip
_ENDS = {"linear", "matmul", "addmm", "layer_norm", "rms_norm", "scaled_dot_product_attention"}
_PROJECTIONS = ("conv", "einsum", "embedding", "baddbmm")


def not_understood(node: Node) -> Node | None:
    """What between a projection or norm and `node` could be a rotation that was not recognised; None if nothing."""
    pending, seen = [node], set[Node]()
    while pending:
        current = pending.pop()
        if current in seen or current.op in ("placeholder", "get_attr"):
            continue
        seen.add(current)
        call = call_of(current)
        if call is None:
            if current.target in (torch.tensor, torch.scalar_tensor):
                continue  # a constant
            name = getattr(current.target, "__name__", str(current.target))
            if not (name.startswith(_PROJECTIONS) or _is_ours(current)):
                return current
        elif call.op in _ENDS or match_norm(current) is not None:
            continue
        elif call.op in ("cat", "stack") and isinstance(call["tensors"], (list, tuple)):
            pending += [part for part in call["tensors"] if isinstance(part, Node)]
        elif call.op in ("empty", "empty_like", "new_empty"):
            stores = [user for user in current.users if user.target is operator.setitem and user.args[0] is current]
            pending += [user.args[2] for user in stores if isinstance(user.args[2], Node)]
        elif call.op == "add" and any(_is_bias(call[name]) for name in ("input", "other")):
            pending += [call[name] for name in ("input", "other") if not _is_bias(call[name])]
        elif call.op in _NO_ROTATION and not call.inplace:
            pending += [call.args[name] for name in ("input", "other") if _may_be_heads(call.args.get(name))]
        else:
            return current
    return None


def joins_samples(node: Node) -> bool:
    """Whether a query or key is stacked of samples that were selected one by one (Wan's first implementation)."""
    while (call := call_of(node)) is not None and call.op in _NO_ROTATION and isinstance(call.args.get("input"), Node):
        node = call["input"]
    return call is not None and call.op == "stack" and call["dim"] == 0 and isinstance(call["tensors"], (list, tuple))


def _is_ours(node: Node) -> bool:
    """Whether a node is an op that a rewrite has put there: another attention shares query or key."""
    module = getattr(node.target, "__module__", None) or ""
    return module.startswith("torch_fuse.") or str(node.target).startswith("torch_fuse.")


def _may_be_heads(node: object) -> bool:
    """Whether a node is a list of tensors, or a tensor that is more than a vector and no scale of whole heads."""
    found = tensor(node)
    return isinstance(node, Node) and (found is None or (found.dim() > 1 and not equal(found.shape[-1], 1)))


def _is_bias(node: object) -> bool:
    found = tensor(node)
    return found is None or found.dim() <= 1 or (isinstance(node, Node) and node.op in ("placeholder", "get_attr"))
