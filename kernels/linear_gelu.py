"""A linear layer and the tanh GELU behind it in one launch: bias and activation in the epilogue of the product.

    out = gelu(x @ weight.T + bias),    gelu(y) = y * (1 + tanh(sqrt(2 / pi) * (y + 0.044715 * y^3))) / 2

The product, its epilogue included, is cuBLASLt's (CUBLASLT_EPILOGUE_GELU_BIAS), which PyTorch calls for
`aten._addmm_activation` when the bias is a vector. The GELU reads the fp32 accumulator, so that the layer's result is
rounded once, not twice. It is written once, and never read back: 4 * rows * N bytes less than with a GELU of its own.

- x: [..., K]; weight: [N, K], either dimension contiguous; bias: [N]. One dtype and device.
- Returns [..., N], contiguous. No gradient: the GELU's needs the layer's own result, which PyTorch's operator does not
  hand out.
- On other devices and in other dtypes than bfloat16 and float16, `torch.nn.functional.linear` and `gelu`.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> linear_gelu(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.zeros(2))
    tensor([[0.8412, 1.9546]])
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import define_op


def supports_device(device: torch.device) -> str | None:
    """Why there is no such epilogue on a device, or None."""
    if device.type != "cuda":
        return f"device is {device.type!r}; allowed: 'cuda', which cuBLASLt runs on"
    return None if torch.version.hip is None else "cuBLASLt is NVIDIA's"


def supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the product has no GELU in its epilogue (the op then runs its reference), or None."""
    reason = supports_device(x.device)
    if reason is None and x.dtype not in (torch.bfloat16, torch.float16):
        reason = f"dtype is {x.dtype}; allowed: bfloat16, float16"
    return reason


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(f"x.shape is {tuple(x.shape)}; allowed: [..., K] of two dimensions and more")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight.shape is {tuple(weight.shape)}; allowed: [N, {x.shape[-1]}]")
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias.shape is {tuple(bias.shape)}; allowed: [{weight.shape[0]}]")
    for name, other in (("weight", weight), ("bias", bias)):
        if (other.dtype, other.device) != (x.dtype, x.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}; allowed: x's {x.dtype} on {x.device}")


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, bias)
    if supports(x, weight, bias) is not None:
        return reference(x, weight, bias)
    rows = x.flatten(0, -2)
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


linear_gelu = define_op("torch_fuse::linear_gelu", _forward)


@linear_gelu.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
