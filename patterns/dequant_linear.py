"""A linear layer whose weight is computed in the graph from a quantised one, with the codes read by the product.

Before: linear(x, ((codes.float() - zero) * scale).to(x.dtype), b)   # or any other way to write that; shifts; blocks
        linear(x, codes.to(x.dtype)) * scale
After:  torch_fuse.dequant_linear(x, codes, scale, zero, lut, b, <format>)
        # and, for a few rows: linear(gelu(linear(...))) has the activation in the op of the inner one

For weight-only quantised models: int8 (a scale a row, a tensor, a group), int4 (every order of nibbles), 8-bit floats,
tables of 16 (NF4, IQ4), GGUF's blocks, HQQ, GPTQ without reordering, PT2E, optimum-quanto. Inductor writes the
dequantised weight out and reads it again: 4.5 bytes a weight instead of half a byte.

What the graph computes is found out by running it on random weights (`_packed_formats`). The parts are read where they
lie at each call, so a weight that is updated later counts from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from torch_fuse.graph.closure import Closure, closure_of
from torch_fuse.graph.dequant import OutputScale, Product, match_output_scale, match_product
from torch_fuse.graph.effects import Order
from torch_fuse.graph.library_ops import check_not_kept
from torch_fuse.graph.linear import into_linears
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.subclass import Traced, packed_source, trace_linear
from torch_fuse.graph.values import storages, tensor
from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import dequant_linear
from torch_fuse.options import Options
from torch_fuse.patterns import _dequant_examples as examples
from torch_fuse.patterns._activation_behind import activation_behind
from torch_fuse.patterns._dequant_refusals import no_kernel, reason_unmeasured, rows_of, unlike_the_op
from torch_fuse.patterns._packed_formats import read
from torch_fuse.patterns._packed_parts import Reading
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class DequantLinear(Pattern):
    """A linear layer that reads its quantised weight as it is stored."""

    name = "dequant_linear"
    kind = "dequant"
    op = "torch_fuse::dequant_linear"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return view.candidates("dequant")

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        check_not_kept(anchor)
        outer = match_product(anchor)
        if outer is None:
            return None
        packed = packed_source(outer.weight)
        traced = None if packed is None else _traced(outer, packed, view)
        product, order = (outer, view.order) if traced is None else (traced.product, Order(traced.gm.graph))
        closures = [closure_of(product, order, peel) for peel in (True, False)]
        scaled = None if closures[0].others else match_output_scale(product)
        end = product.node if scaled is None else scaled.node
        region, read_by_op = {anchor, outer.weight}, [outer.input, packed or outer.weight]
        if traced is not None:
            traced.check_end(end)
            end = anchor
        else:
            region = {node for found in closures for node in found.nodes} | product.nodes
            read_by_op = [product.input, *(leaf for found in closures for leaf in (*found.leaves, *found.steps))]
            if scaled is not None:
                region |= scaled.nodes
                read_by_op.append(scaled.scale)
        if outer.bias is not None:
            read_by_op.append(outer.bias)
        behind = _epilogue(end, region, outer, view.order)
        if behind is not None:
            end, _, nodes = behind
            region |= nodes
        inputs = tuple(dict.fromkeys(read_by_op))
        bindings = {"outer": outer, "product": product, "closures": closures, "scaled": scaled, "traced": traced,
                    "packed": packed, "activation": "none" if behind is None else behind[1]}  # fmt: skip
        note = f"weight {list(product.shape)}" + ("" if behind is None else f", {behind[1]}")
        return Match(anchor, bindings, (end,), frozenset(region - set(inputs)), inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        product: Product = match.bindings["product"]
        reason = unlike_the_op(match.bindings["outer"], product, match.bindings["scaled"])
        if reason is not None:
            return reason
        if options.kernels != "reference":
            device = tensor(product.node).device  # type: ignore[union-attr]
            reason = dequant_linear.supports_device(device)
            if reason is not None:
                return reason
            reason = None if options.unmeasured else reason_unmeasured(match.bindings["outer"], device, options)
            if reason is not None:
                return reason
        found = _read(match)
        if options.kernels != "reference":
            return no_kernel(match.bindings["outer"], *found, options)
        return None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        outer: Product = match.bindings["outer"]
        traced: Traced | None = match.bindings["traced"]
        scaled: OutputScale | None = match.bindings["scaled"]
        closure, reading = _read(match)

        def here(node: Node) -> Node:
            return node if traced is None else traced.emit(node, match.bindings["packed"], builder.call)

        op = dequant_linear.reference if options.kernels == "reference" else dequant_linear.dequant_linear
        leaves = [here(leaf) if traced is not None else _viewed_first(leaf, builder) for leaf in closure.leaves]
        parts: list[Node | None] = [
            None if part is None else part.emit(leaves, builder)
            for part in (reading.codes, reading.scale, reading.zero, reading.lut)
        ]
        if scaled is not None:
            parts[1] = builder.call("reshape", here(scaled.scale), -1, 1)
        for node, (a, b) in closure.steps.items():
            _expect_steps(here(node), a, b, builder)
        activation: str = match.bindings["activation"]
        epilogue = () if activation == "none" else (activation,)
        new = builder.call(op, outer.input, *parts, outer.bias, *reading.form, *epilogue)
        return {match.replaced[0]: new}

    def spellings(self) -> Iterator[Example]:
        yield from examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        yield from examples.near_misses()


def _traced(outer: Product, packed: Node, view: GraphView) -> Traced:
    """The layer of a tensor subclass as operators.

    Raises:
        Miss: when it is not a product with the subclass.
        Kept: when others read the weight that a subclass was cast to.
    """
    if packed is outer.weight:
        return trace_linear(outer.input, packed, view.fake_mode)
    weight = tensor(outer.weight)
    assert weight is not None
    reader = next((user for user in outer.weight.users if user is not outer.node), None)
    if reader is not None:
        raise Kept(f"{reader.name} reads the dequantised weight too, which is then written out anyway", reader)
    return trace_linear(outer.input, packed, view.fake_mode, weight.dtype)


def _viewed_first(leaf: Node, builder: Builder) -> Node:
    """A slice of bytes viewed as floats, such as GGUF's scales, as a slice of all the bytes viewed as floats.

    It is the same memory. But Inductor copies a slice before such a view, and once more to give it the strides of the
    view: together more than the weight. Other leaves are returned as they are.
    """
    if leaf.op != "call_method" or leaf.target != "view" or not isinstance(leaf.args[1], torch.dtype):
        return leaf
    dtype, node = leaf.args[1], leaf.args[0]
    sliced = tensor(node)
    if not isinstance(node, Node) or sliced is None or sliced.dim() == 0 or sliced.itemsize >= dtype.itemsize:
        return leaf
    ratio, kept = dtype.itemsize // sliced.itemsize, storages(node)
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        whole = tensor(node)
        if whole is None:  # the pieces of a split
            continue
        if storages(node) != kept or whole.dtype != sliced.dtype or whole.stride() != sliced.stride():
            break
        start = sliced.storage_offset() - whole.storage_offset()
        if not all(isinstance(number, int) for number in (start, *whole.shape, *whole.stride())):
            break
        fits = whole.stride(-1) == 1 and 0 <= start <= whole.shape[-1] - sliced.shape[-1]
        whole_numbers = (start, whole.shape[-1], *whole.stride()[:-1])
        if whole.shape[:-1] == sliced.shape[:-1] and fits and all(number % ratio == 0 for number in whole_numbers):
            viewed = builder.call("view", node, dtype)
            return builder.call("narrow", viewed, -1, start // ratio, sliced.shape[-1] // ratio)
    return leaf


def _epilogue(
    end: Node, before: set[Node], outer: Product, order: Order
) -> tuple[Node, str, frozenset[Node]] | None:  # fmt: skip
    """(result, name, nodes) of the activation that the op computes too; None where that saves no launch.

    Where the activation is multiplied by something, or normalised, Inductor has a launch for that, and computes the
    activation in it.
    """
    result = tensor(end)
    if result is None or result.requires_grad or not dispatch.has_epilogue(rows_of(outer)):
        return None
    found = activation_behind(end, before, order)
    return found if found is not None and into_linears(found[0]) else None


def _expect_steps(node: Node, a: int, b: int, builder: Builder) -> None:
    """Raises, on the device and at each call, when a leaf no longer is arange(numel) * a // b."""
    found = tensor(node)
    assert found is not None
    places = builder.call(torch.arange, found.numel(), device=found.device)
    wanted = builder.call("floor_divide", builder.call("mul", places, a), b)
    same = builder.call("all", builder.call("eq", builder.call("flatten", node), wanted))
    builder.call(torch._assert_async, same, f"{node.name} has changed since the model was compiled; compile it again")


def _read(match: Match) -> tuple[Closure, Reading]:
    """What the weight is, proven; remembered in the match.

    Raises:
        Miss: when no format computes it.
    """
    if "reading" not in match.bindings:
        product: Product = match.bindings["product"]
        peeled, whole = match.bindings["closures"]
        scaled: OutputScale | None = match.bindings["scaled"]
        if scaled is not None:
            scale = tensor(scaled.scale)
            assert scale is not None
            output = (1 if scale.numel() == product.shape[0] else product.shape[0], str(scale.dtype).partition(".")[2])
            match.bindings["reading"] = peeled, read(peeled, product.shape, product.transposed, output)
            return match.bindings["reading"]
        try:
            match.bindings["reading"] = peeled, read(peeled, product.shape, product.transposed)
        except Miss:
            if [*peeled.leaves] == [*whole.leaves]:
                raise
            match.bindings["reading"] = whole, read(whole, product.shape, product.transposed)
    found: tuple[Closure, Reading] = match.bindings["reading"]
    return found
