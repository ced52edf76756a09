"""An attention's output projection and its combination with a skip in one product.

Before: c_skip(t) * x + c_out(t) * linear(attention, W, b)      # rCM/EDM, TrigFlow: t for each sample
        x + gate * linear(attention, W, b)                      # DiT, LayerScale, tanh and sigmoid gates
        torch.lerp(x, linear(attention, W, b), weight)
After:  linear_skip(attention, W, b, x, c_skip, c_out)

Inductor writes the projection, reads it and x, and writes the sum: three passes over the tokens, 3 to 12 % of a block's
time. In the product's epilogue two of the three are gone. By the bytes that pays for weights of up to 1,536 lanes: for
wider ones a product that is 20 % slower than the GEMM library's costs more than the passes. The coefficients stay on
the device and may need gradients. Where a norm follows a sum with a plain x, `gated_residual_norm` and Inductor take
the sum with it. Coefficients that are elementwise functions of one tensor, as c_skip(t), are computed in the epilogue,
too. Measured on Hopper (32,768 x 768: 75 against 109 us; 4,096 x 512: 8.3 against 12.1); only with
options["unmeasured"]: other GPUs, coefficients of [B, 1, N], functions where gradients are wanted, and
the gradient that reads what its sums share in one pass.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from torch_fuse._compat import is_traceable_wrapper_subclass, no_guards
from torch_fuse.graph.memory import in_memory, read_from_memory
from torch_fuse.graph.miss import Kept
from torch_fuse.graph.norm import norms_of, strip_casts
from torch_fuse.graph.pointwise import Pointwise, match_pointwise
from torch_fuse.graph.residual_norm import match_sum
from torch_fuse.graph.skip import Coefficient, Skip, match_skip
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor
from torch_fuse.kernels import _linear_skip_hopper, linear_skip
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# A product of wider rows takes longer by more than the passes, when it is 20 % slower than the GEMM library's.
MAX_INNER = 1536
# Below that, a kernel that computes the coefficients, which Inductor has in that of the combination, costs what is won:
# blocks of 0.13 and 0.5 M elements take 1.02 times Inductor's time, of 2.1 M 0.93 and 1.0, of 6.3 M and more 0.93 to
# 0.97. Where the product's kernel computes them, 0.13 M elements take 1.0 and 0.5 M 0.95
# (benchmarks/results/attention_skip_blocks_2.jsonl).
MIN_SIZE, MIN_SIZE_INSIDE = 1 << 21, 1 << 19
# Fewer rows, and the call is bound by launches, of which there is one in either case.
MIN_ROWS = 256


@register
class AttentionSkip(Pattern):
    """An attention's output projection and its combination with a skip in one product."""

    name = "attention_skip"
    kind = "combine"
    op = "torch_fuse::linear_skip"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        skip = match_skip(anchor, view.projected)
        if skip is None:
            return None
        norm = _norm_behind(skip, anchor)
        if norm is not None:
            raise Kept(f"{norm.name} follows: the sum goes into one kernel with the norm", anchor)
        factors = [factor for c in (skip.a, skip.b) for factor, _ in c.factors]
        functions = tuple(_function(c, skip, view) for c in (skip.a, skip.b))
        leaves = [found.leaf for found in functions if found is not None]
        operands = (skip.linear.input, skip.linear.weight, skip.linear.bias, skip.x, *factors, *leaves)
        inputs = tuple(dict.fromkeys(node for node in operands if node is not None))
        bindings = {"skip": skip, "fake_mode": view.fake_mode, "functions": functions}
        return Match(anchor, bindings, (skip.node,), skip.nodes, inputs, _describe(skip))

    def check(self, match: Match, options: Options) -> str | None:
        skip: Skip = match.bindings["skip"]
        weight = tensor(skip.linear.weight)
        assert weight is not None
        if any(is_traceable_wrapper_subclass(value) for node in match.inputs if (value := tensor(node)) is not None):
            return "an operand is of a tensor subclass, which decides itself what a linear layer is"
        if options.kernels == "reference":
            return None
        read = [tensor(node) for node in (skip.linear.input, skip.x)]
        if any(static_int(size) is None for size in (*weight.shape, *weight.stride())) or any(
            static_int(value.stride(-1)) is None for value in read if value is not None
        ):
            return "the weight's shape or a last stride is not static"
        reason = linear_skip.supports(_operands(skip), _spec(skip))
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if not options.unmeasured:
            with no_guards(match.bindings["fake_mode"]):
                reason = linear_skip.unmeasured(_operands(skip), _spec(skip))
            x = tensor(skip.x)
            assert x is not None
            size = math.prod([size_hint(n, 1) for n in x.shape])
            least = MIN_SIZE_INSIDE if _inside(match, options) else MIN_SIZE
            if reason is None and size < least:
                reason = f"{size} elements; it pays from {least} on"
            if reason is not None:
                return f"the combination in the product's epilogue is not measured to win: {reason}"
        return _no_profit(skip)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        skip: Skip = match.bindings["skip"]
        linear = skip.linear
        weight = builder.call("t", linear.weight) if linear.transposed else linear.weight
        op = linear_skip.reference if options.kernels == "reference" else linear_skip.linear_skip
        spec = _spec(skip)
        # Elsewhere the kernel would be given the values: Inductor computes those of both coefficients in one kernel.
        inside = _inside(match, options) or options.kernels == "reference"
        functions = match.bindings["functions"] if inside else (None, None)
        a, b = (_emit(c, of, builder) for c, of in zip((skip.a, skip.b), functions, strict=True))
        a_of, b_of = ("x" if of is None else of.function for of in functions)
        spec = spec._replace(a_of=a_of, b_of=b_of, one_pass=options.unmeasured)
        found = builder.call(op, linear.input, weight, linear.bias, skip.x, a, b, *spec)
        return {skip.node: builder.call(operator.getitem, found, 0)}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _attention_skip_examples

        return _attention_skip_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _attention_skip_examples

        return _attention_skip_examples.near_misses()


