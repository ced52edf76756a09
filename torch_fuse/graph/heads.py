"""Recogniser: a query or key as attention reads it, traced back over layout, RoPE and norm to the projection."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import FakeTensorMode, no_guards
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.head_layout import Axes, ends_trace, replaceable, undone, walk_layout
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.norm import Norm, last_dim, match_norm, strip_casts
from torch_fuse.graph.rope import Rope, match_rope
from torch_fuse.graph.values import equal, same_shape, static_int, tensor, value

_VIEWS = ("transpose", "permute", "view", "reshape", "unflatten", "flatten")

Scope = Literal["head", "full"]


@dataclass(frozen=True)
class Heads:
    """Query or key heads.

    Attributes:
        result: the node to replace: the value that attention, or the cache before it, reads.
        result_axes: where batch, head, sequence and head_dim are in `result`.
        source: what is normalised and rotated, before any norm.
        views: the view calls to replay on `source`, in order, to get the value with the axes `axes`.
        axes: where batch, head, sequence and lanes are then.
        offset: first lane of the head in the last dimension.
        head_dim: number of lanes.
        rope: the rotary embedding, or None.
        norm: the norm before it, or None.
        scope: what the norm runs over: each head, or all heads of a token.
        nodes: all nodes from the source to the result.
        aside: why a norm before it is left outside, or "".
        as_one: `source` and `result` are [batch, sequence, num_heads * head_dim], normalised and rotated with lanes of
            all heads side by side: then there is one head with all of them, and the axes are those after unsqueeze(2).
    """

    result: Node
    result_axes: Axes
    source: Node
    views: tuple[Node, ...]
    axes: Axes
    offset: int
    head_dim: int
    rope: Rope | None
    norm: Norm | None
    scope: Scope
    nodes: frozenset[Node]
    aside: str = ""
    as_one: bool = False

    def sizes(self) -> list[Any]:
        """Batch, heads, sequence, lanes of a head."""
        shape = list(tensor(self.result).shape)  # type: ignore[union-attr]
        return [shape[0], 1, *shape[1:]] if self.as_one else [shape[axis] for axis in self.result_axes]

    def without_norm(self) -> Heads:
        """The same heads, with the norm left outside."""
        if self.norm is None:
            return self
        start = self.views[-1] if self.views else self.norm.node
        inside = {*self.views, *self.norm.nodes}
        return replace(self, source=start, views=(), norm=None, nodes=self.nodes - inside)


def match_heads(node: Node, order: Order, mode: FakeTensorMode | None, tables: Collection[Node] = ()) -> Heads:
    """Traces `node` [B, H, S, head_dim], a query or key, back to what it is computed of.

    Args:
        node: as attention reads it.
        order: positions of the graph's nodes.
        mode: the graph's fake mode.
        tables: tables of cosines and sines that the query was found to use, when tracing the key.

    Raises:
        Miss: when its last dimensions are not understood.
    """
    found = tensor(node)
    if found is None or found.dim() != 4:
        raise Miss(f"{node.name} has no batch, head, sequence and head_dim", node)
    chain, axes, rope = _rotation(node, (0, 1, 2, 3), order, tables)
    top = chain[-1][0]
    found = tensor(top)
    assert found is not None
    if rope is None and (merged := _all_heads_as_one(top, axes, order, tables)) is not None:
        return _with_norm(merged, mode) or merged
    source, offset, inside = top, 0, set[Node]()
    if rope is not None:
        source, offset, inside = rope.source, rope.offset, set(rope.nodes)
        if axes[3] != 3:
            raise Miss("the rotary embedding does not act on the head dimension", top)
    at = replaceable(chain, inside)
    result, result_axes = chain[at]
    inside |= {step for step, _ in chain[at:]}
    head_dim = static_int(found.shape[axes[3]])
    if head_dim is None:
        raise Miss("the head dimension is not static", node)
    heads = Heads(
        result, result_axes, source, (), axes, offset, head_dim, rope, None, "head",
        frozenset(inside if rope is not None else ()),
    )  # fmt: skip
    return _with_norm(heads, mode) or heads


def _all_heads_as_one(node: Node, axes: Axes, order: Order, tables: Collection[Node]) -> Heads | None:
    """The heads that `node` [B, S, H, D] cuts the lanes of a rotated [B, S, H * D] into (LTX-Video), or None."""
    call, found = call_of(node), tensor(node)
    source = None if call is None else tensor(call.args.get("input"))
    if call is None or call.op not in ("view", "reshape", "unflatten") or source is None or source.dim() != 3:
        return None
    width = static_int(source.shape[2])
    if axes != (0, 2, 1, 3) or width is None or not same_shape(source.shape[:2], found.shape[:2]):  # type: ignore[union-attr]
        return None
    try:
        rope = match_rope(call["input"], order, ends_trace, tables)
    except Miss:
        return None
    if rope is None:
        return None
    return Heads(
        rope.node, axes, rope.source, (), axes, rope.offset, width, rope, None, "head", rope.nodes | {rope.node},
        as_one=True,
    )  # fmt: skip


def _rotation(
    node: Node, axes: Axes, order: Order, tables: Collection[Node]
) -> tuple[list[tuple[Node, Axes]], Axes, Rope | None]:
    """The layout chain from a value down to its rotation, the axes there, and the rotation.

    What is done to rotated values in every lane alike stays where it is: the chain then starts below it. Without a
    rotation, the chain is that of `node`.
    """
    chain, lowest = walk_layout(node, axes)
    top = chain[-1][0]
    rope = match_rope(top, order, ends_trace, tables)
    if rope is not None:
        return chain, lowest, rope
    for inner in undone(top, lowest):
        below = _rotation(inner, lowest, order, tables)
        if below[2] is None:
            continue
        if match_norm(top) is not None:
            raise Kept("the norm comes after the rotary embedding: Inductor does both in one kernel", top)
        return below
    return chain, lowest, None


def _with_norm(heads: Heads, mode: FakeTensorMode | None) -> Heads | None:
    """The heads with the norm that they come from, or None when there is none that fits."""
    views: list[Node] = []
    current, seen = heads.source, set()
    if heads.offset:
        return None
    while (norm := match_norm(current)) is None:
        call = call_of(current)
        if call is None or call.inplace or not isinstance(call.args.get("input"), Node):
            return None
        if call.op in _VIEWS:
            views.append(current)
        elif call.op not in ("contiguous", "clone", "cast") or (call.op == "cast" and strip_casts(current) is current):
            return None
        seen.add(current)
        current = call["input"]
    views.reverse()
    if norm.eps is None:
        return replace(heads, aside="the norm before it stays outside, its epsilon is no constant")
    if norm.bias is not None:
        return replace(heads, aside="the norm before it stays outside, it has a bias")
    scope = _scope(norm, views, heads, mode)
    if scope is None:
        return None
    nodes = heads.nodes | norm.nodes | seen
    return replace(heads, source=norm.input, views=tuple(views), norm=norm, scope=scope, nodes=frozenset(nodes))


def _scope(norm: Norm, views: list[Node], heads: Heads, mode: FakeTensorMode | None) -> Scope | None:
    """What a norm runs over, seen from the heads: found by running the views on a contiguous tensor."""
    normalised = tensor(norm.node)
    count = last_dim(norm)
    if normalised is None or count is None:
        return None
    with no_guards(mode):
        laid_out = torch.empty(normalised.shape, dtype=normalised.dtype, device="meta")
        for node in views:
            laid_out = _replay_meta(node, laid_out)
        if heads.as_one and not views:
            laid_out = laid_out.unsqueeze(2)
    if laid_out.dim() != 4:
        return None
    num_heads = static_int(laid_out.shape[heads.axes[1]])
    strides = laid_out.stride()
    batch, head, sequence, lane = (strides[axis] for axis in heads.axes)
    if num_heads is None or not (equal(lane, 1) and equal(laid_out.shape[heads.axes[3]], heads.head_dim)):
        return None
    if not _weight_fits(norm, num_heads, heads.head_dim, head):
        return None
    if count == heads.head_dim and all(equal(s % count, 0) for s in (batch, head, sequence)):
        return "head"
    whole = count == num_heads * heads.head_dim and equal(head, heads.head_dim)
    if whole and norm.kind == "rms" and all(equal(s % count, 0) for s in (batch, sequence)):
        return "full"
    return None


def _weight_fits(norm: Norm, num_heads: int, head_dim: int, head_stride: object) -> bool:
    """Whether the weight is one for all heads, or one for each with the heads next to the lanes."""
    weight = tensor(norm.weight) if norm.weight is not None else None
    if weight is None:
        return norm.weight is None
    if weight.numel() == head_dim or (weight.dim() == 1 and weight.numel() == num_heads * head_dim):
        return True
    per_head = weight.numel() == num_heads * head_dim and equal(head_stride, head_dim)
    return per_head and same_shape(weight.shape[-2:], (num_heads, head_dim))


def _replay_meta(node: Node, source: torch.Tensor) -> torch.Tensor:
    call = call_of(node)
    assert call is not None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: source if n is call["input"] else value(n))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
