"""The erf GELU of an MLP in the epilogue of the product before it, on Hopper.

Before: linear(gelu(linear(x, W, b)))      # or the GELU written out with erf
After:  linear(torch_fuse.linear_gelu_erf(x, W, b))

For GPT-NeoX/Pythia, BERT, ViT, Whisper. cuBLASLt has no such epilogue, so the product is a kernel of ours: the value
before the GELU is neither written nor read (4 * rows * N bytes), but where that product is slower than the GEMM
library's by more than the pass, it loses. Not measured yet: `mlp_gelu` takes what this one leaves, and, until it is
measured, all. With gradients the epilogue writes the value before the GELU, too, which the backward pass reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch.fx import Node

from torch_fuse.graph.activation import gelus
from torch_fuse.graph.linear import Linear
from torch_fuse.graph.values import static_int, tensor
from torch_fuse.kernels import linear_gelu_erf
from torch_fuse.options import Options
from torch_fuse.patterns import _linear_gelu_examples as examples
from torch_fuse.patterns.linear_gelu import LinearGelu, unlike_the_op
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class LinearGeluErf(LinearGelu):
    """The erf GELU of an MLP in the epilogue of the product before it."""

    name = "linear_gelu_erf"
    op = "torch_fuse::linear_gelu_erf"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return [found.node for found in gelus(view.nodes) if found.approximate == "none"]

    def check(self, match: Match, options: Options) -> str | None:
        linear: Linear = match.bindings["linear"]
        reason = unlike_the_op(linear, match.anchor, gradients=options.unmeasured)
        if reason is not None or options.kernels == "reference":
            return reason
        x, weight, bias = (tensor(node) for node in (linear.input, linear.weight, linear.bias))
        assert x is not None and weight is not None and bias is not None
        if any(static_int(size) is None for size in (*weight.shape, *weight.stride())):
            return "the weight's shape is not static"
        reason = linear_gelu_erf.supports(x, weight.t() if linear.transposed else weight, bias)
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if not options.unmeasured:
            return "the GELU in the product's epilogue is not measured to win yet"
        return None

    def emit(self, match: Match, builder: Builder, options: Options, operands: tuple[Node | None, ...]) -> Node:
        result = tensor(match.anchor)
        assert result is not None
        op = linear_gelu_erf.reference if options.kernels == "reference" else linear_gelu_erf.linear_gelu_erf
        return builder.call(operator.getitem, builder.call(op, *operands, result.requires_grad), 0)

    def spellings(self) -> Iterator[Example]:
        return examples.spellings("none")

    def near_misses(self) -> Iterator[Example]:
        return examples.near_misses("none")