def _inside(match: Match, options: Options) -> bool:
    """Whether Hopper's kernel computes the coefficients itself; with gradients that is not measured to win."""
    skip: Skip = match.bindings["skip"]
    if not any(match.bindings["functions"]) or not (options.unmeasured or not tensor(skip.node).requires_grad):  # type: ignore[union-attr]
        return False
    return _linear_skip_hopper.cannot_take(_operands(skip), _spec(skip)) is None


def _norm_behind(skip: Skip, total: Node) -> Node | None:
    """A norm that reads the sum, and that one kernel computes with it."""
    for source in dict.fromkeys((strip_casts(total), strip_casts(skip.node))):
        for norm in norms_of(source):
            if match_sum(norm).terms:
                return norm.node
    return None


def _spec(skip: Skip) -> linear_skip.Spec:
    """The op's options. The layer's result is kept where the gradient of its coefficient needs it."""
    result = tensor(skip.node)
    assert result is not None
    wanted = any(tensor(factor).requires_grad for factor, _ in skip.b.factors)  # type: ignore[union-attr]
    keep = wanted and result.requires_grad  # a parameter needs gradients, also where none are recorded
    return linear_skip.Spec(skip.a.number, skip.b.number, skip.mode, keep, result.dtype)


def _operands(skip: Skip) -> linear_skip.Operands:
    """Fake tensors that are like the op's."""
    y, weight, bias, x = (
        None if node is None else tensor(node)
        for node in (skip.linear.input, skip.linear.weight, skip.linear.bias, skip.x)
    )
    assert y is not None and weight is not None and x is not None
    weight = weight.t() if skip.linear.transposed else weight
    return linear_skip.Operands(y, weight, bias, x, _product_like(skip.a), _product_like(skip.b))


def _product_like(coefficient: Coefficient) -> torch.Tensor | None:
    """A tensor of the shape and dtype of what `_emit` makes."""
    factors = [value for factor, _ in coefficient.factors if (value := tensor(factor)) is not None]
    if len(factors) < 2:
        return factors[0] if factors else None
    shape: list[Any] = [1] * max(factor.dim() for factor in factors)
    for factor in factors:
        for i, size in enumerate(reversed(factor.shape), 1):
            shape[-i] = shape[-i] if equal(size, 1) else size
    dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in factors), torch.float32)
    return factors[0].new_empty(0, dtype=dtype).as_strided(shape, [0] * len(shape))


