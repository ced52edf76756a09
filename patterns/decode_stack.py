"""All layers of a decoder for one token of one sequence, with the final norm and the lm_head, in one launch.

Before: y, h = norm_linear_gemv(x, [Wqkv, Wup], ...)                                     # GPT-NeoX, in every layer
        x = linear_residual_gemv(x, decode_attention(y, ...), Wo, bo, h, Wd, bd)
        q, k, v = norm_linear_gemv(x, [Wq, Wk, Wv], ...)                                 # Llama, in every layer
        x = linear_residual_gemv(x, decode_attention(q, k, v, ...), Wo, None)
        x = linear_residual_gemv(x, *norm_linear_gemv(x, [Wg, Wu], ..., gated=True), Wd, None)
        logits = linear(norm(x), W_head)
After:  logits = decode_stack(x, ...)

For transformers' models with a StaticCache whose layers the three patterns before it have replaced: GPT-NeoX with
parallel or sequential residual, Llama, Mistral, Qwen2. Layers of one geometry that follow each other become one op,
two at least; hidden states that something else reads end a stack.
Wins on NVIDIA GPUs of compute capability 9.0: the weights of all layers stream without a pause, where each launch of
a layer waits for the one before and fills and drains its own loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import no_guards
from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import equal, same_shape, storages, tensor, unequal, value
from torch_fuse.kernels import decode_attention, decode_stack, in_memory
from torch_fuse.options import Options
from torch_fuse.patterns import _decode_stack_examples as examples
from torch_fuse.patterns._decode_head import Head, match_head
from torch_fuse.patterns._decode_layers import Geometry, Layer, is_call, match_layer, tensors_of
from torch_fuse.patterns.decode_norm_linear import unmeasured
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class DecodeStack(Pattern):
    """All layers of a decoding step, with the final norm and the lm_head, in one launch."""

    name = "decode_stack"
    op = "torch_fuse::decode_stack"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        """Where each run of layers ends; the attention of a layer that is not recognised."""
        return [anchor for anchor, _ in _runs(view)]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        found = dict(_runs(view)).get(anchor)
        if found is None:
            return None
        if isinstance(found, Miss):
            raise found
        try:
            return _match(found, match_head(found[-1]), view, ", the final norm and the lm_head")
        except Miss as miss:
            return _match(found, None, view, f", without the lm_head: {miss.reason}")

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        stream = match.bindings["layers"][0].stream
        if not options.unmeasured and (reason := unmeasured(stream)):
            return reason
        with no_guards(match.bindings["mode"]):
            reason = decode_stack.supports(*match.bindings["fake"])
        return None if reason is None else f"the kernel cannot run: {reason}"

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        layers: list[Layer] = match.bindings["layers"]
        lengths = [_counted(layer, builder) for layer in layers] if match.bindings["counted"] else []
        new = builder.call(decode_stack.decode_stack, *_arguments(layers, match.bindings["head"], lengths))
        (old,) = match.replaced
        if not same_shape(value(old).shape, value(new).shape):
            new = builder.call("view", new, *value(old).shape)
        return {old: new}

    def spellings(self) -> Iterator[Example]:
        return examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        return examples.near_misses()


# -- runs of layers ------------------------------------------------------------------------------------------------


def _runs(view: GraphView) -> list[tuple[Node, list[Layer] | Miss]]:
    """The longest runs of layers of one geometry, with where they end; why a layer is in none, with its attention."""
    found: list[tuple[Node, list[Layer] | Miss]] = []
    runs: dict[Node, list[Layer]] = {}  # by their last layer's result
    apart: dict[Node, Miss] = {}  # why a layer does not go on with the one before, or that one with it
    for node in view.gm.graph.nodes:  # a view may be older than the stack before
        if not is_call(node, decode_attention):
            continue
        try:
            layer = match_layer(node)
        except Miss as miss:
            found.append((node, miss))
            continue
        run = runs.pop(layer.stream, [])
        if run and (between := _apart(run[-1], layer, view.order)) is not None:
            runs[layer.stream], run = run, []
            apart.setdefault(layer.stream, between)
            apart[layer.out] = between
        runs[layer.out] = [*run, layer]
    for out, run in runs.items():
        if len(run) > 1:
            found.append((out, run))
        else:
            found.append((run[0].attention, apart.get(out, Miss("no layer in front of it or behind it", out))))
    return found


def _apart(first: Layer, second: Layer, order: Order) -> Miss | None:
    """Why two layers that follow each other cannot be in one stack."""
    for user in first.out.users:
        if user not in second.nodes:
            return Kept(f"{user.name} reads the hidden state between two layers", user)
    for name, a, b in zip(Geometry._fields, first.geometry, second.geometry, strict=True):
        if a != b:
            return Miss(f"layers differ in {name}: {a} and {b}", second.attention)
    if not all(_same_table(a, b, order) for a, b in zip(first.tables, second.tables, strict=True)):
        return Miss("layers differ in their tables of cosines and sines", second.attention)
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    for (name, a), (_, b) in pairs:
        if name in ("lengths", "positions"):
            continue
        # SDPA takes one mask for caches of its length only, also where the sizes have symbols of their own.
        masked = name in ("key_caches", "value_caches") and first.mask is second.mask
        if not (_same_sizes_but_length(a, b) if masked else _same_kind(a, b)):
            return Miss(f"layers differ in the shape or type of {name}", second.attention)
    return None


def _same_table(a: Node | None, b: Node | None, order: Order) -> bool:
    """Whether two tables have the same values; each layer may have kept a view of one in memory for itself."""
    sources = [x.args[0] if x is not None and is_call(x, in_memory) else x for x in (a, b)]
    return a is b or order.same_value(*sources)


def _same_kind(a: Node | None, b: Node | None) -> bool:
    """Whether two tensors have the same shape, strides, dtype and device, or are both missing."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None:
        return a is b
    if (x.dtype, x.device) != (y.dtype, y.device) or not same_shape(x.shape, y.shape):
        return False
    return same_shape(x.stride(), y.stride())


