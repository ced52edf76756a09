"""Recogniser: keys or values gathered from a paged cache by a block table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, static_int, tensor

_MOVES = ("transpose", "permute")
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone")

# What a dimension is made of, outermost first: "batch", "block" (of the table), or an axis of the cache; and the sizes.
Atom = tuple["str | int", Any]


@dataclass(frozen=True)
class Paged:
    """Keys or values [B, H, T * page, D] with value[b, :, j] = cache[table[b, j // page]], key j % page of the block.

    Attributes:
        cache: what is indexed; its first dimension counts the blocks.
        table: [B, T] integers, or [T] for one sequence.
        page: the axis of the cache with the keys of a block; None when a block is one key.
        heads: the axis with the heads; None when there is one head.
        nodes: all nodes from the cache and the table to the keys or values.
    """

    cache: Node
    table: Node
    page: int | None
    heads: int | None
    nodes: frozenset[Node]


def match_paged(node: Node) -> Paged | None:
    """Recognises `cache[table]` in the order of attention's dimensions; None for anything else.

    Spellings: indexing or `index_select` by a table of one or two dimensions, flattened or not; any views, permutations
    and copies behind it. Each dimension is followed as a product of the table's and the cache's.

    Raises:
        Miss: when it is gathered, but its dimensions are not batch, heads, keys of block after block, lanes.
    """
    views: list[Node] = []
    current: Any = node
    while (call := call_of(current)) is not None and call.op in (*_MOVES, *_RESHAPES) and not call.inplace:
        views.append(current)
        current = call["input"]
    gathered = _gathered(current)
    if gathered is None:
        return None
    cache, index = gathered
    found, table, nodes = tensor(cache), index, {*views, current}
    assert found is not None
    rows = tensor(index)
    call = call_of(index)
    if rows.dim() == 1 and call is not None and call.op in ("view", "reshape", "flatten"):  # type: ignore[union-attr]
        source = tensor(call["input"])
        if source is not None and source.dim() == 2:
            table = call["input"]
            nodes.add(index)
    listed = tensor(table)
    assert listed is not None
    atoms = [*zip(("batch", "block")[2 - listed.dim() :], listed.shape, strict=True)]
    first: list[list[Atom]] = [[*atoms]] if rows.dim() == 1 else [[atom] for atom in atoms]  # type: ignore[union-attr]
    dims: list[list[Atom]] | None = first + [[(axis, found.shape[axis])] for axis in range(1, found.dim())]
    for view in reversed(views):
        dims = _viewed(view, dims)
        if dims is None:
            raise Miss(f"{view.name} mixes the dimensions of blocks gathered from a paged cache", view)
    axes = _axes(dims, found)
    if axes is None:
        raise Miss("what is gathered from a paged cache is not batch, heads, keys block by block, lanes", node)
    return Paged(cache, table, *axes, frozenset(nodes))


def _gathered(node: Any) -> tuple[Node, Node] | None:
    """The cache of three or four dimensions and the index of one or two in `cache[index]`, or None."""
    call = call_of(node)
    cache = index = None
    if call is not None and call.op == "getitem":
        cache, index = call["input"], call["index"]
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    elif isinstance(node, Node) and node.target in ("index_select", torch.index_select):
        given = dict(zip(("input", "dim", "index"), node.args, strict=False)) | dict(node.kwargs)
        cache, index = given.get("input"), given.get("index") if given.get("dim") == 0 else None
    found, rows = tensor(cache), tensor(index)
    if found is None or rows is None:
        return None
    fits = found.dim() in (3, 4) and rows.dim() in (1, 2) and rows.dtype in (torch.int32, torch.int64)
    return (cache, index) if fits else None  # type: ignore[return-value]


def _viewed(view: Node, dims: list[list[Atom]] | None) -> list[list[Atom]] | None:
    """What the dimensions of a view are made of; a reshape regroups the atoms in their order."""
    call, found = call_of(view), tensor(view)
    if call is None or found is None or dims is None:
        return None
    if call.op == "transpose":
        dims = list(dims)
        a, b = call["dim0"], call["dim1"]
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    if call.op == "permute":
        return [dims[axis] for axis in call["dims"]]
    return _regrouped([atom for atoms in dims for atom in atoms], found.shape)


def _regrouped(atoms: Sequence[Atom], shape: Sequence[Any]) -> list[list[Atom]] | None:
    rest = [atom for atom in atoms if not equal(atom[1], 1)]
    dims: list[list[Atom]] = []
    for size in shape:
        taken: list[Atom] = []
        product: Any = 1
        while not equal(product, size):
            if not rest:
                return None
            taken.append(rest.pop(0))
            product = product * taken[-1][1]
        dims.append(taken)
    return None if rest else dims


def _axes(dims: list[list[Atom]] | None, cache: torch.Tensor) -> tuple[int | None, int | None] | None:
    """The axes of a block's keys and of the heads in the cache, or None when `dims` is not attention's order."""
    if dims is None or len(dims) != 4 or static_int(cache.shape[-1]) in (None, 1):
        return None
    batch, heads, keys, lanes = ([name for name, size in atoms if not equal(size, 1)] for atoms in dims)
    last = cache.dim() - 1
    within = keys[1:] if keys[:1] == ["block"] else keys  # a table of one block has no dimension
    if batch not in ([], ["batch"]) or lanes != [last] or len(within) > 1 or len(heads) > 1:
        return None
    if not all(isinstance(name, int) for name in (*within, *heads)):
        return None
    free = [axis for axis in range(1, last) if axis not in (*within, *heads)]  # of size 1: nothing of it is left
    page = within[0] if within else free.pop(0) if len(free) > (not heads) else None
    head = heads[0] if heads else free.pop(0) if free else None
    return (page, head) if not free else None  # type: ignore[return-value]
