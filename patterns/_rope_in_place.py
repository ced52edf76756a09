"""When query and key can be rotated where the projection left them, and the rewrite that does so.

A partial rotary embedding touches a few lanes of each head. `torch_fuse::partial_rope` writes those alone, and
attention reads query, key and value as views of the projection, as long as nothing else reads what was there before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise

from torch.fx import Node

from torch_fuse.graph.attention import Attention, expanded_heads
from torch_fuse.graph.cache import appended
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import is_hoistable
from torch_fuse.graph.head_layout import Axes
from torch_fuse.graph.heads import Heads, match_heads
from torch_fuse.graph.lane_slice import match_slice
from torch_fuse.graph.linear import match_linear
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, tensor
from torch_fuse.kernels import partial_rope
from torch_fuse.patterns._rope_tables import Tables
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.view import GraphView

_VIEWS = ("view", "reshape", "unflatten", "flatten", "transpose", "permute")


@dataclass(frozen=True)
class Part:
    """A value that is a slice of a projection's lanes: `node` has its batch, head, sequence, lane at `axes`."""

    node: Node
    axes: Axes
    offset: int
    rotated: bool


@dataclass(frozen=True)
class Projection:
    """A projection's result [.., lanes], with `axes` as in Heads, and the values that are slices of it."""

    source: Node
    axes: Axes
    parts: tuple[Part, ...]
    nodes: frozenset[Node]


def match_in_place(query: Heads, key: Heads, attention: Attention, view: GraphView) -> tuple[Projection, ...]:
    """The projections to rotate in place; none when that moves no fewer bytes than writing query and key anew."""
    if not (_is_partial(query) and _is_partial(key)):
        return ()
    if query.source is not key.source:
        found = [_projection(heads, [_part(heads)], heads.nodes) for heads in (query, key)]
        return tuple(p for p in found if p is not None) if None not in found else ()
    parts, nodes = [_part(query), _part(key)], query.nodes | key.nodes
    value = _value(query, attention, view)
    if value is not None and not _read_early(value, (query, key)):
        parts.append(value[0])
        nodes |= value[1]
    starts = sorted(part.offset for part in parts)
    if any(b - a < query.head_dim for a, b in pairwise(starts)):
        return ()
    whole = _projection(query, parts, nodes) if query.axes == key.axes else None
    return () if whole is None else (whole,)


def _is_partial(heads: Heads) -> bool:
    rope, source, result = heads.rope, tensor(heads.source), tensor(heads.result)
    assert rope is not None and source is not None and result is not None
    plain = heads.norm is None and not heads.views and source.dim() == 4 and source.dtype == result.dtype
    if source.requires_grad:  # not measured to win with gradients
        return False
    return plain and 4 * rope.rotary_dim <= 3 * rope.head_dim


def _part(heads: Heads) -> Part:
    return Part(heads.result, heads.result_axes, heads.offset, True)


def _value(query: Heads, attention: Attention, view: GraphView) -> tuple[Part, frozenset[Node]] | None:
    """The attention's values, when they are a slice of the same projection as the query."""
    node = appended(expanded_heads(attention.value)[0], view.order, attention.node)
    try:
        heads = match_heads(node, view.order, view.fake_mode)
        found = match_slice(heads.source, view.order, query.source)
    except Miss:
        return None
    if found is None or heads.views or heads.axes != query.axes or heads.head_dim != query.head_dim:
        return None
    return Part(heads.source, heads.axes, found[0], False), found[1]


def _read_early(value: tuple[Part, frozenset[Node]], rotated: tuple[Heads, Heads]) -> bool:
    """Whether the values are read before the tables are computed: then they cannot wait for the rotation."""
    part, nodes = value
    first = min((user for user in part.node.users if user not in nodes), default=None)
    pending = [table for heads in rotated if heads.rope is not None for table in (heads.rope.cos, heads.rope.sin)]
    while pending and first is not None:
        node = pending.pop()
        if node < first:
            continue
        if not is_hoistable(node):
            return True
        pending += node.all_input_nodes
    return False


def _projection(heads: Heads, parts: list[Part], nodes: frozenset[Node]) -> Projection | None:
    """The projection, unless something else than `nodes` reads it."""
    splits = {user for user in heads.source.users if user not in nodes and _is_split(user, nodes)}
    readers = splits | nodes
    node = heads.source
    while all(user in readers for user in node.users):
        if match_linear(node) is not None:
            return Projection(heads.source, heads.axes, tuple(parts), nodes | splits)
        call = call_of(node)
        if call is None or call.inplace or call.op not in _VIEWS or not isinstance(call["input"], Node):
            return None
        node, readers = call["input"], {node}
    return None


def _is_split(node: Node, readers: frozenset[Node]) -> bool:
    """Whether a node cuts a tensor into several, all of which `readers` read."""
    call = call_of(node)
    return call is not None and call.op in ("chunk", "split", "unbind") and all(user in readers for user in node.users)


def emit_in_place(
    projection: Projection, query: Heads, tables: Tables, reference: bool, builder: Builder
) -> dict[Node, Node]:
    """Emits the rotation of a projection and, for each of its parts, the view that takes the part's place."""
    rope = query.rope
    assert rope is not None
    b, h, s, d = projection.axes
    tokens_first = (b, s, h, d)
    offsets = [part.offset for part in projection.parts if part.rotated]
    node = _permuted(projection.source, tokens_first, builder)
    op = partial_rope.reference if reference else partial_rope.partial_rope
    node = builder.call(op, node, tables.cos, tables.sin, offsets, rope.rotary_dim, rope.interleaved,
                        tables.cos_lanes, tables.sin_lanes, False)  # fmt: skip
    lanes = tensor(node).shape[3]  # type: ignore[union-attr]
    tiled = equal(lanes, rope.head_dim * len(projection.parts)) and len(projection.parts) > 1
    split = builder.call("split", node, rope.head_dim, 3) if tiled else None
    made = {}
    for part in projection.parts:
        if split is not None:
            lanes_of = builder.call(operator.getitem, split, part.offset // rope.head_dim)
        elif equal(lanes, rope.head_dim):
            lanes_of = node
        else:
            lanes_of = builder.call("narrow", node, 3, part.offset, rope.head_dim)
        at = dict(zip(part.axes, (0, 2, 1, 3), strict=True))
        made[part.node] = _permuted(lanes_of, (at[0], at[1], at[2], at[3]), builder)
    return made


def _permuted(node: Node, dims: Axes, builder: Builder) -> Node:
    return node if dims == (0, 1, 2, 3) else builder.call("permute", node, dims)
