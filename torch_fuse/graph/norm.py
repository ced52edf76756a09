"""Recogniser: LayerNorm and RMSNorm over the last dimension, as a call or written out.

RMSNorm: y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset); LayerNorm subtracts the mean first and may add a
bias. Written-out norms differ in where they cast, in the weight's offset (Gemma's 1 + w) and in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.values import equal, keeps_reals, static_int, tensor, value


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension of `input`.

    Attributes:
        node: the result.
        kind: "rms" or "layer".
        input: what is normalised, before any cast inside the norm.
        weight: the weight, or None; it may have more than one dimension (one for each head, say).
        bias: the bias, or None.
        eps: the epsilon under the square root; None when it is PyTorch's default or not a constant.
        weight_offset: 1.0 where the norm multiplies by 1 + weight.
        nodes: all nodes from the input to the result.
    """

    node: Node
    kind: Literal["rms", "layer"]
    input: Node
    weight: Node | None
    bias: Node | None
    eps: float | None
    weight_offset: float
    nodes: frozenset[Node]


def match_norm(node: Node) -> Norm | None:
    """Recognises a norm whose result is `node`; None for anything else."""
    call = call_of(node)
    if call is None or call.inplace:
        return None
    if call.op in ("layer_norm", "rms_norm"):
        return _called(node, call)
    return _written_out(node)


def strip_casts(node: Any, seen: set[Node] | None = None) -> Any:
    """Looks through casts between floating-point types; the nodes looked through are added to `seen`."""
    while True:
        call = call_of(node)
        if call is None or call.op != "cast" or call.inplace:
            return node
        before, after = tensor(call["input"]), tensor(node)
        if before is None or after is None or not keeps_reals(before, after):
            return node
        if seen is not None:
            seen.add(node)
        node = call["input"]


def _called(node: Node, call: Call) -> Norm | None:
    shape = call["normalized_shape"]
    if not isinstance(call["input"], Node) or not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return None
    eps = call["eps"]
    if not isinstance(eps, (int, float)):
        eps = None
    seen = {node}
    source = strip_casts(call["input"], seen)
    kind: Literal["rms", "layer"] = "layer" if call.op == "layer_norm" else "rms"
    weight = _tensor_or_none(strip_casts(call["weight"], seen))
    bias = _tensor_or_none(strip_casts(call.args.get("bias"), seen))
    return Norm(node, kind, source, weight, bias, None if eps is None else float(eps), 0.0, frozenset(seen))


def _tensor_or_none(node: Any) -> Node | None:
    return node if isinstance(node, Node) else None


def _written_out(node: Node) -> Norm | None:
    """[cast] [(1 +) weight *] [cast] (x [- mean]) * rsqrt(mean((x [- mean])^2) + eps)"""
    seen = {node}
    inner = strip_casts(node, seen)
    call = call_of(inner)
    if call is None or call.inplace or call.op not in ("mul", "div"):
        return None
    if (core := _normalised(inner, seen)) is not None:
        return Norm(node, core[0], core[1], None, None, core[2], 0.0, frozenset(seen | core[3] | {inner}))
    if call.op != "mul":
        return None
    for weight, other in ((call["input"], call["other"]), (call["other"], call["input"])):
        used = {inner, *seen}
        found = strip_casts(other, used)
        core = _normalised(found, used)
        if core is None:
            continue
        scale = _weight(weight, core[1], used)
        if scale is not None:
            return Norm(node, core[0], core[1], scale[0], None, core[2], scale[1], frozenset(used | core[3]))
    return None


def _weight(node: Any, source: Node, seen: set[Node]) -> tuple[Node, float] | None:
    """The weight and its offset: w, 1 + w or w + 1, with casts; it may not depend on more than trailing sizes."""
    node = strip_casts(node, seen)
    call = call_of(node)
    offset = 0.0
    if call is not None and call.op == "add" and call["alpha"] == 1 and not call.inplace:
        for number, other in ((call["input"], call["other"]), (call["other"], call["input"])):
            if isinstance(number, (int, float)) and isinstance(other, Node):
                seen.add(node)
                offset, node = float(number), strip_casts(other, seen)
                break
    weight, normalised = tensor(node), tensor(source)
    if weight is None or normalised is None or not 1 <= weight.dim() < normalised.dim():
        return None
    return (node, offset) if equal(weight.shape[-1], normalised.shape[-1]) else None


