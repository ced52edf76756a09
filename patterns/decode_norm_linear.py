"""The linear layers behind a norm, for a few rows: norm, product, bias and activation of all of them in one launch.

Before: qkv = linear(layer_norm(x, w1, c1), Wq, bq);  h = gelu(linear(layer_norm(x, w2, c2), Wu, bu))    # GPT-NeoX
        q, k, v = (linear(rms_norm(x), W) for W in (Wq, Wk, Wv))                                       # Llama
        h = silu(linear(rms_norm(x), Wg)) * linear(rms_norm(x), Wu)
After:  qkv, h = norm_linear_gemv(x, [Wq, Wu], ...);  q, k, v = norm_linear_gemv(x, [Wq, Wk, Wv], ...)
        h = norm_linear_gemv(x, [Wg, Wu], ..., gated=True)

For decoding with any of transformers' models. The time is that of reading the weights, plus about 2 us for each launch
that waits for the one before: a layer has fewer of them, and none for the norms of one row.
Wins on CUDA for few rows: products with a bias go to the GEMM library otherwise, which reads at three quarters of the
speed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from torch_fuse._compat import is_traceable_wrapper_subclass
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.linear import Linear, match_linear
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.norm import Norm, match_norm, norms_of, strip_casts
from torch_fuse.graph.values import same_shape, static_int, tensor
from torch_fuse.kernels import norm_linear_gemv
from torch_fuse.kernels._measured import not_hopper
from torch_fuse.options import Options
from torch_fuse.patterns import _decode_norm_linear_examples as examples
from torch_fuse.patterns._activation_behind import gelu_behind
from torch_fuse.patterns._early_launch import may_launch_early
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

FEW_ROWS = 8


@dataclass(frozen=True)
class Output:
    """One result: of one linear layer, or of the two of a gated unit, and the activation behind it."""

    node: Node
    norm: Norm
    linears: tuple[Linear, ...]
    activation: str
    nodes: frozenset[Node]


@register
class DecodeNormLinear(Pattern):
    """Norm, linear layers and activation of a few rows in one launch that streams the weights."""

    name = "decode_norm_linear"
    kind = "norm_linear"
    op = "torch_fuse::norm_linear_gemv"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        norm = match_norm(anchor)
        if norm is None or not few_rows(norm.input):
            return None
        norms = [found for found in norms_of(norm.input) if _linears(found)]
        if not norms or norms[0].node is not norm.node:
            return None  # reported with the first of the norms
        same = [other for other in norms if _alike(other, norm)]
        for linear in (linear for other in same for linear in _linears(other)):
            check_stored(view, linear)
        outputs = [output for other in same for output in _outputs(other, view.order)]
        _check(norm, outputs)
        weights = [linear.weight for output in outputs for linear in output.linears]
        biases = [linear.bias for output in outputs for linear in output.linears]
        affine = [node for other in same for node in (other.weight, other.bias)]
        inputs = tuple(node for node in (norm.input, *weights, *biases, *affine) if node is not None)
        replaced = tuple(sorted((output.node for output in outputs), key=view.order.index.__getitem__))
        region = frozenset().union(*(output.nodes for output in outputs), *(other.nodes for other in same))
        note = f"{len(weights)} weight(s) behind {len(same)} {norm.kind} norm(s), {rows_of(norm.input)} row(s)"
        early = may_launch_early(view.order, inputs[1:], norm.input)
        return Match(anchor, {"norm": norm, "outputs": outputs, "early": early}, replaced, region, inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        norm, outputs = match.bindings["norm"], match.bindings["outputs"]
        inside = {node for output in outputs for linear in output.linears for node in linear.nodes}
        for other in {output.norm.node for output in outputs}:
            if any(user not in match.region and user not in inside for user in other.users):
                return "the normalised value is read elsewhere too"
        if reason := of_subclass(match.inputs):
            return reason
        if options.kernels == "reference":
            return None
        reason = None if options.unmeasured else unmeasured(norm.input)
        if reason is not None:
            return reason
        weights = [tensor(linear.weight) for output in outputs for linear in output.linears]
        x = tensor(norm.input)
        assert x is not None
        for weight in weights:
            reason = norm_linear_gemv.supports(x, [weight])  # type: ignore[list-item]
            if reason is not None:
                return f"the kernel cannot run: {reason}"
        return too_many_rows(norm.input)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        outputs: list[Output] = match.bindings["outputs"]
        plain = [output for output in outputs if len(output.linears) == 1]
        calls = [[output] for output in outputs if len(output.linears) == 2]
        calls += [
            plain[i : i + norm_linear_gemv.MAX_WEIGHTS] for i in range(0, len(plain), norm_linear_gemv.MAX_WEIGHTS)
        ]
        changed: dict[Node, Node] = {}
        for group in calls:
            early = options.early_launch and match.bindings["early"]
            new = _emit(match.bindings["norm"], group, early, options, builder)
            changed |= {output.node: builder.call(operator.getitem, new, i) for i, output in enumerate(group)}
        return changed

    def spellings(self) -> Iterator[Example]:
        return examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        return examples.near_misses()


def _emit(norm: Norm, group: list[Output], early: bool, options: Options, builder: Builder) -> Node:
    linears = [(linear, output) for output in group for linear in output.linears]
    names = [output.activation if linear is output.linears[0] else "none" for linear, output in linears]
    return builder.call(
        norm_linear_gemv.reference if options.kernels == "reference" else norm_linear_gemv.norm_linear_gemv,
        norm.input,
        [linear.weight for linear, _ in linears],
        [linear.bias for linear, _ in linears],
        [output.norm.weight for _, output in linears],
        [output.norm.bias for _, output in linears],
        norm.kind,
        norm.eps,
        norm.weight_offset,
        ",".join(names),
        len(group[0].linears) == 2,
        early,
    )


def few_rows(node: Node) -> bool:
    """Whether a value [..., K] is known to have one to eight rows."""
    rows = rows_of(node)
    return rows is not None and 1 <= rows <= FEW_ROWS


def of_subclass(nodes: Iterable[Node]) -> str | None:
    """Why an op of our own may not read these values, or None: a subclass knows PyTorch's operators only."""
    found = next((node for node in nodes if is_traceable_wrapper_subclass(tensor(node))), None)
    return None if found is None else f"{found.name} is of a tensor subclass, which decides itself what is computed"


