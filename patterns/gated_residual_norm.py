"""A residual sum, the norms that read it and their modulation in one kernel.

Before: r = x + gate * y;  h = layer_norm(r) * (1 + scale) + shift           # Wan, DiT, SD3, Flux
        r = mlp + attention + x;  h1, h2 = layer_norm(r, w1, b1), layer_norm(r, w2, b2)    # GPT-NeoX
        r = x + y;  h = rms_norm(r) * w                                      # Llama, Qwen, Phi, BERT
After:  r, h1, h2 = gated_residual_norm(x, y1, y2, gate1, gate2, w1, b1, w2, b2, scale, shift)

Inductor fuses the same operators into one kernel, whose loop reads rows of more than 1,024 lanes twice, and in training
adds two kernels; ours keeps the row in registers, in the backward too, takes the statistics of two norms once, and
writes r only where something reads it. Wins on CUDA for wide rows and many tokens; with gradients it is not measured,
and fires only with options["unmeasured"]. The terms have to be in memory anyway (results of products, attention and
custom ops) and the result has to be read from memory: otherwise Inductor fuses its neighbours, too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.memory import in_memory, read_from_memory
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.norm import match_norm, strip_casts
from torch_fuse.graph.residual_norm import Result, Sum, match_results, match_sum
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor
from torch_fuse.kernels import gated_residual_norm
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Rows of up to 1,024 lanes Inductor keeps in registers, too: 18.1 us against 19.5 for 16,384 x 768 on an H200.
MIN_WIDTH = 1032
# Fewer elements, and the call is bound by launches, of which this op costs more: Wan at 1,560 tokens.
MIN_ELEMENTS = 2**22


@register
class GatedResidualNorm(Pattern):
    """Residual sum, LayerNorm or RMSNorm and adaLN modulation in one pass over the rows."""

    name = "gated_residual_norm"
    kind = "norm_linear"
    op = "torch_fuse::gated_residual_norm"
    across_autocast = True  # the op's arithmetic is in the types that it is told

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return [node for node in view.nodes if match_norm(node) is not None]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        norm = match_norm(anchor)
        if norm is None or (shape := tensor(norm.input)) is None or shape.dim() not in (2, 3):
            return None
        total = match_sum(norm)
        results = match_results(norm, total)
        if not results or anchor is not results[0].norm.node:
            return None  # a part of a longer spelling, or the second norm of a sum
        if not total.terms and len(results) == 1 and results[0].modulation is None:
            return None
        if norm.eps is None:
            raise Miss("its epsilon is no constant", anchor)
        region = _closed(total, results)
        r_is_read = bool(total.terms) and any(user not in region for user in total.node.users)
        replaced = {result.node for result in results} | ({total.node} if r_is_read else set())
        inputs = _inputs(total, results)
        _check_dtypes(total, results, inputs)
        bindings = {"sum": total, "results": results, "r_is_read": r_is_read,
                    "kept": _no_profit(total, results, region)}  # fmt: skip
        note = _describe(total, results)
        return Match(anchor, bindings, tuple(sorted(replaced)), frozenset(region), inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        x = tensor(match.bindings["sum"].x)
        assert x is not None
        width = static_int(x.shape[-1])
        operands: list[Any] = [None if node is None else tensor(node) for node in _operands(match)]
        if width is None or any(static_int(t.stride(-1)) is None for t in operands if t is not None and t.dim()):
            return "the hidden size or a last stride is not static"
        given = gated_residual_norm.Operands(*operands)
        reason = gated_residual_norm.supports(given, gated_residual_norm.Spec(*_options(match)))
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if width < MIN_WIDTH:
            return f"rows of {width} lanes: Inductor keeps them in registers, too; it pays from {MIN_WIDTH} on"
        elements = math.prod(size_hint(size, 1) for size in x.shape)
        if elements < MIN_ELEMENTS:
            return f"{elements} elements: bound by the launch; it pays from {MIN_ELEMENTS} on"
        if not options.unmeasured and any(tensor(node).requires_grad for node in match.replaced):  # type: ignore[union-attr]
            return "with gradients it is not measured to win"
        return match.bindings["kept"]

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        flat = tensor(match.bindings["sum"].x).dim() == 2  # type: ignore[union-attr]
        op = (
            gated_residual_norm.reference if options.kernels == "reference" else gated_residual_norm.gated_residual_norm
        )
        vectors = {5, 6, 7, 8}  # weights and biases
        operands = [
            node if node is None or i in vectors else _emit_rank3(node, builder)
            for i, node in enumerate(_operands(match))
        ]
        found = builder.call(op, *operands, *_options(match))
        targets = [match.bindings["sum"].node, *(result.node for result in match.bindings["results"])]
        changed = {}
        for i, target in enumerate(targets):
            if target in match.replaced and (i or match.bindings["r_is_read"]):
                node = builder.call(operator.getitem, found, i)
                changed[target] = builder.call("squeeze", node, 0) if flat else node
        return changed

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _gated_residual_norm_examples

        return _gated_residual_norm_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _gated_residual_norm_examples

        return _gated_residual_norm_examples.near_misses()


# -- matching ------------------------------------------------------------------------------------------------------


def _closed(total: Sum, results: list[Result]) -> set[Node]:
    """The nodes that nothing else reads once the results are replaced.

    Raises:
        Miss: when a step of the sum or of a norm is read by something else.
    """
    ends = {result.node for result in results}
    region = {*total.nodes, total.node, *(node for result in results for node in result.nodes)}
    if not total.terms:
        region.discard(total.node)
    changed = True
    while changed:
        outside = {n for n in region - ends - {total.node} if any(user not in region for user in n.users)}
        region -= outside
        changed = bool(outside)
    rows = tensor(total.node).shape[:-1]  # type: ignore[union-attr]
    left = {*total.nodes, *(node for result in results for node in result.nodes)} - region
    for node in sorted(left, reverse=True):  # the last one is what the others are left for
        found = tensor(node)
        if strip_casts(node) is node and found is not None and same_shape(found.shape[:-1], rows):
            reader = next(iter(user for user in node.users if user not in region), node)
            raise Miss(f"{reader.name} reads {node.name}, a step of the sum or of the norm", node)
    return region


def _inputs(total: Sum, results: list[Result]) -> tuple[Node, ...]:
    found = [total.x]
    for term in total.terms:
        found += [term.y, *([] if term.gate is None else [term.gate])]
    for result in results:
        m = result.modulation
        vectors = (result.norm.weight, result.norm.bias, *(() if m is None else (m.scale, m.shift)))
        found += [node for node in vectors if node is not None]
    return tuple(dict.fromkeys(found))


def _check_dtypes(total: Sum, results: list[Result], inputs: tuple[Node, ...]) -> None:
    r = tensor(total.node)
    assert r is not None
    for node in inputs:
        found = tensor(node)
        if found is None or not found.dtype.is_floating_point or found.dtype.itemsize < 2:
            raise Miss(f"{node.name} is {'no tensor' if found is None else found.dtype}", node)
        if found.device != r.device:
            raise Miss(f"{node.name} is on {found.device}, not {r.device}", node)
    steps = [*total.nodes, *(node for result in results for node in result.nodes)]
    if r.dtype != torch.float64 and any((t := tensor(n)) is not None and t.dtype == torch.float64 for n in steps):
        raise Miss("it is computed in float64 from lower precision", results[0].norm.node)


def _no_profit(total: Sum, results: list[Result], region: set[Node]) -> str | None:
    """Why Inductor fuses more than this op would, or None."""
    full = tensor(total.node)
    assert full is not None
    for term in total.terms:
        if not in_memory(term.y):
            return f"{term.y.name} is computed elementwise: Inductor computes it in the kernel of the norm"
    # a stream that others read too is written for them
    if not in_memory(total.x) and (not total.terms or all(user in region for user in total.x.users)):
        return f"{total.x.name} is computed elementwise: Inductor computes it in the kernel of the norm"
    factors = [term.gate for term in total.terms]
    factors += [f for r in results if r.modulation for f in (r.modulation.scale, r.modulation.shift)]
    for factor in factors:
        small = None if factor is None else tensor(factor)
        if factor is None or small is None or small.dim() < 2 or in_memory(factor):
            continue
        if not equal(small.shape[-1], 1) and not equal(small.shape[-2], 1):
            return f"{factor.name} has a row for each token and is computed elementwise, by Inductor in the same kernel"
    for result in results:
        if not read_from_memory(result.node):
            return f"what reads {result.node.name} is elementwise: Inductor computes it in the kernel of the norm"
    return None


def _describe(total: Sum, results: list[Result]) -> str:
    terms = {0: "no term", 1: "one term", 2: "two terms"}[len(total.terms)]
    gated = " with a gate" if any(term.gate is not None for term in total.terms) else ""
    names = {"layer": "LayerNorm", "rms": "RMSNorm"}
    norms = f"{len(results)} x {names[results[0].norm.kind]}"
    return f"{terms}{gated}, {norms}{', modulated' if results[0].modulation else ''}"


# -- emitting ------------------------------------------------------------------------------------------------------


def _operands(match: Match) -> list[Node | None]:
    """The nodes of the op's tensors, in its order."""
    total, results = match.bindings["sum"], match.bindings["results"]
    terms = [*total.terms, None, None][:2]
    norms = [*(result.norm for result in results), None][:2]
    modulation = results[0].modulation
    found: list[Node | None] = [total.x, *(t and t.y for t in terms), *(t and t.gate for t in terms)]
    for norm in norms:
        found += [None, None] if norm is None else [norm.weight, norm.bias]
    return [*found, *((None, None) if modulation is None else (modulation.scale, modulation.shift))]


def _options(match: Match) -> list[Any]:
    """The op's options, in its order."""
    total, results = match.bindings["sum"], match.bindings["results"]
    norm, r, out = results[0].norm, tensor(total.node), tensor(results[0].node)
    assert r is not None and out is not None
    alphas = [*(term.alpha for term in total.terms), 1.0, 1.0][:2]
    # a gradient reads r once more: then it is written even where nothing else reads it
    write = bool(total.terms) and (match.bindings["r_is_read"] or r.requires_grad)
    return [alphas, norm.kind, norm.eps, norm.weight_offset, len(results), r.dtype, out.dtype, write]


def _emit_rank3(node: Node, builder: Builder) -> Node:
    """A tensor with leading ones up to three dimensions."""
    for _ in range(3 - tensor(node).dim()):  # type: ignore[union-attr]
        node = builder.call("unsqueeze", node, 0)
    return node
