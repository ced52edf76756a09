"""The walk from a computed weight back to what it is computed from: codes, small tensors, pure operators."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.dequant import Product, match_product
from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import tensor, tensors, value

LIMIT = 96  # nodes of a closure
_VIEWS = {"cast", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "t", "numpy_T", "transpose",
          "permute", "getitem", "contiguous", "clone", "view_as", "reshape_as", "select"}  # fmt: skip
EMPTY = {"empty", "new_empty", "empty_like"}
# What no weight is computed by: what draws numbers, and what a network does with activations.
_FOREIGN = {"dropout", "linear", "matmul", "addmm", "baddbmm", "scaled_dot_product_attention", "softmax", "layer_norm",
            "rms_norm", "gelu", "silu", "relu", "sigmoid", "index_copy"}  # fmt: skip
# What computes the same from the same values and is not in `calls`: shifts, remainders, views as another type, tables.
_PURE = {
    "__rshift__", "__lshift__", "rshift", "lshift", "bitwise_right_shift", "bitwise_left_shift", "mod", "remainder",
    "fmod", "view", "index_select", "take", "gather", "clamp", "clip", "alias", "detach", "floor", "round", "trunc",
    "movedim", "moveaxis", "swapaxes", "swapdims", "broadcast_to", "split_with_sizes", "tensor", "arange", "int32",
    "short", "char", "byte", "ldexp", "exp2", "as_tensor", "scalar_tensor", "dequantize_per_tensor",
    "dequantize_per_channel", "dequantize_per_channel_group", "embedding", "bitwise_and", "bitwise_or", "bitwise_xor",
    "concat", "hstack", "vstack", "tile",
}  # fmt: skip


def packed_products(nodes: Sequence[Node]) -> list[Node]:
    """The products whose weight comes from integers or 8-bit floats, proven or not."""
    found = []
    for node in nodes:
        product = match_product(node)
        if product is not None and product.weight.op not in ("placeholder", "get_attr") and _reads_codes(product):
            found.append(node)
    return found


def _reads_codes(product: Product) -> bool:
    """Whether something of at least a bit a weight, and no float of two bytes, is read on the weight's way."""
    n, k = product.shape
    pending, seen = [product.weight], set[Node]()
    while pending and len(seen) < LIMIT:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(_stored(x) and 8 * x.numel() * x.itemsize >= n * k for x in _static(node)):
            return True
        if node.op not in ("placeholder", "get_attr") and (is_pure(node) or _is_opaque(node)):
            pending += node.all_input_nodes
            pending += [source for user in node.users if stores_into(user, node) for source in user.all_input_nodes]
    return False


def _is_opaque(node: Node) -> bool:
    """Whether a node may compute a weight in a way that is not understood: a library's operator, or in place."""
    call = call_of(node)
    return isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) or (
        call is not None and call.inplace
    )


def _static(node: Node) -> list[torch.Tensor]:
    return [x for x in tensors(value(node)) if all(isinstance(size, int) for size in x.shape)]


def _stored(x: torch.Tensor) -> bool:
    """Whether a type is one that codes are stored in."""
    return (x.dtype.itemsize == 1 and x.dtype != torch.bool) or x.dtype == torch.int32


class Walk:
    def __init__(self, elements: int, order: Order, peel: bool, before: int) -> None:
        self.elements, self.order, self.peel, self.before = elements, order, peel, before
        self.inside: dict[Node, None] = {}
        self.codes: list[Node] = []
        self.planes: list[Node] = []
        self.others: list[Node] = []

    def expand(self, root: Node) -> None:
        pending, seen = [root], set[Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > LIMIT:
                raise Miss(f"the weight is computed by more than {LIMIT} operators", node)
            if self._small(node):
                if _is_constant(node) and not _is_table(node):
                    self._compute(node)
                    continue
                node = self._peeled(node)
                if node not in self.others and node not in self.inside:
                    self.others.append(node)
            elif self._codes_like(node) and not any(self._has_codes(source) for source in node.all_input_nodes):
                self.codes.append(node)
            elif self._plane_like(node):
                self.planes.append(node)
            else:
                pending += self._sources(node)
        self.others.sort(key=self.order.index.__getitem__)

    def _sources(self, node: Node) -> list[Node]:
        if node.op in ("placeholder", "get_attr"):
            found = tensor(node)
            kind = "no tensor" if found is None else f"{str(found.dtype).removeprefix('torch.')}{list(found.shape)}"
            raise Miss(f"the weight is computed from {node.name}: {kind} is neither codes nor scales", node)
        if not is_pure(node):
            raise Miss(f"{node.name} is not known to compute the same from the same weight", node)
        self.inside[node] = None
        writers = [user for user in node.users if stores_into(user, node) and self.order.index[user] < self.before]
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
        if found.numel() * 4 > self.elements or self._codes_like(node):
            return False
        return found.dtype.is_floating_point or not self._has_codes(node)

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

    def _plane_like(self, node: Node) -> bool:
        """Whether a value is a slice of wider rows of bytes with one bit a weight or more: a part of blocks' codes."""
        found = tensor(node)
        if found is None or found.dtype != torch.uint8 or found.dim() != 2:
            return False
        size, stride = (*found.shape, found.numel()), (*found.stride(),)
        if not all(isinstance(x, int) for x in (*size, *stride)):
            return False
        return stride[1] == 1 and size[1] > 1 and stride[0] > size[1] and 8 * found.numel() >= self.elements

    def _has_codes(self, node: Node) -> bool:
        """Whether codes are read behind a node."""
        pending, seen = [node], set[Node]()
        while pending and len(seen) < LIMIT:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._codes_like(node) or self._plane_like(node):
                return True
            pending += node.all_input_nodes
        return False


def _is_table(node: Node) -> bool:
    """Whether a constant is a table of 16 numbers, which codes of 4 bits may be looked up in."""
    found = tensor(node)
    return found is not None and found.dtype.is_floating_point and found.numel() == 16


def _is_constant(node: Node, depth: int = 6) -> bool:
    """Whether a value is computed from numbers in the graph alone."""
    if depth == 0 or node.op not in ("call_function", "call_method") or not is_pure(node):
        return False
    call = call_of(node)
    if call is not None and call.op in EMPTY:
        return False
    return all(_is_constant(source, depth - 1) for source in node.all_input_nodes)


def stores_into(user: Node, node: Node) -> bool:
    return user.target is operator.setitem and user.args[0] is node


def is_pure(node: Node) -> bool:
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
