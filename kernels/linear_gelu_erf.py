"""A linear layer and the erf GELU behind it in one launch on Hopper; cuBLASLt has the tanh one only (`linear_gelu`).

    linear = x @ weight.T + bias
    out    = linear * (1 + erf(linear / sqrt(2))) / 2

The product is `_hopper_gemm`'s, its GELU `gelu`'s formula on the fp32 sums, so that the layer's result is rounded
once. Where the memory engine cannot read the operands, PyTorch's product and `gelu`. Not measured yet.

- x: [..., K]; weight: [N, K], either stride 1; bias: [N]. One dtype and device; multiples of 16 for K and N.
- save_linear: also return linear, which the gradient needs; without it the gradient computes the product again.
- Returns (out [..., N], linear likewise or empty), contiguous.
- On other devices and in other dtypes than bfloat16 and float16, `torch.nn.functional.linear` and `gelu`.
- Gradients of x, weight and bias: plain torch, whose products Inductor gives to the GEMM library.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> out, _ = linear_gelu_erf(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.zeros(2), False)
    >>> out
    tensor([[0.8413, 1.9545]])
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _hopper_gemm
from ._ops import INTERPRETED, Launch, define_op, define_opaque_op, on_device_of
from .gelu import gelu, gelu_backward
from .linear_gelu import _check


def supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why no kernel takes these arguments (the op then runs its reference), or None; installs no guard."""
    if _hopper_gemm.MISSING:
        return _hopper_gemm.MISSING
    if INTERPRETED or x.device.type != "cuda" or torch.version.hip is not None:
        return f"device is {x.device.type!r}; allowed: an NVIDIA GPU"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the GPU is not Hopper (compute capability 9.0)"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {x.dtype}; allowed: bfloat16, float16"
    if weight.shape[0] % 16 or weight.shape[1] % 16:
        return f"the weight is {list(weight.shape)}; allowed: multiples of 16"
    if weight.stride(0) != 1 and weight.stride(1) != 1:
        return f"the weight's strides are {weight.stride()}; allowed: one of them 1"
    return None


def reference(x: Tensor, weight: Tensor, bias: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    linear = F.linear(x, weight, bias)
    return F.gelu(linear), linear.detach().clone() if save_linear else x.new_empty(0)


def _results(x: Tensor, weight: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_linear else 0)


# By everything but the tensors' data; None: the memory engine cannot read such ones.
_launches: dict[tuple[Any, ...], Launch | None] = {}
# Tiles in place of the chosen ones. For benchmarks.
config: _hopper_gemm.Config | None = None


def _on_hopper(x: Tensor, weight: Tensor, bias: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    out, linear = _results(x, weight, save_linear)
    if out.numel() == 0:
        return out, linear
    rows, vector = x.reshape(-1, x.shape[-1]), bias.contiguous()
    w = weight if weight.stride(1) == 1 else weight.t()
    flat = out.view(-1, out.shape[-1])
    keep = linear.view(-1, out.shape[-1]) if save_linear else None
    alike = [(z.shape, z.stride(), z.dtype, z.device, z.data_ptr() % 16) for z in (rows, weight, vector)]
    key = (config, save_linear, *alike)
    with on_device_of(x):
        known: Launch | Literal[False] | None = _launches.get(
            key, False
        )  # looked up once: another thread may clear them
        if known is not False:
            if known is not None:
                known.again(*(z for z in (rows, w, flat, keep, vector) if z is not None))
                return out, linear
        else:
            if len(_launches) == 1024:
                _launches.clear()
            how = config or _hopper_gemm.config(int(flat.shape[0]), int(flat.shape[1]), 2, False, save_linear, 1)
            refused = any(_hopper_gemm.cannot_read("", z) for z in (rows, w, flat))
            if not refused and how is not None:
                call = _hopper_gemm.call(how, rows, weight, vector, None, flat, keep, "gelu")
                _launches[key] = Launch(_hopper_gemm.kernel, *call)
                return out, linear
            _launches[key] = None
    found = F.linear(x, weight, bias)
    return gelu(found, "none").contiguous(), found.contiguous() if save_linear else linear


def _on_hopper_fake(x: Tensor, weight: Tensor, bias: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    return _results(x, weight, save_linear)


hopper_linear_gelu_erf = define_opaque_op("torch_fuse::hopper_linear_gelu_erf", _on_hopper, _on_hopper_fake)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    if supports(x, weight, bias) is not None:
        out, linear = reference(x, weight, bias, save_linear)
        return out.contiguous(), linear.contiguous()
    return hopper_linear_gelu_erf(x, weight, bias, save_linear)


linear_gelu_erf = define_op("torch_fuse::linear_gelu_erf", _forward)


@linear_gelu_erf.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor, save_linear: bool) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    return _results(x, weight, save_linear)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, save_linear = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    into_x, into_weight, _ = ctx.needs_input_grad[:3]
    ctx.save_for_backward(
        x if into_weight or not save_linear else None, weight if into_x or not save_linear else None,
        None if save_linear else bias, output[1] if save_linear else None,
    )  # fmt: skip


def _backward(ctx: Any, grad: Tensor | None, _linear: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    x, weight, bias, linear = ctx.saved_tensors
    if linear is None:
        linear = F.linear(x, weight, bias)
    full = gelu_backward(grad.contiguous(), linear.contiguous(), "none")
    flat = full.reshape(-1, full.shape[-1])
    into_x, into_weight, into_bias = ctx.needs_input_grad[:3]
    return (
        full @ weight if into_x else None, flat.t() @ x.reshape(-1, x.shape[-1]) if into_weight else None,
        flat.sum(0) if into_bias else None, None,
    )  # fmt: skip


linear_gelu_erf.register_autograd(_backward, setup_context=_save_for_backward)
