"""Recogniser: adaLN modulation, norm(x) * (1 + scale) + shift, from the norm's result on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.values import equal, tensor


@dataclass(frozen=True)
class Modulation:
    """h * (1 + scale) + shift.

    Attributes:
        node: the result.
        scale: broadcasts to h.
        shift: broadcasts to h, or None.
        nodes: all nodes from h (without it) to the result.
    """

    node: Node
    scale: Node
    shift: Node | None
    nodes: frozenset[Node]


def match_modulation(h: Node) -> Modulation | None:
    """Recognises the modulation of `h`, when nothing else reads it."""
    nodes: set[Node] = set()
    source = h
    while (cast := only_cast(source)) is not None:
        source = cast
        nodes.add(cast)
    user = sole_user(source)
    call = call_of(user)
    if user is None or call is None or call.inplace:
        return None
    if call.op == "addcmul" and call["value"] == 1:
        scale = _other(call, source, "tensor1", "tensor2", nodes)
        shift = call["input"]
        if scale is None or shift is source or not broadcasts(shift, h):
            return None
        return Modulation(user, scale, shift, frozenset(nodes | {user}))
    if call.op != "mul":
        return None
    scale = _other(call, source, "input", "other", nodes)
    if scale is None:
        return None
    nodes.add(user)
    following = sole_user(user)
    call = call_of(following)
    if following is not None and call is not None and call.op == "add" and not call.inplace and call["alpha"] == 1:
        shift = call["other"] if call["input"] is user else call["input"]
        if shift is not user and broadcasts(shift, h):
            return Modulation(following, scale, shift, frozenset(nodes | {following}))
    return Modulation(user, scale, None, frozenset(nodes))


def sole_user(node: Node) -> Node | None:
    """The only reader of a value, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def only_cast(node: Node) -> Node | None:
    """The cast between floating-point types that is the only reader of a value, or None."""
    user = sole_user(node)
    call = call_of(user)
    if user is None or call is None or call.op != "cast" or call["input"] is not node:
        return None
    return user if strip_casts(user) is not user else None


def broadcasts(factor: Any, to: Node) -> bool:
    """Whether a tensor broadcasts to another's shape, without a guard; its last size is 1 or the other's."""
    small, large = tensor(factor), tensor(to)
    if small is None or large is None or small.dim() > large.dim() or not small.dtype.is_floating_point:
        return False
    sizes = zip(small.shape[::-1], large.shape[::-1], strict=False)
    return small.device == large.device and all(equal(a, 1) or equal(a, b) for a, b in sizes)


def _other(call: Call, source: Node, first: str, second: str, nodes: set[Node]) -> Node | None:
    """scale, where one factor is `source` and the other 1 + scale."""
    for name, other in ((first, second), (second, first)):
        if call[name] is not source or call[other] is source:
            continue
        summed = strip_casts(call[other], nodes)
        inner = call_of(summed)
        if inner is None or inner.op != "add" or inner.inplace or inner["alpha"] != 1:
            return None
        for one, scale in ((inner["input"], inner["other"]), (inner["other"], inner["input"])):
            if isinstance(one, (int, float)) and one == 1 and broadcasts(scale, source):
                nodes.add(summed)
                return scale
    return None
