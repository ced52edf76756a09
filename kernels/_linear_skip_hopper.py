"""linear_skip on Hopper: which of the two kernels takes a call, known when it comes, and their launches."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _hopper_gemm
from ._linear_skip_common import Operands, Spec, evaluated
from ._ops import INTERPRETED, Launch, on_device_of
from ._pointwise import IDENTITY


def cannot_take(t: Operands, spec: Spec) -> str | None:
    """Why Hopper's kernel takes no call of this kind, or None; installs no guard."""
    if _hopper_gemm.MISSING:
        return _hopper_gemm.MISSING
    if INTERPRETED or t.x.device.type != "cuda" or torch.version.hip is not None:
        return "the device is no NVIDIA GPU"
    if torch.cuda.get_device_capability(t.x.device) != (9, 0):
        return "the GPU is not Hopper (compute capability 9.0)"
    if t.y.dtype not in (torch.bfloat16, torch.float16):
        return f"y.dtype is {t.y.dtype}; allowed: bfloat16, float16"
    if t.x.dtype != spec.out_dtype:
        return f"x.dtype is {t.x.dtype}; allowed: the result's {spec.out_dtype}, which takes its place"
    return None


def kind(factor: Tensor | None) -> str:
    """What a coefficient [B, S, N] has numbers for: each row, each lane, or all."""
    if factor is None:
        return "none"
    if factor.shape[2] == 1:
        return "row"
    return "lane" if factor.shape[0] == 1 and factor.shape[1] == 1 else "full"


def rank3(x: Tensor) -> Tensor:
    """A view with leading ones up to three dimensions."""
    for _ in range(3 - x.dim()):
        x = x.unsqueeze(0)
    return x


def strides(factor: Tensor | None) -> tuple[int, int, int]:
    """Element strides over batch, position and lane, 0 where it is broadcast."""
    if factor is None:
        return 0, 0, 0
    b, s, n = (0 if size == 1 else stride for size, stride in zip(factor.shape, factor.stride(), strict=True))
    return b, s, n


def rows_of(x: Tensor) -> Tensor | None:
    """[rows, lanes] of a real tensor [B, S, N] without a copy, or None."""
    batch, length, lanes = x.shape
    if batch == 1:
        return x[0]
    if length == 1:
        return x[:, 0]
    flat = x.stride(0) == length * x.stride(1)
    return x.as_strided((batch * length, lanes), (x.stride(1), x.stride(2))) if flat else None


# By everything but the tensors' data; None: the other kernel takes it.
_launches: dict[tuple[Any, ...], Launch | None] = {}


def launch(t: Operands, spec: Spec, out: Tensor, linear: Tensor | None, how: _hopper_gemm.Config | None = None) -> bool:
    """Launches the kernel on real tensors, if it can take them; else returns False and has done nothing.

    Args:
        t: operands of which `cannot_take` is None, with at least one row.
        spec: options.
        out: the result, contiguous in x's shape.
        linear: the product's, or None if it is not kept.
        how: the tiles; None: `_hopper_gemm.config`'s.
    """
    if any(c is not None and of != IDENTITY and kind(rank3(c)) == "full"
           for c, of in ((t.a, spec.a_of), (t.b, spec.b_of))):  # fmt: skip
        t, spec = evaluated(t, spec)
    alike = [None if z is None else (z.shape, z.stride(), z.dtype, z.device, z.data_ptr() % 16) for z in t]
    key = (spec, how, *alike)
    y = t.y.reshape(-1, t.weight.shape[1])
    x = rows_of(rank3(t.x))
    bias = None if t.bias is None else t.bias.contiguous()
    results = [out.view(-1, out.shape[-1]), None if linear is None else linear.view(-1, out.shape[-1])]
    known: Launch | Literal[False] | None = _launches.get(key, False)  # looked up once: another thread may clear them
    if known is False:
        if len(_launches) == 1024:
            _launches.clear()
        first = _launches[key] = _first(t, spec, y, x, bias, results, how)
        return first is not None
    if known is None:
        return False
    weight = t.weight if t.weight.stride(1) == 1 else t.weight.t()
    given = (y, weight, x, *results, bias, t.a, t.b)
    with on_device_of(t.x):
        known.again(*(z for z in given if z is not None))
    return True


def _first(t: Operands, spec: Spec, y: Tensor, x: Tensor | None, bias: Tensor | None, results: list[Tensor | None],
           how: _hopper_gemm.Config | None) -> Launch | None:  # fmt: skip
    """The first launch of its kind, or None if the kernel cannot take it."""
    weight = t.weight if t.weight.stride(1) == 1 else t.weight.t()
    out, linear = results
    assert out is not None
    if x is None:
        return None
    read = {"y": y, "weight": weight, "x": x, "out": out} | ({} if linear is None else {"linear": linear})
    if any(_hopper_gemm.cannot_read(name, z) for name, z in read.items()):
        return None
    a, b = (None if c is None else rank3(c) for c in (t.a, t.b))
    lanes = 1 + (kind(a) == "lane") + (kind(b) == "lane")
    fixed = (x.element_size(), True, linear is not None, lanes)
    if how is None:
        how = _hopper_gemm.config(int(out.shape[0]), int(out.shape[1]), *fixed)
    elif _hopper_gemm.stages_that_fit(how, *fixed) < how.stages:
        raise ValueError(f"{how} does not fit the shared memory")
    if how is None:
        return None
    call = _hopper_gemm.call(how, y, t.weight, bias, x, out, linear, spec.mode, (a, *strides(a), b, *strides(b)),
                             (kind(a), kind(b)), (spec.alpha, spec.beta), (spec.a_of, spec.b_of),
                             int(rank3(t.x).shape[1]))  # fmt: skip
    with on_device_of(t.x):
        return Launch(_hopper_gemm.kernel, *call)
