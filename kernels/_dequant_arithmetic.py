"""Codes' numbers as weights, for kernels that write a weight out: the arithmetic of `packed_weight.decode`, in fp32 and
rounded to the format's type after each step."""

from __future__ import annotations

from typing import Any

import torch

from ._ops import tl, triton
from .packed_weight import COMPUTE, Format


@triton.jit
def number(q, lut, KIND: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr,
            EXACT: tl.constexpr):  # fmt: skip
    """Codes as numbers of COMPUTE, in fp32; EXACT: all are numbers of COMPUTE as they are."""
    if KIND == "lut16":
        value = tl.load(lut + q.to(tl.int32)).to(tl.float32)
    elif KIND == "int" or KIND == "uint":
        value = q.to(tl.int32)
        if KIND == "int" and BITS == 4:
            value = (value ^ 8) - 8
        value = (value - OFFSET).to(tl.float32)
    else:
        value = q.to(tl.float32)
    if not EXACT:
        value = value.to(COMPUTE).to(tl.float32)
    return value


@triton.jit
def shared(values, n, column, inside, ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
            STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """A chunk's scale or zero point. Integers go through fp32, as in torch."""
    at = (n // ROWS).to(tl.int64) * STRIDE_N
    if GROUPS > 1:
        at += (column // GROUP).to(tl.int64) * STRIDE_K
    return tl.load(values + at, inside, other=0).to(tl.float32).to(COMPUTE).to(tl.float32)


@triton.jit
def weight(value, n, column, inside, scale, zero, out, ROWS: tl.constexpr, GROUP: tl.constexpr,
            GROUPS: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, ZERO: tl.constexpr,
            ZERO_N: tl.constexpr, ZERO_K: tl.constexpr, ARITHMETIC: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Weights of chunks as `out` has them, from their codes' numbers."""
    if ARITHMETIC != "output":
        s = shared(scale, n, column, inside, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K, COMPUTE)
        if ZERO:
            z = shared(zero, n, column, inside, ROWS, GROUP, GROUPS, ZERO_N, ZERO_K, COMPUTE)
        if ZERO and ARITHMETIC == "sub_mul":
            value = (value - z).to(COMPUTE).to(tl.float32)
        value = value * s
        if ARITHMETIC == "mul_add":
            value = value.to(COMPUTE).to(tl.float32) + z
        elif ARITHMETIC == "mul_sub":
            value = value.to(COMPUTE).to(tl.float32) - z
    if out.dtype.element_ty == COMPUTE:
        return value.to(COMPUTE)
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        return value.to(COMPUTE).to(tl.float32).to(out.dtype.element_ty)


def exact(form: Format) -> bool:
    """Whether all numbers of a format's codes are numbers of the type that it computes in, as they are."""
    if form.kind.startswith("fp8"):
        return True
    lowest, highest = {(8, "int"): (-128, 127), (4, "int"): (-8, 7)}.get(form[:2], (0, (1 << form.bits) - 1))
    integers = {torch.float32: 1 << 24, torch.float16: 2048, torch.bfloat16: 256}[COMPUTE[form.compute]]
    return form.kind != "lut16" and max(abs(lowest - form.offset), abs(highest - form.offset)) <= integers


TYPES: dict[torch.dtype, Any] = {
    dtype: getattr(tl, str(dtype).partition(".")[2], None) for dtype in (torch.float32, torch.float16, torch.bfloat16)
}
