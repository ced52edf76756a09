"""What lies in memory whatever is fused: results of products and attention, inputs, and their views.

An op of our own reads its inputs from memory. Where Inductor would have computed one of them inside the kernel that
reads it, the op costs a write and a read more.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.linear import match_linear
from torch_fuse.graph.values import storages, tensor

_PRODUCTS = {"linear", "matmul", "addmm", "scaled_dot_product_attention"}
_OTHER_PRODUCTS = {"baddbmm", "conv1d", "conv2d", "conv3d", "einsum", "bilinear"}
_VIEWS = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "select", "narrow",
          "getitem", "chunk", "split", "unbind", "expand", "t", "contiguous", "cast"}  # fmt: skip


def in_memory(node: Node) -> bool:
    """Whether a value is in memory anyway."""
    while True:
        if node.op in ("placeholder", "get_attr"):
            return True
        if _is_product(node) or match_linear(node) is not None:
            return True
        source = _viewed(node)
        if source is None:
            return False
        node = source


def _is_product(node: Node) -> bool:
    """Whether an operator with a kernel of its own computes it: a matrix product, attention, a custom op."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    call = call_of(node)
    if call is not None:
        return call.op in _PRODUCTS and not call.inplace
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    module = getattr(target, "__module__", None) or ""
    return getattr(target, "__name__", "") in _OTHER_PRODUCTS or module.startswith("torch_fuse.kernels")


def _viewed(node: Node) -> Node | None:
    """What a view shows, or a dropout that drops nothing passes on."""
    call = call_of(node)
    if call is None or call.inplace:
        return None
    source = call.args.get("input")
    if not isinstance(source, Node):
        return None
    if call.op == "dropout":
        return source if call["training"] is False or call["p"] == 0 else None
    same_memory = bool(storages(node) & storages(source))
    return source if call.op in _VIEWS and same_memory else None


def read_from_memory(node: Node, depth: int = 8) -> bool:
    """Whether something reads a value that only memory can give it: a product, a custom op, the graph's caller."""
    for user in node.users:
        if user.op == "output" or _is_product(user):
            return True
        linear = match_linear(user)
        if linear is not None and linear.input is node:
            return True
        if depth and tensor(user) is not None and _viewed(user) is node and read_from_memory(user, depth - 1):
            return True
    return False
