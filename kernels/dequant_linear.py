"""A linear layer whose weight is read as it is stored: int8, int4, 8-bit floats, tables of 16, blocks.

    out = activation(x @ decode(codes, scale, zero, lut).T + bias)   # arithmetic "output": (x @ codes.T) * scale + bias

`packed_weight` says what the parts and the format's fields are. Sums are in fp32 and rounded once; the weight itself is
rounded as its source does.

- x: [..., K], float32, float16 or bfloat16; bias: [N] of x's dtype, or None. All on one device.
- activation: "none", "gelu", "gelu_tanh" or "silu".
- Returns [..., N], contiguous, in x's dtype.
- Gradients: of x and bias, without an activation. The parts are constants; needing their gradient raises
  NotImplementedError.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> codes, scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2.0]])
    >>> dequant_linear(torch.tensor([[1.0, 1.0]]), codes, scale, None, None, None, *Format(8, "int", 1, 2))
    tensor([[-0.5000, 14.0000]])
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dequant_dispatch
from ._gemv_common import ACTIVATIONS, activated
from ._ops import HAS_TRITON, INTERPRETED, define_opaque_op
from .packed_weight import COMPUTE, Format, check_parts, decode, weight_shape


def supports_device(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED or device.type == "cuda":
        return None
    return f"device is {device.type!r}; allowed: 'cuda', which Triton compiles for"


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format
) -> str | None:
    """Why there is no kernel for these (the op then runs its reference), or None."""
    return _dequant_dispatch.supports(x, codes, scale, zero, lut, form)


def reference(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None,
    bits: int, kind: str, rows: int, group: int, offset: int, nibbles: str, arithmetic: str, compute: str,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """The op in plain torch: differentiable in x and bias, compilable."""
    form = Format(bits, kind, rows, group, offset, nibbles, arithmetic, compute)
    weight = decode(codes, scale, zero, lut, form, x.dtype)
    if arithmetic != "output":
        return activated(F.linear(x, weight, bias), activation)
    out = (F.linear(x, weight) * scale.flatten().to(COMPUTE[compute])).to(x.dtype)
    return activated(out if bias is None else out + bias, activation)


def _check(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    activation: str,
) -> tuple[int, int]:  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    check_parts(codes, scale, zero, lut, form)
    n, k = weight_shape(codes, form)
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x.shape is {tuple(x.shape)}; allowed: [..., {k}]")
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        raise ValueError(f"x.dtype is {x.dtype}; allowed: floating point of 16 bits and more")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype}{list(bias.shape)}; allowed: {x.dtype}[{n}]")
    for name, part in (("codes", codes), ("scale", scale), ("zero", zero), ("lut", lut), ("bias", bias)):
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device}; allowed: x's {x.device}")
    return n, k


def _forward(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None,
    bits: int, kind: str, rows: int, group: int, offset: int, nibbles: str, arithmetic: str, compute: str,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    form = Format(bits, kind, rows, group, offset, nibbles, arithmetic, compute)
    _check(x, codes, scale, zero, lut, bias, form, activation)
    if _dequant_dispatch.supports(x, codes, scale, zero, lut, form) is None:
        bias = None if bias is None else bias.contiguous()
        return _dequant_dispatch.run(x, codes, scale, zero, lut, bias, form, activation).contiguous()
    return reference(x, codes, scale, zero, lut, bias, *form, activation).contiguous()


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None,
    bits: int, kind: str, rows: int, group: int, offset: int, nibbles: str, arithmetic: str, compute: str,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    form = Format(bits, kind, rows, group, offset, nibbles, arithmetic, compute)
    n, _ = _check(x, codes, scale, zero, lut, bias, form, activation)
    return x.new_empty((*x.shape[:-1], n))


def _setup_context(ctx, inputs, output) -> None:
    x, codes, scale, zero, lut, _, *fields, activation = inputs
    if activation != "none":
        raise NotImplementedError(f"dequant_linear has no gradient through {activation!r}")
    for name, part in (("scale", scale), ("zero", zero), ("lut", lut), ("codes", codes)):
        if part is not None and part.requires_grad:
            raise NotImplementedError(f"dequant_linear has no gradient of {name}")
    ctx.save_for_backward(codes, scale, zero, lut)
    ctx.form, ctx.dtype = Format(*fields), x.dtype


def _backward(ctx, grad):
    codes, scale, zero, lut = ctx.saved_tensors
    through = grad
    grads = [None] * 15
    if ctx.needs_input_grad[0]:
        if ctx.form.arithmetic == "output":
            through = (grad * scale.flatten().to(COMPUTE[ctx.form.compute])).to(ctx.dtype)
        grads[0] = through @ decode(codes, scale, zero, lut, ctx.form, ctx.dtype)
    if ctx.needs_input_grad[5]:
        grads[5] = grad.sum(tuple(range(grad.dim() - 1)))
    return tuple(grads)


dequant_linear = define_opaque_op("torch_fuse::dequant_linear", _forward, _fake, _backward, _setup_context)