def _no_profit(skip: Skip) -> str | None:
    """Why the passes that are saved do not pay for a product outside of the GEMM library, or None."""
    x, weight = tensor(skip.x), tensor(skip.linear.weight)
    assert x is not None and weight is not None
    if weight.dtype == torch.float32:
        return "in fp32 the product takes longer without the GEMM library than the passes over its result"
    inner = int(weight.shape[0 if skip.linear.transposed else 1])
    if inner > MAX_INNER:
        return f"a product of {inner} lanes: the GEMM library gains more than the passes cost, from {MAX_INNER} on"
    rows = math.prod(size_hint(size, MIN_ROWS) for size in x.shape[:-1])
    if rows < MIN_ROWS:
        return f"{rows} rows: bound by the launch; it pays from {MIN_ROWS} on"
    if not in_memory(skip.x) and all(user in skip.nodes for user in skip.x.users):
        return f"{skip.x.name} is computed elementwise: Inductor computes it in the kernel of the sum"
    for coefficient in (skip.a, skip.b):
        if _size(coefficient, x.shape) < math.prod(size_hint(size, 2) for size in x.shape):
            continue
        if len(coefficient.factors) > 1:
            return "the product of its coefficients has a value for each element"
        factor = coefficient.factors[0][0]
        if not in_memory(factor):
            return f"{factor.name} has a value for each element and is computed elementwise, by Inductor in one kernel"
    if not read_from_memory(skip.node):
        return f"what reads {skip.node.name} is elementwise: Inductor computes it in the kernel of the sum"
    return None


def _size(coefficient: Coefficient, shape: Sequence[Any]) -> int:
    """Number of values of a coefficient that broadcasts to a shape."""
    sizes = [tensor(factor).shape for factor, _ in coefficient.factors]  # type: ignore[union-attr]
    varies = {i for given in sizes for i, size in enumerate(reversed(given)) if not equal(size, 1)}
    return math.prod(size_hint(size, 2) for i, size in enumerate(reversed(shape)) if i in varies)


def _describe(skip: Skip) -> str:
    def named(coefficient: Coefficient) -> str:
        count = len(coefficient.factors)
        number = "1" if count and coefficient.number == 1 else f"{coefficient.number:g}"
        return number if not count else f"{count} tensor{'s' * (count > 1)}" + ("" if number == "1" else f" * {number}")

    weight = list(tensor(skip.linear.weight).shape)  # type: ignore[union-attr]
    if skip.mode != "sum":
        return f"lerp {'from' if skip.mode.endswith('back') else 'to'} the projection {weight}"
    return f"({named(skip.a)}) * x + ({named(skip.b)}) * projection {weight}"


def _function(coefficient: Coefficient, skip: Skip, view: GraphView) -> Pointwise | None:
    """A coefficient as a function of a tensor in memory, which the kernel computes, or None."""
    result, x, y = (tensor(node) for node in (skip.node, skip.x, skip.linear.input))
    assert result is not None and x is not None and y is not None
    computed = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    return match_pointwise(coefficient.factors, (computed, result.dtype), result.requires_grad, view.order, skip.node)


def _emit(coefficient: Coefficient, function: Pointwise | None, builder: Builder) -> Node | None:
    """What the op is given of a coefficient: what it is a function of, or the product of its tensors, in fp32 where
    there are several; None where there is none."""
    if function is not None:
        leaf = tensor(function.leaf)
        same = leaf is not None and same_shape([-1, *leaf.shape[1:]], function.shape)
        return function.leaf if same else builder.call("reshape", function.leaf, function.shape)
    product: Node | None = None
    alone = len(coefficient.factors) == 1
    for factor, divides in coefficient.factors:
        found: Any = factor
        if (divides or not alone) and tensor(factor).dtype.itemsize < 4:  # type: ignore[union-attr]
            found = builder.call("float", found)
        if divides:
            found = builder.call(torch.reciprocal, found)
        product = found if product is None else builder.call(torch.mul, product, found)
    return product
