"""The linear layers that end a block and the residual sum, for a few rows, in one launch.

Before: x + linear(attention, Wo, bo) + linear(h, Wd, bd)      # GPT-NeoX, GPT-J, Phi: parallel residual
        x + linear(attention, Wo)                              # Llama
After:  linear_residual_gemv(x, attention, Wo, bo, h, Wd, bd)

For decoding with any of transformers' models: as `decode_norm_linear`, the time is that of reading the weights and of
the launches that wait for each other. Wins on CUDA for few rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.linear import Linear, match_linear
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.residual import match_residual
from torch_fuse.graph.values import tensor
from torch_fuse.kernels import linear_residual_gemv
from torch_fuse.options import Options
from torch_fuse.patterns import _decode_linear_residual_examples as examples
from torch_fuse.patterns._early_launch import may_launch_early
from torch_fuse.patterns.decode_norm_linear import (
    check_bias,
    check_stored,
    few_rows,
    of_subclass,
    rows_of,
    too_many_rows,
    unmeasured,
)
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class DecodeLinearResidual(Pattern):
    """Output projections of a few rows and the residual sum in one launch that streams the weights."""

    name = "decode_linear_residual"
    op = "torch_fuse::linear_residual_gemv"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        """Sums, the last first: of two in one another the outer is the whole."""
        found = ((node, call_of(node)) for node in reversed(view.nodes))
        return [node for node, call in found if call is not None and call.op == "add" and few_rows(node)]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        residual = match_residual(anchor)
        if residual is None or residual.node is not anchor:
            return None
        linears: list[Linear] = []
        others: list[Node] = []
        region = set(residual.nodes)
        for term in residual.terms:
            found = _linear(term.tensor, region)
            if found is None or term.factors or term.sign != 1:
                others.append(term.tensor)
            else:
                linears.append(found)
        if len(others) != 1 or len(linears) not in (1, 2):
            return None
        base = [term for term in residual.terms if term.tensor is others[0]]
        if len(base) != 1 or base[0].factors or base[0].sign != 1 or match_linear(others[0]) is not None:
            return None
        for linear in linears:
            check_stored(view, linear)
        region |= {linear.node for linear in linears}
        _check(anchor, others[0], linears)
        inputs = (others[0], *(n for x in linears for n in (x.input, x.weight, x.bias) if n is not None))
        constants = [n for x in linears for n in (x.weight, x.bias) if n is not None]
        early = all(may_launch_early(view.order, constants, x.input) for x in linears)
        bindings = {"residual": others[0], "linears": linears, "early": early}
        note = f"{len(linears)} weight(s), {rows_of(anchor)} row(s)"
        return Match(anchor, bindings, (anchor,), frozenset(region), inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        if reason := of_subclass(match.inputs):
            return reason
        if options.kernels == "reference":
            return None
        reason = None if options.unmeasured else unmeasured(match.bindings["residual"])
        if reason is not None:
            return reason
        residual, linears = match.bindings["residual"], match.bindings["linears"]
        for linear in linears:
            r, x, w = (tensor(node) for node in (residual, linear.input, linear.weight))
            assert r is not None and x is not None and w is not None
            reason = linear_residual_gemv.supports(r, x, w, None, None)
            if reason is not None:
                return f"the kernel cannot run: {reason}"
        return too_many_rows(residual)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        linears = match.bindings["linears"]
        first, second = linears[0], linears[1] if len(linears) == 2 else None
        op = linear_residual_gemv.linear_residual_gemv
        new = builder.call(
            linear_residual_gemv.reference if options.kernels == "reference" else op,
            match.bindings["residual"],
            first.input,
            first.weight,
            first.bias,
            None if second is None else second.input,
            None if second is None else second.weight,
            None if second is None else second.bias,
            options.early_launch and match.bindings["early"],
        )
        return {match.anchor: new}

    def spellings(self) -> Iterator[Example]:
        return examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        return examples.near_misses()


def _linear(node: Node, region: set[Node]) -> Linear | None:
    """The linear layer whose result a term is, behind dropouts that drop nothing; nothing else may read it."""
    passed: set[Node] = set()
    while len(node.users) == 1:
        call = call_of(node)
        if call is not None and call.op == "dropout" and (call["training"] is False or call["p"] == 0):
            passed.add(node)
            node = call["input"]
            continue
        linear = match_linear(node)
        if linear is not None:
            region |= passed
        return linear
    return None


def _check(anchor: Node, residual: Node, linears: list[Linear]) -> None:
    """Raises Miss unless the op computes this sum."""
    result, base = tensor(anchor), tensor(residual)
    assert result is not None and base is not None
    if result.requires_grad:
        raise Miss("gradients are wanted, and the op for a few rows has none", anchor)
    if base.dtype != result.dtype:
        raise Miss(f"the sum is {result.dtype}, the residual stream {base.dtype}", anchor)
    for linear in linears:
        if linear.transposed:
            raise Miss("a weight is stored with its input dimension first", linear.node)
        if any(tensor(node).dtype != result.dtype for node in (linear.input, linear.weight)):  # type: ignore[union-attr]
            raise Miss("weights, inputs and the residual stream differ in dtype", linear.node)
        check_bias(linear)
