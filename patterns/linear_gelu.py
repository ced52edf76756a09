"""The tanh GELU of an MLP in the epilogue of the product before it, where no gradient is needed.

Before: linear(gelu(linear(x, W, b), approximate="tanh"))      # or GELU written out with tanh or sigmoid
After:  linear(torch_fuse.linear_gelu(x, W, b))

For Wan, Flux and other diffusion transformers, GPT-2, GPT-J, Phi, SigLIP. Inductor writes the product, reads it, and
writes the GELU; a kernel of its own for the GELU (`mlp_gelu`) does the same. Here the product is written once: 0.24 ms
less a layer for Wan 1.3B at 32,760 tokens. With gradients the backward pass needs the value before the GELU, which the
epilogue does not keep: `mlp_gelu` takes those, and erf, which cuBLASLt does not have (`linear_gelu_erf` is of our own).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import is_traceable_wrapper_subclass
from torch_fuse.graph.activation import gelus, match_gelu
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.linear import Linear, from_linear, into_linears
from torch_fuse.graph.values import equal, size_hint, tensor
from torch_fuse.kernels import linear_gelu
from torch_fuse.options import Options
from torch_fuse.patterns import _linear_gelu_examples as examples
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# The least number of rows measured (benchmarks/results/linear_gelu.jsonl); fewer only with options["unmeasured"].
MIN_ROWS = 1536


@register
class LinearGelu(Pattern):
    """The tanh GELU of an MLP in the epilogue of the product before it."""

    name = "linear_gelu"
    op = "torch_fuse::linear_gelu"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return [found.node for found in gelus(view.nodes) if found.approximate == "tanh"]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        found = match_gelu(anchor)
        before = None if found is None else from_linear(found.input, found.nodes)
        if found is None or before is None or not into_linears(anchor):
            return None
        linear, views = before
        inside = frozenset({*found.nodes, *linear.nodes, *views})
        if any(_is_inplace(node) or not inside.issuperset(node.users) for node in inside - {anchor}):
            return None
        sizes = [node for each in views for node in each.all_input_nodes if node not in inside]
        operands = [node for node in (linear.input, linear.weight, linear.bias) if node is not None]
        bindings = {"linear": linear, "views": views}
        note = f"weight {list(_shape(linear))}"
        return Match(anchor, bindings, (anchor,), inside, (*operands, *sizes), note)

    def check(self, match: Match, options: Options) -> str | None:
        linear: Linear = match.bindings["linear"]
        reason = unlike_the_op(linear, match.anchor)
        if reason is not None or options.kernels == "reference":
            return reason
        x, weight, bias = (tensor(node) for node in (linear.input, linear.weight, linear.bias))
        assert x is not None and weight is not None and bias is not None
        reason = linear_gelu.supports(x, weight, bias)
        if reason is not None:
            return f"there is no such epilogue: {reason}"
        rows = math.prod(size_hint(size, MIN_ROWS) for size in x.shape[:-1])
        if rows < MIN_ROWS and not options.unmeasured:
            return f"{rows} rows: measured to win from {MIN_ROWS} on"
        return _without_epilogue(x, weight, bias)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        linear: Linear = match.bindings["linear"]
        weight = builder.call("t", linear.weight) if linear.transposed else linear.weight
        new, old = self.emit(match, builder, options, (linear.input, weight, linear.bias)), linear.node
        for view in match.bindings["views"]:
            args, kwargs = _renamed(view, old, new)
            new, old = builder.call(view.target, *args, **kwargs), view
        return {match.anchor: new}

    def emit(self, match: Match, builder: Builder, options: Options, operands: tuple[Node | None, ...]) -> Node:
        """The op's call."""
        op = linear_gelu.reference if options.kernels == "reference" else linear_gelu.linear_gelu
        return builder.call(op, *operands)

    def spellings(self) -> Iterator[Example]:
        return examples.spellings("tanh")

    def near_misses(self) -> Iterator[Example]:
        return examples.near_misses("tanh")


def _is_inplace(node: Node) -> bool:
    call = call_of(node)
    return call is not None and call.inplace


def _shape(linear: Linear) -> tuple[Any, ...]:
    weight = tensor(linear.weight)
    assert weight is not None
    return tuple(reversed(weight.shape)) if linear.transposed else tuple(weight.shape)


def unlike_the_op(linear: Linear, anchor: Node, gradients: bool = False) -> str | None:
    """Why the op does not compute this, or None. gradients: it has them."""
    result, x, weight, bias = (tensor(node) for node in (anchor, linear.input, linear.weight, linear.bias))
    assert result is not None and x is not None and weight is not None
    if bias is None:
        return "the linear layer has no bias, which the epilogue adds"
    if result.requires_grad and not gradients:
        return "gradients are wanted: they need the value before the GELU, which the epilogue does not keep"
    if bias.dim() != 1 or not equal(bias.shape[0], _shape(linear)[0]):
        return f"the bias has shape {list(bias.shape)}; the epilogue adds one number a column"
    if x.dim() < 2:
        return "the input is a vector"
    if any(other.dtype != result.dtype for other in (x, weight, bias)):
        return "input, weight, bias and result differ in dtype"
    if any(is_traceable_wrapper_subclass(other) for other in (x, weight, bias)):
        return "input, weight or bias is of a tensor subclass, which decides itself what a linear layer is"
    return None


def _renamed(view: Node, old: Node, new: Node) -> tuple[Any, Any]:
    """A view's arguments, with another node in place of one."""
    renamed: tuple[Any, Any] = map_arg((view.args, view.kwargs), lambda node: new if node is old else node)
    return renamed


def _without_epilogue(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> str | None:
    """Why PyTorch would call a GELU of its own after the product, or copy an operand, or None.

    PyTorch gives the epilogue to products of more than one row, column and lane with a contiguous bias.
    """
    rows = math.prod(size_hint(size, 2) for size in x.shape[:-1])
    if min(rows, *(size_hint(size, 2) for size in weight.shape)) < 2:
        return f"a product of {rows} row(s) with a weight {list(weight.shape)} has no epilogue"
    if not equal(bias.stride(0), 1):
        return f"the bias has stride {bias.stride(0)}; the epilogue reads it contiguous"
    if not (equal(weight.stride(0), 1) or equal(weight.stride(1), 1)):
        return f"the weight's strides are {weight.stride()}: it would be copied"
    dims = [i for i in range(x.dim() - 1) if not equal(x.shape[i], 1)]
    rows_lie_alike = all(equal(x.stride(i), x.stride(j) * x.shape[j]) for i, j in itertools.pairwise(dims))
    if rows_lie_alike and equal(x.stride(-1), 1):
        return None
    return f"the input's strides are {x.stride()}: it would be copied"
