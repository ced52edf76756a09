"""What a quantised weight is computed from: the pure operators between the stored tensors and the product.

What they mean is for others to prove, by running them (`Closure.run`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import real_input, unset_fake_temporarily
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.dequant import Product, match_product
from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import storages, tensor, tensors, value

_LIMIT = 96  # nodes of a closure
_VIEWS = {"cast", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "t", "numpy_T", "transpose",
          "permute", "getitem", "contiguous", "clone", "view_as", "reshape_as", "select"}  # fmt: skip
_EMPTY = {"empty", "new_empty", "empty_like"}
# What no weight is computed by: what draws numbers, and what a network does with activations.
_FOREIGN = {"dropout", "linear", "matmul", "addmm", "baddbmm", "scaled_dot_product_attention", "softmax", "layer_norm",
            "rms_norm", "gelu", "silu", "relu", "sigmoid", "index_copy"}  # fmt: skip
# What computes the same from the same values and is not in `calls`: shifts, remainders, views as another type, tables.
_PURE = {
    "__rshift__", "__lshift__", "rshift", "lshift", "bitwise_right_shift", "bitwise_left_shift", "mod", "remainder",
    "fmod", "view", "index_select", "take", "gather", "clamp", "clip", "alias", "detach", "floor", "round", "trunc",
    "movedim", "moveaxis", "swapaxes", "swapdims", "broadcast_to", "split_with_sizes", "tensor", "arange", "int32",
    "short", "char", "byte", "ldexp", "exp2", "as_tensor", "scalar_tensor", "dequantize_per_tensor",
    "dequantize_per_channel", "dequantize_per_channel_group", "embedding", "concat", "hstack", "vstack", "tile",
}  # fmt: skip


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
    """

    root: Node
    nodes: list[Node]
    codes: Node
    others: list[Node] = field(default_factory=list)
    steps: dict[Node, tuple[int, int]] = field(default_factory=dict)

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
                    if call is not None and call.op in _EMPTY:
                        known[node].fill_(85)  # what was freed there a moment ago may be the very weight
                except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                    raise Miss(f"{node.name} does not run on other weights of this kind: {error}", node) from error
        found: torch.Tensor = known[self.root]
        return found

    def key(self) -> tuple[Any, ...]:
        """What the closure computes, without its names: equal for layers of one kind and size."""
        index = {node: i for i, node in enumerate((*self.leaves, *self.steps, *self.nodes))}
        leaves = (*(_kind(leaf) for leaf in self.leaves), *((_kind(leaf), step) for leaf, step in self.steps.items()))
        calls = tuple(
            (node.op, node.target, repr(map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")))
            for node in self.nodes
        )
        return (*leaves, *calls, index[self.root])


def _kind(node: Node) -> tuple[Any, ...]:
    found = tensor(node)
    assert found is not None
    return tuple(found.shape), found.stride(), found.dtype, found.device


def packed_products(nodes: Sequence[Node]) -> list[Node]:
    """The products whose weight comes from integers or 8-bit floats, proven or not."""
    found = []
    for node in nodes:
        product = match_product(node)
        if product is not None and product.weight.op not in ("placeholder", "get_attr") and _reads_codes(product):
            found.append(node)
    return found


def _reads_codes(product: Product) -> bool:
    """Whether something of at least half a byte a weight, and no float of two bytes, is read on the weight's way."""
    n, k = product.shape
    pending, seen = [product.weight], set[Node]()
    while pending and len(seen) < _LIMIT:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(_stored(x) and 2 * x.numel() * x.itemsize >= n * k for x in _static(node)):
            return True
        if node.op not in ("placeholder", "get_attr") and _is_pure(node):
            pending += node.all_input_nodes
            pending += [source for user in node.users if _stores_into(user, node) for source in user.all_input_nodes]
    return False


def _static(node: Node) -> list[torch.Tensor]:
    return [x for x in tensors(value(node)) if all(isinstance(size, int) for size in x.shape)]


def _stored(x: torch.Tensor) -> bool:
    """Whether a type is one that codes are stored in."""
    return (x.dtype.itemsize == 1 and x.dtype != torch.bool) or x.dtype == torch.int32


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
    walk = _Walk(n * k, order, peel, order.index[product.node])
    walk.expand(product.weight)
    if len(walk.codes) != 1:
        names = ", ".join(node.name for node in walk.codes)
        what = f"several tensors that look like codes ({names})" if names else "no tensor of half a byte or a byte each"
        raise Miss(f"the weight is computed from {what}", product.node)
    nodes = sorted(walk.inside, key=order.index.__getitem__)
    steps = {node: step for node in walk.others if (step := _in_steps(node)) is not None}
    others = [node for node in walk.others if node not in steps]
    closure = Closure(product.weight, nodes, walk.codes[0], others, steps)
    _check_source(closure.codes)
    _check_writes(closure, order, product.node)
    _check_readers(closure, product)
    return closure


class _Walk:
    def __init__(self, elements: int, order: Order, peel: bool, before: int) -> None:
        self.elements, self.order, self.peel, self.before = elements, order, peel, before
        self.inside: dict[Node, None] = {}
        self.codes: list[Node] = []
        self.others: list[Node] = []

    def expand(self, root: Node) -> None:
        pending, seen = [root], set[Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > _LIMIT:
                raise Miss(f"the weight is computed by more than {_LIMIT} operators", node)
            if self._small(node):
                if _is_constant(node):
                    self._compute(node)
                    continue
                node = self._peeled(node)
                if node not in self.others and node not in self.inside:
                    self.others.append(node)
            elif self._codes_like(node) and not any(self._has_codes(source) for source in node.all_input_nodes):
                self.codes.append(node)
            else:
                pending += self._sources(node)
        self.others.sort(key=self.order.index.__getitem__)

    def _sources(self, node: Node) -> list[Node]:
        if node.op in ("placeholder", "get_attr"):
            found = tensor(node)
            kind = "no tensor" if found is None else f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
            raise Miss(f"the weight is computed from {node.name}: {kind} is neither codes nor scales", node)
        if not _is_pure(node):
            raise Miss(f"{node.name} is not known to compute the same from the same weight", node)
        self.inside[node] = None
        writers = [user for user in node.users if _stores_into(user, node) and self.order.index[user] < self.before]
        for writer in writers:
            self.inside[writer] = None
        return [*node.all_input_nodes, *(x for w in writers for x in w.all_input_nodes if x is not node)]

    def _compute(self, node: Node) -> None:
        """Takes in a constant and what it is made of."""
        self.inside[node] = None
        for source in node.all_input_nodes:
            self._compute(source)

    def _small(self, node: Node) -> bool:
        found = tensor(node)
        if found is None or not all(isinstance(size, int) for size in found.shape):
            return False
        return found.numel() * 4 <= self.elements and not self._codes_like(node)

    def _peeled(self, node: Node) -> Node:
        while self.peel:
            call, before = call_of(node), tensor(node)
            source = None if call is None or call.op not in _VIEWS or call.inplace else call.args.get("input")
            after = tensor(source)
            if not isinstance(source, Node) or after is None or before is None or after.numel() != before.numel():
                return node
            if before.device != after.device:
                return node
            self.inside[node] = None
            node = source
        return node

    def _codes_like(self, node: Node) -> bool:
        found = tensor(node)
        if found is None or not _stored(found) or not all(isinstance(size, int) for size in found.shape):
            return False
        return found.numel() * found.itemsize * 2 in (self.elements, 2 * self.elements)

    def _has_codes(self, node: Node, depth: int = 12) -> bool:
        """Whether codes are read behind a node."""
        if self._codes_like(node):
            return True
        return depth > 0 and any(self._has_codes(source, depth - 1) for source in node.all_input_nodes)


def _is_constant(node: Node, depth: int = 6) -> bool:
    """Whether a value is computed from numbers in the graph alone."""
    if depth == 0 or node.op not in ("call_function", "call_method") or not _is_pure(node):
        return False
    call = call_of(node)
    if call is not None and call.op in _EMPTY:
        return False
    return all(_is_constant(source, depth - 1) for source in node.all_input_nodes)


def _stores_into(user: Node, node: Node) -> bool:
    return user.target is operator.setitem and user.args[0] is node


def _is_pure(node: Node) -> bool:
    call = call_of(node)
    if call is not None:
        return not call.inplace and call.op not in _FOREIGN
    target = node.target
    if node.op == "call_method":
        return str(target) in _PURE
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(target).partition(".")
        return namespace in ("aten", "quantized_decomposed") and name.partition(".")[0] in _PURE
    module = (getattr(target, "__module__", None) or "torch").split(".")[0]
    return module in ("torch", "_operator") and getattr(target, "__name__", "") in _PURE


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
        stores = [order.index[user] for user in node.users if _stores_into(user, node) and user in inside]
        reads = [order.index[user] for user in node.users if not _stores_into(user, node)]
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
