"""What a linear layer does whose weight is a tensor subclass of quantised parts, traced for itself.

A graph of Dynamo shows one `linear`. A trace of that call, on the parts that the subclass is made of, shows the
operators; it is read like any other graph and then thrown away.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from torch_fuse._compat import FakeTensorMode, is_traceable_wrapper_subclass, no_guards, trace_operators
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.dequant import Product, match_product
from torch_fuse.graph.library_ops import check_not_kept, spell_qbytes_mm
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import tensor

_VIEWS = ("view", "reshape", "flatten", "contiguous", "clone", "unsqueeze", "squeeze")


@dataclass(frozen=True)
class Traced:
    """A linear layer without its bias, as operators on the parts of its weight.

    Attributes:
        gm: the trace; its inputs are x and the parts.
        parts: the parts, with the name of the attribute of the weight that each is.
        product: the matrix product in it.
        result: what the trace returns.
    """

    gm: GraphModule
    parts: dict[Node, str]
    product: Product
    result: Node

    def emit(self, node: Node, weight: Node, call: Callable[..., Node]) -> Node:
        """A value of the trace that depends on the weight's parts alone, in the graph that was traced from.

        Args:
            node: the value.
            weight: the weight there.
            call: emits a call of a function or a method there, as `Builder.call` does.
        """
        if node in self.parts:
            return call(getattr, weight, self.parts[node])
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: self.emit(source, weight, call))
        return call(node.target, *args, **kwargs)

    def check_end(self, end: Node) -> None:
        """Raises Miss unless the trace returns `end`, behind views."""
        node = self.result
        while node is not end:
            source = _viewed(node)
            if source is None:
                raise Miss(f"its subclass does more than a product: {node.name}", node)
            node = source


def is_packed(weight: Node | None) -> bool:
    """Whether a weight is a tensor subclass with a part of at most a byte an element."""
    found = tensor(weight)
    if found is None or not is_traceable_wrapper_subclass(found):
        return False
    parts = [getattr(found, name) for name in found.__tensor_flatten__()[0]]
    return any(isinstance(x, Tensor) and x.dtype.itemsize == 1 and 2 * x.numel() >= found.numel() for x in parts)


def packed_source(weight: Node | None) -> Node | None:
    """The tensor subclass of quantised parts that a weight is, or is cast from; None for other weights."""
    if is_packed(weight):
        return weight
    call = call_of(weight)
    source = None if call is None or call.op != "cast" or call.inplace else call["input"]
    return source if is_packed(source) else None


def trace_linear(x: Node, weight: Node, mode: FakeTensorMode | None, cast: torch.dtype | None = None) -> Traced:
    """Traces linear(x, weight) for a weight of a tensor subclass, cast to a type where one is given.

    Raises:
        Miss: when it is not one product of x with something.
        Kept: when it is a library's product that reads the codes.
    """
    found, activation = tensor(weight), tensor(x)
    assert found is not None and activation is not None
    names, context = found.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(found, name) for name in names]
    if any(not isinstance(part, Tensor) or is_traceable_wrapper_subclass(part) for part in parts):
        raise Miss("its weight is a tensor subclass of tensor subclasses", weight)

    def linear(x: Tensor, *parts: Tensor) -> Tensor:
        inner = dict(zip(names, parts, strict=True))
        kind: Any = type(found)
        rebuilt = kind.__tensor_unflatten__(inner, context, found.shape, found.stride())
        return F.linear(x, rebuilt if cast is None else rebuilt.to(cast))

    try:
        with no_guards(mode), torch.no_grad():
            # of other strides torch makes a product of batches, of which each has the same weight
            rows = torch.empty_like(activation.detach(), memory_format=torch.contiguous_format)
            gm = trace_operators(linear, (rows, *(part.detach() for part in parts)))
    except Exception as error:
        raise Miss(f"its tensor subclass cannot be traced: {error}", weight) from error
    _respell(gm)
    first, *others = [node for node in gm.graph.nodes if node.op == "placeholder"]
    result: Any = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    for node in gm.graph.nodes:
        check_not_kept(node)
    products = [product for node in gm.graph.nodes if (product := match_product(node)) is not None]
    if len(products) != 1 or not isinstance(result, Node):
        calls = ", ".join(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        raise Miss(f"its tensor subclass is not one matrix product: {calls}", weight)
    source: Node | None = products[0].input
    while source is not None and source is not first:
        source = _viewed(source)
    if source is None:
        raise Miss("its tensor subclass changes the activations before the product", weight)
    return Traced(gm, dict(zip(others, names, strict=True)), products[0], result)


def _viewed(node: Node) -> Node | None:
    """What a node shows in another shape, or unchanged."""
    call, after = call_of(node), tensor(node)
    source = None if call is None else call.args.get("input")
    before = tensor(source)
    if call is None or before is None or after is None or not isinstance(source, Node):
        return None
    same = call.op == "cast" and before.dtype == after.dtype and before.device == after.device
    return source if call.op in _VIEWS or same else None


def _advanced_index(x: Any, indices: Any) -> tuple[Any, Any]:
    return x, tuple(slice(None) if index is None else index for index in indices)


_RESPELLED = {
    "mm": torch.matmul, "bmm": torch.matmul, "_unsafe_view": torch.reshape, "detach": None, "alias": None,
    "lift_fresh_copy": None,
}  # fmt: skip


def _respell(gm: GraphModule) -> None:
    """Spells ATen's operators as `call_of` reads them."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = str(node.target).split(".")[1]
        if str(node.target).startswith("quanto.qbytes_mm"):
            spell_qbytes_mm(gm.graph, node)
            continue
        if name == "index":
            node.target, node.args = operator.getitem, _advanced_index(*node.args)
            continue
        if name == "_to_copy":
            with gm.graph.inserting_before(node):
                new = gm.graph.call_method("to", node.args, dict(node.kwargs))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        elif name in _RESPELLED:
            target = _RESPELLED[name]
            if target is None:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                node.target = target
