"""Recogniser: x @ W.T + b, as `linear`, `matmul` with a transposed weight, `addmm` (Conv1D) or with a later bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.values import same_shape, tensor


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        node: the result [..., out_features].
        input: [..., in_features].
        weight: [out_features, in_features], or [in_features, out_features] when `transposed`.
        bias: [out_features], or None.
        transposed: the weight is stored with in_features first.
        nodes: the product and, where the bias is added later, the sum.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    nodes: frozenset[Node]


# What a value may pass on its way from or to a linear layer.
_VIEWS = ("view", "reshape", "flatten", "contiguous")


def match_linear(node: Node) -> Linear | None:
    """Recognises a linear layer whose result is `node`; None for anything else."""
    call = call_of(node)
    if call is None:
        return None
    if call.op == "linear":
        return Linear(node, call["input"], call["weight"], call["bias"], False, frozenset({node}))
    if call.op == "addmm" and call["beta"] == 1 and call["alpha"] == 1:
        return _product(node, call["mat1"], call["mat2"], call["input"])
    if call.op == "matmul":
        return _product(node, call["input"], call["other"], None)
    if call.op == "add" and call["alpha"] == 1:
        for bias, product in ((call["other"], call["input"]), (call["input"], call["other"])):
            vector = tensor(bias)
            if vector is None or vector.dim() != 1 or not isinstance(product, Node):
                continue
            inner = match_linear(product)
            if inner is None or inner.bias is not None or len(product.users) != 1:
                continue
            if same_shape(tensor(product).shape, tensor(node).shape):  # type: ignore[union-attr]
                return Linear(node, inner.input, inner.weight, bias, inner.transposed, inner.nodes | {node})
    return None


def _product(node: Node, x: Any, weight: Any, bias: Any) -> Linear | None:
    matrix = tensor(weight)
    if matrix is None or matrix.dim() != 2 or tensor(x) is None:
        return None
    bias = bias if isinstance(bias, Node) else None
    original = transposed_source(weight)
    if original is not None:
        return Linear(node, x, original, bias, False, frozenset({node}))
    if weight.op in ("placeholder", "get_attr"):
        return Linear(node, x, weight, bias, True, frozenset({node}))
    return None


def from_linear(node: Node, readers: frozenset[Node]) -> tuple[Linear, tuple[Node, ...]] | None:
    """The linear layer whose result a value is, and the views in between, in the graph's order.

    None when there is none, or when anything but `readers` uses one of these values for more than its dtype.
    """
    views: list[Node] = []
    while all(user in readers or _reads_only_dtype(user, node) for user in node.users):
        linear = match_linear(node)
        if linear is not None:
            return linear, tuple(reversed(views))
        call = call_of(node)
        if call is None or call.inplace or call.op not in _VIEWS or not isinstance(call["input"], Node):
            return None
        views.append(node)
        node, readers = call["input"], frozenset({node})
    return None


def _reads_only_dtype(user: Node, node: Node) -> bool:
    """Whether `user` is `y.type_as(node)`."""
    call = call_of(user)
    return call is not None and call.op == "cast" and call["input"] is not node


def into_linears(node: Node) -> bool:
    """Whether all that reads a value are linear layers, behind views and what changes nothing."""
    return bool(node.users) and all(_is_linear_of(user, node) or _passes(user, node) for user in node.users)


def _is_linear_of(user: Node, node: Node) -> bool:
    linear = match_linear(user)
    return linear is not None and linear.input is node and node not in (linear.weight, linear.bias)


def _passes(user: Node, node: Node) -> bool:
    call = call_of(user)
    if call is None or call.inplace or call.args.get("input") is not node:
        return False
    if call.op == "dropout" and call["training"] is not False and call["p"] != 0:
        return False
    before, after = tensor(node), tensor(user)
    if call.op == "cast" and (before is None or after is None or before.dtype != after.dtype):
        return False
    return call.op in (*_VIEWS, "cast", "dropout") and into_linears(user)


def transposed_source(node: Any) -> Node | None:
    """x of x.T, x.t(), x.transpose(-1, -2), x.permute(1, 0) for a matrix, or with leading dimensions kept."""
    found = tensor(node)
    call = call_of(node)
    if call is None and isinstance(node, Node) and node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        is_attribute = "getattr" in name and node.args[1:] and node.args[1] in ("T", "mT")
        if is_attribute or node.target is torch.ops.aten.mT:  # `x.mT`, which torch 2.15 traces as an operator
            return node.args[0] if isinstance(node.args[0], Node) else None
    if call is None or found is None:
        return None
    ndim = found.dim()
    if call.op in ("t", "numpy_T"):
        return call["input"] if ndim == 2 else None
    if call.op == "transpose":
        dims = {call["dim0"] % ndim, call["dim1"] % ndim}
        return call["input"] if dims == {ndim - 1, ndim - 2} else None
    if call.op == "permute":
        dims_list = [d % ndim for d in call["dims"]]
        expected = [*range(ndim - 2), ndim - 1, ndim - 2]
        return call["input"] if dims_list == expected else None
    return None