def unmeasured(node: Node) -> str | None:
    """Why a decoding step is not measured to win for a value of it, or None (benchmarks/results/decode.jsonl)."""
    found = tensor(node)
    assert found is not None
    if found.dtype not in (torch.float16, torch.bfloat16):
        return f"a decoding step is not measured to win in {found.dtype}"
    return not_hopper(found.device)


def too_many_rows(node: Node) -> str | None:
    """Why the kernels do not pay for the rows of a value, or None: tensor cores have no exact fp32."""
    rows, found = rows_of(node), tensor(node)
    most = 1 if found is None or found.dtype == torch.float32 else FEW_ROWS
    return None if rows is not None and rows <= most else f"{rows} rows: it is known to pay up to {most}"


def check_stored(view: GraphView, linear: Linear) -> None:
    """Raises Kept for a layer whose weight is quantised: it would be written out to be read again."""
    if not linear.nodes.isdisjoint(view.candidates("dequant")):
        raise Kept("a weight is quantised, which `dequant_linear` reads as it is stored", linear.node)


def check_bias(linear: Linear) -> None:
    """Raises Miss unless a layer's bias has one number for each of its results; sums broadcast."""
    bias, weight = tensor(linear.bias), tensor(linear.weight)
    if bias is not None and weight is not None and not same_shape(bias.shape, weight.shape[:1]):
        raise Miss(f"the bias has shape {list(bias.shape)}; the op adds one number a column", linear.node)


