"""Dimensions and indices of a tensor, as those of its last dimensions alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from torch_fuse.graph.values import static_int


def static_sizes(sizes: Iterable[Any]) -> list[int] | None:
    found = [static_int(size) for size in sizes]
    return None if None in found else [size for size in found if size is not None]


def dim_of_lanes(dim: Any, ndim: int, rank: int) -> int | None:
    """`dim` of a tensor as a dimension of its last `rank` ones, or None when it is an outer dimension."""
    if not isinstance(dim, int):
        return None
    lane = (dim % ndim) - (ndim - rank)
    return lane if lane >= 0 else None


def index_of_lanes(index: Any, ndim: int, outer: int) -> tuple[Any, ...] | None:
    """The part of an index that acts on the dimensions from `outer` on; None when it touches the others."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (part is Ellipsis or isinstance(part, (slice, int))) for part in parts):
        return None
    if any(isinstance(x, Node) for p in parts if isinstance(p, slice) for x in (p.start, p.stop, p.step)):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *[slice(None)] * (ndim - len(parts) + 1), *parts[at + 1 :])
    parts = (*parts, *[slice(None)] * (ndim - len(parts)))
    if any(part != slice(None) for part in parts[:outer]):
        return None
    return tuple(parts[outer:])
