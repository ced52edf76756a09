"""What gated_residual_norm's forward and backward share in plain torch: options, checks, the references' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._ops import no_triton

NORMS = ("layer", "rms")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384  # a row in registers: 32 values a thread at 16 warps


class Operands(NamedTuple):
    """The tensors of gated_residual_norm, in the op's order."""

    x: Tensor
    y1: Tensor | None
    y2: Tensor | None
    gate1: Tensor | None
    gate2: Tensor | None
    weight1: Tensor | None
    bias1: Tensor | None
    weight2: Tensor | None
    bias2: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


class Spec(NamedTuple):
    """The options of gated_residual_norm, in the op's order."""

    alphas: Sequence[float]
    norm: str
    eps: float
    weight_offset: float
    outputs: int
    r_dtype: torch.dtype
    out_dtype: torch.dtype
    write_r: bool


def require(ok: bool, argument: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the argument, its value and what is allowed."""
    if not ok:
        raise ValueError(f"gated_residual_norm: {argument} is {value}; allowed: {allowed}")


def check(t: Operands, spec: Spec) -> None:
    """Raises ValueError for arguments that the op does not define."""
    require(t.x.dim() == 3, "x.shape", tuple(t.x.shape), "three dimensions, [B, S, C]")
    for name, tensor in t._asdict().items():
        if tensor is None:
            continue
        require(tensor.dtype in (*DTYPES, torch.float64), f"{name}.dtype", tensor.dtype, "fp32, bf16, fp16 or fp64")
        require(tensor.device == t.x.device, f"{name}.device", tensor.device, f"x's, {t.x.device}")
    batch, length, width = t.x.shape
    for name, y in (("y1", t.y1), ("y2", t.y2)):
        if y is not None:
            require(y.shape == t.x.shape, f"{name}.shape", tuple(y.shape), f"x's, {tuple(t.x.shape)}")
    for name in ("gate1", "gate2", "scale", "shift"):
        factor = getattr(t, name)
        if factor is None:
            continue
        require(factor.dim() == 3, f"{name}.shape", tuple(factor.shape), "three dimensions that broadcast to x's")
        lanes = (width, 1) if name.startswith("gate") else (width,)
        ok = (factor.shape[0] in (1, batch), factor.shape[1] in (1, length), factor.shape[2] in lanes)
        require(all(ok), f"{name}.shape", tuple(factor.shape),
                f"[1 or {batch}, 1 or {length}, {' or '.join(map(str, lanes))}]")  # fmt: skip
    for name in ("weight1", "bias1", "weight2", "bias2"):
        vector = getattr(t, name)
        if vector is not None:
            require(vector.dim() == 1 and vector.shape[0] == width, f"{name}.shape", tuple(vector.shape), f"[{width}]")
    for y, gate, index in ((t.y1, t.gate1, 1), (t.y2, t.gate2, 2)):
        require(y is not None or gate is None, f"gate{index}", "given", f"None without y{index}")
    require(t.y1 is not None or t.y2 is None, "y2", "given", "None without y1")
    require(len(spec.alphas) == 2, "alphas", list(spec.alphas), "two numbers, one a term")
    require(spec.norm in NORMS, "norm", repr(spec.norm), ", ".join(NORMS))
    require(spec.outputs in (1, 2), "outputs", spec.outputs, "1, 2")
    modulated = t.scale is not None or t.shift is not None
    require(spec.outputs == 1 or not modulated, "outputs", 2, "1 with scale or shift")
    second = t.weight2 is not None or t.bias2 is not None
    require(spec.outputs == 2 or not second, "weight2 or bias2", "given", "None when outputs is 1")
    if t.y1 is None:
        require(not spec.write_r, "write_r", True, "False without y1: r is x")
        require(spec.r_dtype == t.x.dtype, "r_dtype", spec.r_dtype, f"x's without y1, {t.x.dtype}")


def no_kernel(t: Operands, spec: Spec) -> str | None:
    """Why the kernels cannot take these arguments, or None; installs no guard but on the width."""
    if reason := no_triton(t.x):
        return reason
    width = t.x.shape[-1]
    if not 8 <= width <= MAX_WIDTH or width % 8:
        return f"C is {width}; allowed: multiples of 8 up to {MAX_WIDTH}"
    for name, tensor in t._asdict().items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name}.dtype is {tensor.dtype}; allowed: fp32, bf16, fp16"
        if tensor.dim() > 0 and tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
            return f"{name}.stride(-1) is {tensor.stride(-1)}; allowed: 1"
    for name, dtype in (("r_dtype", spec.r_dtype), ("out_dtype", spec.out_dtype)):
        if dtype not in DTYPES:
            return f"{name} is {dtype}; allowed: fp32, bf16, fp16"
    return None


def strides(x: Tensor | None) -> tuple[int, int]:
    """Element strides over batch and position of a [B, S, C] tensor, 0 where it is broadcast."""
    if x is None:
        return 0, 0
    return (0 if x.shape[0] == 1 else x.stride(0)), (0 if x.shape[1] == 1 else x.stride(1))


# -- in plain torch -------------------------------------------------------------------------------------------------


def acc_dtype(t: Operands) -> torch.dtype:
    """The dtype of the arithmetic: float64 where any operand is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in t) else torch.float32


def combine(t: Operands, spec: Spec) -> Tensor:
    """r in its dtype: x + sum_i alpha_i * gate_i * y_i, rounded once."""
    dtype = acc_dtype(t)
    r = t.x.to(dtype)
    for y, gate, alpha in ((t.y1, t.gate1, spec.alphas[0]), (t.y2, t.gate2, spec.alphas[1])):
        if y is None:
            continue
        term = y.to(dtype) if gate is None else y.to(dtype) * gate.to(dtype)
        r = r + (term if alpha == 1 else term * alpha)
    return r.to(spec.r_dtype)


def normalise(r: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """(r - mean) * rstd, without the mean for rms, and rstd."""
    if spec.norm == "layer":
        r = r - r.mean(-1, keepdim=True)
    rstd = torch.rsqrt((r * r).mean(-1, keepdim=True) + spec.eps)
    return r * rstd, rstd


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None, spec: Spec) -> Tensor:
    """x_hat * (weight + weight_offset) + bias."""
    if weight is not None:
        x_hat = x_hat * (weight.to(x_hat.dtype) + spec.weight_offset)
    return x_hat if bias is None else x_hat + bias.to(x_hat.dtype)


def modulate(h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """h * (1 + scale) + shift."""
    if scale is not None:
        h = h * (1 + scale.to(h.dtype))
    return h if shift is None else h + shift.to(h.dtype)