def _same_sizes_but_length(a: Node | None, b: Node | None) -> bool:
    """Whether two caches [1, H, S, D] have the same shape, strides, dtype and device, if S is the same."""
    x, y = tensor(a), tensor(b)
    assert x is not None and y is not None
    if (x.dtype, x.device) != (y.dtype, y.device) or not all(equal(x.shape[i], y.shape[i]) for i in (0, 1, 3)):
        return False
    return not any(unequal(*pair) for pair in zip((x.shape[2], *x.stride()), (y.shape[2], *y.stride()), strict=True))


# -- the match -----------------------------------------------------------------------------------------------------


def _match(
    layers: list[Layer], head: Head | None, view: GraphView, behind: str = ", the final norm and the lm_head"
) -> Match:
    """The match of a run of layers.

    Raises:
        Miss: when something else sees or changes what the layers write, before all of them have.
    """
    result = layers[-1].out if head is None else head.logits
    region = frozenset().union(*(layer.nodes for layer in layers), () if head is None else head.nodes)
    positions = {layer.positions for layer in layers}
    counted = len(positions) > 1 or None in positions
    written = [node for layer in layers for node in (*layer.caches, layer.length) if node is not None]
    read = [layers[0].stream, *(() if head is None else head.arguments)]
    for layer in layers:
        read += [node for _, node in tensors_of(layer)]
    inputs = tuple(dict.fromkeys(node for node in read if node is not None))
    _check_written(written, inputs, region, result, view)
    arguments = _arguments(layers, head, [layer.length for layer in layers] if counted else [])
    bindings = {
        "layers": layers,
        "head": head,
        "counted": counted,
        "fake": _fake(arguments, view),
        "mode": view.fake_mode,
    }
    kind = "parallel" if layers[0].geometry.parallel else "sequential"
    return Match(result, bindings, (result,), region, inputs, f"{len(layers)} {kind} layers{behind}")


def _check_written(
    written: list[Node], inputs: tuple[Node, ...], region: frozenset[Node], result: Node, view: GraphView
) -> None:
    """Raises Miss unless caches and counters are apart from all else, and unseen until the stack is computed."""
    found = [storages(node) for node in written]
    together = set().union(*found)
    if sum(map(len, found)) != len(written) or len(together) != len(written):
        raise Miss("caches or counters share memory, with each other or between layers", result)
    device = value(result).device
    for node in (*inputs, *written):
        if value(node).device != device:  # a counter without dimensions may be anywhere
            raise Miss(f"{node.name} is on {value(node).device}, the result on {device}", node)
        if node not in written and storages(node) & together:
            raise Miss(f"{node.name} shares memory with a cache", node)
    for node in view.gm.graph.nodes:
        if node in result.users:
            break
        if node not in region and any(storages(source) & together for source in node.all_input_nodes):
            raise Kept(f"{node.name} reads a cache or its counter before the last layer is done", node)


def _counted(layer: Layer, builder: Builder) -> Node:
    """The counter of a layer; for one whose position the graph computes, a counter of its own that ends here."""
    if layer.length is not None:
        return layer.length
    position = builder.call("select", layer.positions, 0, 0)
    return builder.call("clone", builder.call("to", position, torch.int64))


def _arguments(layers: list[Layer], head: Head | None, lengths: list[Any]) -> list[Any]:
    """The op's arguments; masks that are one are given once."""
    lists = {name: [node for layer in layers for node in layer.weights[name]] for name in layers[0].weights}
    masks = list(dict.fromkeys(layer.mask for layer in layers))
    options = [list(x) if isinstance(x, tuple) else x for x in layers[0].geometry]
    return [
        layers[0].stream,
        *lists.values(),
        *layers[0].tables,
        *([layer.caches[i] for layer in layers] for i in (0, 1)),
        lengths,
        None if lengths else layers[0].positions,
        masks if len(masks) == 1 else [layer.mask for layer in layers],
        *((None,) * 4 if head is None else head.arguments),
        *options[:-2],
        *([] if layers[0].head_norms[i] is None else [layer.head_norms[i] for layer in layers] for i in (0, 1)),
        *options[-2:],
    ]


def _fake(arguments: list[Any], view: GraphView) -> decode_stack.Stack:
    """The arguments as fake tensors; a counter that is not there yet is like any other."""
    with no_guards(view.fake_mode):
        given = decode_stack.Stack(*map_arg(arguments, value))
        counter = given.x.new_empty((), dtype=torch.int64)
        return given._replace(lengths=[counter if length is None else length for length in given.lengths])