def _normalised(node: Any, seen: set[Node]) -> tuple[Literal["rms", "layer"], Node, float | None, set[Node]] | None:
    """x * rsqrt(variance + eps), x / sqrt(variance + eps): (kind, x before centring and casts, eps, nodes)."""
    call = call_of(node)
    if call is None or call.inplace or call.op not in ("mul", "div"):
        return None
    orders = [(call["input"], call["other"])]
    if call.op == "mul":
        orders.append((call["other"], call["input"]))
    for x, factor in orders:
        nodes = {node}
        variance = _under_root(factor, reciprocal=call.op == "mul", nodes=nodes)
        if variance is None:
            continue
        squared = _mean(variance[0], nodes)
        root = None if squared is None else _square(squared, nodes)
        if root is None:
            continue
        x = strip_casts(x, nodes)
        centred_x, centred_root = _centred(x, nodes), _centred(strip_casts(root, nodes), nodes)
        if centred_x is not None and centred_x is centred_root:
            return "layer", centred_x, variance[1], nodes
        if centred_x is None and centred_root is None and x is strip_casts(root, nodes):
            return ("rms", x, variance[1], nodes) if isinstance(x, Node) else None
    return None


def _under_root(node: Any, reciprocal: bool, nodes: set[Node]) -> tuple[Any, float | None] | None:
    """(variance, eps) of rsqrt(variance + eps), of pow(variance + eps, -0.5) or, under a division, of its root."""
    node = strip_casts(node, nodes)
    call = call_of(node)
    if call is None or call.inplace:
        return None
    exponent = -0.5 if reciprocal else 0.5
    rooted = call.op == ("rsqrt" if reciprocal else "sqrt")
    if not rooted and not (call.op == "pow" and call["exponent"] == exponent):
        return None
    nodes.add(node)
    summed = strip_casts(call["input"], nodes)
    call = call_of(summed)
    if call is None or call.op != "add" or call["alpha"] != 1 or call.inplace:
        return None
    nodes.add(summed)
    for eps, variance in ((call["other"], call["input"]), (call["input"], call["other"])):
        if isinstance(eps, (int, float)):
            return variance, float(eps)
        if isinstance(value(eps), torch.SymFloat):
            return variance, None
    return None


def _mean(node: Any, nodes: set[Node]) -> Any:
    """x of mean(x, -1, keepdim=True)."""
    node = strip_casts(node, nodes)
    call = call_of(node)
    if call is None or call.op != "mean" or call["keepdim"] is not True:
        return None
    source = tensor(call["input"])
    dim = call["dim"]
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    if source is None or len(dims) != 1 or dims[0] not in (-1, source.dim() - 1):
        return None
    nodes.add(node)
    return call["input"]


def _square(node: Any, nodes: set[Node]) -> Any:
    """x of x.pow(2), x * x or x.square()."""
    node = strip_casts(node, nodes)
    call = call_of(node)
    if call is None or call.inplace:
        return None
    nodes.add(node)
    if (call.op == "pow" and call["exponent"] == 2) or call.op == "square":
        return call["input"]
    if call.op == "mul" and call["input"] is call["other"]:
        return call["input"]
    return None


def _centred(node: Any, nodes: set[Node]) -> Any:
    """x of x - mean(x, -1, keepdim=True)."""
    call = call_of(node)
    if call is None or call.op != "sub" or call["alpha"] != 1 or call.inplace:
        return None
    steps = {node}
    source = strip_casts(call["input"], steps)
    averaged = _mean(call["other"], steps)
    if averaged is None or strip_casts(averaged, steps) is not source:
        return None
    nodes |= steps
    return source


def last_dim(norm: Norm) -> int | None:
    """Number of elements that are normalised together; None when symbolic."""
    found = tensor(norm.input)
    return None if found is None else static_int(found.shape[-1])


# What a written-out norm is made of, for the way from its input to its result.
_STEPS = ("cast", "mul", "div", "sub", "add", "pow", "square", "mean", "sqrt", "rsqrt", "layer_norm", "rms_norm")
_MOST_STEPS = 48


def norms_of(source: Node) -> list[Norm]:
    """The norms whose input is `source`, in the graph's order; of two in one another the outer.

    The outer is a norm of its own only where nothing but itself reads the inner one.
    """
    reached: dict[Node, None] = {source: None}
    pending = [source]
    found: dict[Node, Norm] = {}
    while pending and len(reached) < _MOST_STEPS:
        for user in pending.pop(0).users:
            call = call_of(user)
            if user in reached or call is None or call.inplace or call.op not in _STEPS:
                continue
            if call.op == "add" and tensor(call["input"]) is not None and tensor(call["other"]) is not None:
                continue  # an epsilon is a number
            reached[user] = None
            norm = match_norm(user)
            if norm is not None and norm.input is source:
                found[user] = norm
            if norm is None or call.op not in ("layer_norm", "rms_norm"):
                pending.append(user)
    outer = [
        norm
        for norm in found.values()
        if all(norm is other or norm.node not in other.nodes or len(norm.node.users) > 1 for other in found.values())
        and not any(inner in norm.nodes and len(inner.users) > 1 for inner in found if inner is not norm.node)
    ]
    return sorted(outer, key=lambda norm: norm.node)
