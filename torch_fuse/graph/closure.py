"""What a quantised weight is computed from: the pure operators between the stored tensors and the product.

What they mean is for others to prove, by running them (`Closure.run`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import real_input, unset_fake_temporarily
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.closure_walk import EMPTY, Walk, stores_into
from torch_fuse.graph.dequant import Product
from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import static_int, storages, tensor, tensors, value


@dataclass
class Closure:
    """What a weight is computed from.

    Attributes:
        root: the weight, as the product reads it.
        nodes: all that is computed, in the graph's order.
        codes: the leaf that holds the codes: an integer or an 8-bit float a weight, or half a byte.
        others: the other leaves: scales, zero points, tables; small.
        steps: leaves of integers that are arange(numel) * a // b, such as a table of shifts or of the groups of
            columns, with (a, b). They hold these values now; that they do later is for the graph to check.
        planes: where the codes are slices of blocks of bytes [blocks, size], which `codes` then are: the slices, with
            the first byte in a block and the number of bytes.
    """

    root: Node
    nodes: list[Node]
    codes: Node
    others: list[Node] = field(default_factory=list)
    steps: dict[Node, tuple[int, int]] = field(default_factory=dict)
    planes: dict[Node, tuple[int, int]] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Node]:
        """All leaves, the codes first."""
        return [self.codes, *self.others]

    def run(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight for other leaves.

        Raises:
            Miss: when an operator does not take them.
        """
        known: dict[Node, Any] = dict(zip(self.leaves, values, strict=True))
        known |= {plane: values[0].narrow(-1, *place) for plane, place in self.planes.items()}
        for node, (a, b) in self.steps.items():
            like = tensor(node)
            assert like is not None
            known[node] = (torch.arange(like.numel(), device=values[0].device) * a // b).to(like.dtype).view(like.shape)
        with unset_fake_temporarily(), torch.no_grad():
            for node in self.nodes:
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                try:
                    if node.op == "call_method":
                        known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                    else:
                        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    call = call_of(node)
                    if call is not None and call.op in EMPTY:
                        known[node].fill_(85)  # what was freed there a moment ago may be the very weight
                except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                    raise Miss(f"{node.name} does not run on other weights of this kind: {error}", node) from error
        found: torch.Tensor = known[self.root]
        return found

    def key(self) -> tuple[Any, ...]:
        """What the closure computes, without its names: equal for layers of one kind and size."""
        index = {node: i for i, node in enumerate((*self.leaves, *self.steps, *self.planes, *self.nodes))}
        leaves = (*(_kind(leaf) for leaf in self.leaves), *((_kind(leaf), step) for leaf, step in self.steps.items()))
        calls = tuple(
            (node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")))
            for node in self.nodes
        )
        return (*leaves, *self.planes.values(), *calls, index[self.root])


def _kind(node: Node) -> tuple[Any, ...]:
    found = tensor(node)
    assert found is not None
    return tuple(found.shape), found.stride(), found.dtype, found.device


def closure_of(product: Product, order: Order, peel: bool = True) -> Closure:
    """What the weight of a product is computed from.

    Args:
        product: the product.
        order: the graph's mutations.
        peel: look for scales behind their casts and views, so that the op reads what is stored.

    Raises:
        Miss: when it is not computed from codes by operators that are known to be pure, or something is written to.
        Kept: when others read a part of it.
    """
    n, k = product.shape
    walk = Walk(n * k, order, peel, order.index[product.node])
    walk.expand(product.weight)
    codes, planes = _joined(walk)
    if codes is None:
        names = ", ".join(node.name for node in (*walk.codes, *walk.planes))
        what = f"several tensors that look like codes ({names})" if names else "no tensor of half a byte or a byte each"
        raise Miss(f"the weight is computed from {what}", product.node)
    nodes = sorted(walk.inside, key=order.index.__getitem__)
    steps = {node: step for node in walk.others if (step := _in_steps(node)) is not None}
    others = [node for node in walk.others if node not in steps]
    closure = Closure(product.weight, nodes, codes, others, steps, planes)
    _check_source(closure.codes)
    _check_writes(closure, order, product.node)
    _check_readers(closure, product)
    return closure


def _in_steps(node: Node) -> tuple[int, int] | None:
    """(a, b) when an input of integers is arange(numel) * a // b now, else None."""
    real = real_input(node)
    if real is None or real.dtype not in (torch.int32, torch.int64) or real.numel() < 2 or real.numel() > 1 << 20:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        found = real.detach().flatten().cpu().long()
        places = torch.arange(found.numel())
        last = int(found[-1])
        a = int(found[1]) if int(found[1]) > 0 else 1
        b = int((found == 0).sum())
        same = last > 0 and b > 0 and bool((found == places * a // b).all())
    return (a, b) if same else None


def _joined(walk: Walk) -> tuple[Node | None, dict[Node, tuple[int, int]]]:
    """The codes, or the blocks that they are slices of, with the slices; None when there are no such blocks."""
    if len(walk.codes) == 1 and not walk.planes:
        return walk.codes[0], {}
    blocks, planes = set(), {}
    for node in sorted((*walk.codes, *walk.planes), key=walk.order.index.__getitem__):
        found, source = tensor(node), _blocks_of(node)
        base = tensor(source)
        if source is None or found is None or base is None:
            return None, {}
        first = static_int(found.storage_offset() - base.storage_offset())
        if first is None:
            return None, {}
        blocks.add(source)
        planes[node] = (first, int(found.shape[1]))
    ends = sorted(planes.values())
    adjacent = all(a + size == b for (a, size), (b, _) in itertools.pairwise(ends))
    return (blocks.pop(), planes) if len(blocks) == 1 and adjacent else (None, {})


def _blocks_of(node: Node) -> Node | None:
    """The whole rows of bytes that a slice is taken from, in the graph; None when they are not there."""
    found, source = tensor(node), node
    while found is not None and len(source.all_input_nodes) == 1:
        (source,) = source.all_input_nodes
        base = tensor(source)
        if not storages(source) & storages(node):
            return None
        if base is not None and base.dtype == found.dtype and base.is_contiguous():
            whole = (int(found.shape[0]), int(found.stride(0)))
            return source if tuple(base.shape) == whole else None
    return None


def _check_source(codes: Node) -> None:
    """Raises Miss unless the codes are stored, and not themselves computed."""
    node = codes
    while node.op not in ("placeholder", "get_attr"):
        sources = node.all_input_nodes
        if len(sources) != 1 or not storages(node) & storages(sources[0]):
            raise Miss(f"the codes are computed in the graph, by {node.name}", node)
        node = sources[0]


def _check_writes(closure: Closure, order: Order, at: Node) -> None:
    """Raises Miss when anything but the closure itself writes to it, or it is read before it is complete."""
    inside = set(closure.nodes)
    order.check_unwritten([*closure.leaves, *closure.steps], order.index[at])
    for node in closure.nodes:
        stores = [order.index[user] for user in node.users if stores_into(user, node) and user in inside]
        reads = [order.index[user] for user in node.users if not stores_into(user, node)]
        if stores and reads and min(reads) < max(stores):
            raise Miss(f"{node.name} is read before all of it is written", node)
    try:
        order.check_movable(inside, closure.leaves, order.index[at])
    except Miss as miss:
        raise Miss(f"the weight is not a constant: {miss.reason}", miss.node) from miss


def _check_readers(closure: Closure, product: Product) -> None:
    """Raises Kept when others read what is as large as the weight: it is written out anyway."""
    inside = {*closure.nodes, *product.nodes}
    n, k = product.shape
    for node in (*closure.nodes, *(product.nodes - {product.node})):
        reader = next((user for user in node.users if user not in inside), None)
        if reader is not None and sum(x.numel() for x in tensors(value(node))) * 2 >= n * k:
            raise Kept(f"{reader.name} reads the dequantised weight too, which is then written out anyway", reader)
