"""Tables of cosines and sines, as the kernels read them: [B or 1, S, lanes]."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.heads import Heads
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, tensor
from torch_fuse.options import Options
from torch_fuse.patterns._once import once
from torch_fuse.rewrite.builder import Builder


@dataclass(frozen=True)
class Tables:
    """cos and sin [B or 1, S, lanes], and where their lanes have the values of a pair: see `Rope`."""

    cos: Node
    sin: Node
    cos_lanes: list[int]
    sin_lanes: list[int]


def check_table_axes(heads: Heads) -> None:
    """Raises Miss unless both tables are broadcast over heads and have a row for each position."""
    assert heads.rope is not None
    for table, rank in ((heads.rope.cos, heads.rope.cos_rank), (heads.rope.sin, heads.rope.sin_rank)):
        outer = _outer_shape(table, rank, heads)
        if outer is None:
            raise Miss("the tables of cosines and sines have more dimensions than the heads", table)
        batch, _, sequence, _ = heads.sizes()
        of_batch, of_head, of_position = (outer[axis] for axis in heads.axes[:3])
        if not equal(of_head, 1):
            raise Miss("the tables of cosines and sines differ from head to head", table)
        if not equal(of_position, sequence) or not (equal(of_batch, 1) or equal(of_batch, batch)):
            raise Miss("the tables of cosines and sines have no row for each position", table)


def emit_tables(heads: Heads, builder: Builder, options: Options) -> Tables:
    """The tables of a rotation; the sines have the sign that the kernels expect.

    Off the CPU they are computed once for all layers, where Inductor would compute them anew every few layers.
    """
    rope = heads.rope
    assert rope is not None
    cos = _emit_table(rope.cos, rope.cos_rank, heads, builder)
    sin = _emit_table(rope.sin, rope.sin_rank, heads, builder)
    recomputed = options.kernels == "reference" or tensor(rope.cos).device.type == "cpu"  # type: ignore[union-attr]
    if not rope.matrices:
        sin = sin if rope.sin_sign == 1 else builder.shared("neg", sin)
        cos, sin = (table if recomputed else once(table, builder) for table in (cos, sin))
        return Tables(cos, sin, list(rope.cos_lanes), list(rope.sin_lanes))
    step, *starts = rope.sin_lanes
    first, second = (_every(sin, step, start, rope.rotary_dim // 2, builder) for start in starts)
    if rope.sin_sign == 1:
        first = builder.shared("neg", first)
    else:
        second = builder.shared("neg", second)
    both = builder.shared(torch.cat, (first, second), -1)
    cos, both = (table if recomputed else once(table, builder) for table in (cos, both))
    return Tables(cos, both, list(rope.cos_lanes), [1, 0, rope.rotary_dim // 2])


def _every(table: Node, step: int, start: int, count: int, builder: Builder) -> Node:
    """`count` lanes of a table, `step` apart."""
    return builder.shared(operator.getitem, table, (..., slice(start, start + step * (count - 1) + 1, step)))


def _outer_shape(table: Node, rank: int, heads: Heads) -> list[Any] | None:
    """The table's sizes along the first three dimensions of the heads, without its lanes."""
    found = tensor(table)
    assert found is not None
    shape = list(found.shape[: found.dim() - rank]) + [1] * heads.as_one
    return [1] * (3 - len(shape)) + shape if len(shape) <= 3 else None


def _emit_table(table: Node, rank: int, heads: Heads, builder: Builder) -> Node:
    """The table as [B or 1, S, lanes]; a complex one with real and imaginary parts next to each other."""
    found = tensor(table)
    assert found is not None
    call, dims = call_of(table), found.dim()
    without_heads = rank == 1 and call is not None and call.op == "unsqueeze" and dims == 4
    without_heads = without_heads and not heads.as_one and call["dim"] % 4 == heads.axes[1]  # type: ignore[index]
    node = call["input"] if without_heads else table  # type: ignore[index]
    if found.is_complex():
        node = builder.shared("flatten", builder.shared(torch.view_as_real, node), -2)
    if found.dtype.to_real() == torch.float64 and tensor(heads.source).dtype != torch.float64:  # type: ignore[union-attr]
        node = builder.shared("float", node)  # as the kernels read it: half the bytes
    if rank > 1:
        node = builder.shared("flatten", node, -rank)
    if heads.as_one:
        for _ in range(2 + rank - dims):
            node = builder.shared("unsqueeze", node, 0)
    elif not without_heads:
        for _ in range(3 + rank - dims):
            node = builder.shared("unsqueeze", node, 0)
        node = builder.shared("select", node, heads.axes[1], 0)
    return node
