"""Why a linear layer with a quantised weight is left as it is, although its format is known."""

from __future__ import annotations

import math
from typing import Any

import torch

from torch_fuse._compat import is_traceable_wrapper_subclass, uses_cuda_graphs
from torch_fuse.graph.closure import Closure
from torch_fuse.graph.dequant import OutputScale, Product
from torch_fuse.graph.values import static_int, tensor
from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import dequant_linear
from torch_fuse.kernels._measured import not_hopper
from torch_fuse.kernels.packed_weight import COMPUTE
from torch_fuse.options import Options
from torch_fuse.patterns._packed_parts import Reading


def unlike_the_op(outer: Product, product: Product, scaled: OutputScale | None) -> str | None:
    """Why the op does not compute this, or None."""
    result, x, weight = (tensor(node) for node in (product.node, outer.input, product.weight))
    assert result is not None and x is not None and weight is not None
    bias = None if outer.bias is None else tensor(outer.bias)
    if any(part.dtype != x.dtype for part in (result, weight)) or (bias is not None and bias.dtype != x.dtype):
        return "input, weight, bias and result differ in dtype"
    if bias is not None and tuple(bias.shape) != product.shape[:1]:
        return f"the bias has shape {list(bias.shape)}; the op adds one number a column"
    if scaled is not None:
        scale, end = tensor(scaled.scale), tensor(scaled.node)
        assert scale is not None and end is not None
        if scale.requires_grad and end.requires_grad:
            return "a gradient of the scale is wanted; the op has none"
        if scale.dtype not in COMPUTE.values() or product.bias is not None:
            return "the product is scaled after its bias is added, or by a number of another type than 16 or 32 bits"
    if weight.requires_grad or (outer is not product and _learns(outer)):
        return "a gradient of the weight's scale or zero point is wanted; the op has none"
    if any(is_traceable_wrapper_subclass(other) for other in (x, weight)):
        return "input or weight is of a tensor subclass, which decides itself what a linear layer is"
    return None


def _learns(outer: Product) -> bool:
    weight, result = tensor(outer.weight), tensor(outer.node)
    return weight is not None and result is not None and weight.requires_grad and result.requires_grad


def reason_unmeasured(outer: Product, device: torch.device, options: Options) -> str | None:
    """Why the op is not measured to win, whatever the weight's format, or None.

    A call takes the processor some 300 us (a step of 129 products 41 ms, in a CUDA graph 1.7).
    """
    result = tensor(outer.node)
    assert result is not None
    if result.requires_grad:
        return "a gradient is wanted, and it is not measured to win then"
    if reason := not_hopper(device) or dispatch.unmeasured_rows(rows_of(outer)):
        return reason
    if not uses_cuda_graphs(options.inductor):
        return "measured to win in CUDA graphs (mode='reduce-overhead'); captured by the caller: options['unmeasured']"
    return None


def rows_of(outer: Product) -> int | None:
    """The product's rows, or None when their number is not static."""
    x = tensor(outer.input)
    assert x is not None
    sizes = [static_int(size) for size in x.shape[:-1]]
    return None if None in sizes else math.prod(sizes)  # type: ignore[arg-type]


def no_kernel(outer: Product, closure: Closure, reading: Reading, options: Options) -> str | None:
    """Why there is no kernel for a weight, or none that is measured to win; or None."""
    leaves: list[Any] = [tensor(leaf) for leaf in closure.leaves]
    with torch.no_grad():
        parts = reading.parts(leaves)
    bias = None if outer.bias is None else tensor(outer.bias)
    reason = dequant_linear.supports(tensor(outer.input), *parts, bias, reading.form)  # type: ignore[arg-type]
    if reason is not None:
        return f"no kernel: {reason}"
    return None if options.unmeasured else dispatch.unmeasured(*parts, reading.form)