def rows_of(node: Node) -> int | None:
    found = tensor(node)
    sizes = [] if found is None else [static_int(size) for size in found.shape[:-1]]
    return None if found is None or found.dim() < 2 or None in sizes else math.prod(size or 0 for size in sizes)


def _alike(other: Norm, norm: Norm) -> bool:
    same = (other.kind, other.eps, other.weight_offset) == (norm.kind, norm.eps, norm.weight_offset)
    return same and (other.weight is None, other.bias is None) == (norm.weight is None, norm.bias is None)


def _check(norm: Norm, outputs: list[Output]) -> None:
    """Raises Miss unless the op computes these outputs."""
    x = tensor(norm.input)
    if norm.eps is None:
        raise Miss("the norm's epsilon is no constant", norm.node)
    for output in outputs:
        result = tensor(output.node)
        assert x is not None and result is not None
        if result.requires_grad:
            raise Miss("gradients are wanted, and the op for a few rows has none", output.node)
        if result.dtype != x.dtype:
            raise Miss(f"the result is {result.dtype}, the input of the norm {x.dtype}", output.node)
        for vector in (output.norm.weight, output.norm.bias):
            if vector is not None and tensor(vector).dim() != 1:  # type: ignore[union-attr]
                raise Miss("the norm's weight has more than one dimension", output.norm.node)
        for linear in output.linears:
            if linear.transposed:
                raise Miss("the weight is stored with its input dimension first", linear.node)
            if tensor(linear.weight).dtype != x.dtype:  # type: ignore[union-attr]
                raise Miss("weight and input differ in dtype", linear.node)
            check_bias(linear)


def _linears(norm: Norm) -> list[Linear]:
    """The linear layers that read a norm, in the graph's order; a bias added later is part of its layer."""
    found: dict[Node, Linear] = {}
    for user in sorted(norm.node.users):
        linear = match_linear(user)
        if linear is None or strip_casts(linear.input) is not norm.node or user in (linear.weight, linear.bias):
            continue
        for later in user.users if linear.bias is None and len(user.users) == 1 else ():
            biased = match_linear(later)
            if biased is not None and biased.bias is not None and biased.weight is linear.weight:
                linear = biased
        found[linear.node] = linear
    return list(found.values())


def _outputs(norm: Norm, order: Order) -> list[Output]:
    linears = {linear.node: linear for linear in _linears(norm)}
    outputs: list[Output] = []
    taken: set[Node] = set()
    for node, linear in linears.items():
        gated = _gated(node, linears)
        if gated is not None:
            product, silu, other = gated
            both = (linear, linears[other])
            inside = both[0].nodes | both[1].nodes | {silu, product}
            outputs.append(Output(product, norm, both, "silu", inside))
            taken |= {node, other}
    for node, linear in linears.items():
        if node not in taken:
            outputs.append(_with_gelu(linear, norm, order))
    return outputs


def _gated(node: Node, linears: dict[Node, Linear]) -> tuple[Node, Node, Node] | None:
    """(product, silu, other) of silu(node) * other, for two of the linear layers that nothing else reads."""
    if len(node.users) != 1:
        return None
    (silu,) = node.users
    call = call_of(silu)
    if call is None or call.op != "silu" or call.inplace or len(silu.users) != 1:
        return None
    (product,) = silu.users
    call = call_of(product)
    if call is None or call.op != "mul" or call.inplace:
        return None
    other = call["other"] if call["input"] is silu else call["input"]
    if other not in linears or other is node or len(other.users) != 1:
        return None
    return product, silu, other


def _with_gelu(linear: Linear, norm: Norm, order: Order) -> Output:
    """A linear layer with the GELU behind it, when nothing else reads the layer's result."""
    found = gelu_behind(linear.node, linear.nodes, order)
    if found is None or any(user not in linear.nodes for n in linear.nodes - {linear.node} for user in n.users):
        return Output(linear.node, norm, (linear,), "none", linear.nodes)
    node, name, nodes = found
    return Output(node, norm, (linear,), name, linear.nodes | nodes)
