"""A few rows times 8-bit codes that lie along the columns, as x @ W [K, N] has them, for `dequant_linear`.

    out[m, n] = activation(sum over k of x[m, k] * weight[n, k] + bias[n])

Neighbours in memory are neighbouring results, so a program takes BLOCK_N of these and a part of the sum: the codes pass
through shared memory as 16-bit floats to matrix instructions of 16 rows. A second launch adds the parts up, in order. A
zero point is subtracted in fp32 and the difference rounded to x's dtype; scales multiply sums in fp32.

Writing the weight out instead moves five bytes a weight more than the one here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dequant_arithmetic import TYPES
from ._dequant_layout import strides
from ._gemv_common import activate
from ._ops import launch, no_triton, on_device_of, tl, triton
from .packed_weight import COMPUTE, Format

MAX_ROWS = 16
LEAST = 16  # columns of a matrix instruction
PROGRAMS = 528  # four a multiprocessor of an H200


class Config(NamedTuple):
    """Results of a program, codes of each in a step, how many programs share a sum, warps, steps on their way."""

    block_n: int = 128
    block_k: int = 64
    parts: int = 1
    warps: int = 4
    stages: int = 4


def config(n: int, k: int) -> Config:
    """For a weight [n, k]; not measured yet."""
    steps = triton.cdiv(k, Config().block_k)
    parts = max(1, min(PROGRAMS // triton.cdiv(n, Config().block_n), steps // 3, 16))
    return Config(parts=parts)


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot take these, or None."""
    if reason := no_triton(x):
        return reason
    rows = x.numel() // max(int(x.shape[-1]), 1)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {x.dtype}; allowed: fp16, bf16"
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    if form.bits != 8 or form.kind not in ("int", "uint") or form.arithmetic not in ("sub_mul", "output"):
        return f"codes are {form.kind}{form.bits}, {form.arithmetic!r}; allowed: int8, uint8; sub_mul, output"
    if codes.dim() != 2 or codes.numel() == 0 or not codes.stride(0) == 1 < codes.stride(1):
        return f"codes {list(codes.shape)} have strides {list(codes.stride())}; allowed: [N, K] along N"
    if _step(codes, form) < LEAST:
        return f"groups are of {form.group} columns; allowed: multiples of {LEAST}"
    return None


def _step(codes: Tensor, form: Format) -> int:
    """Columns of a step, a power of two of one scale."""
    step = Config().block_k
    while form.group < codes.shape[1] and form.group % step:
        step //= 2
    return step


@triton.jit
def _kernel(x, codes, scale, zero, out, M, N: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
            FLIP: tl.constexpr, LESS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, SCALE_N: tl.constexpr,
            SCALE_K: tl.constexpr, ZERO: tl.constexpr, ZERO_N: tl.constexpr, ZERO_K: tl.constexpr,
            COMPUTE: tl.constexpr, STEPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sums of BLOCK_N results over STEPS steps of BLOCK_K columns; codes of a column are STRIDE bytes apart.

    A code is an unsigned byte, which with the bits FLIP is a number in fp32, LESS too big.
    """
    GROUPED: tl.constexpr = GROUP < K
    part = tl.program_id(0) % PARTS
    n = tl.program_id(0) // PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, 16)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (part * STEPS + step) * BLOCK_K
        k = first + lane
        q = tl.load(codes + k.to(tl.int64)[:, None] * STRIDE + n[None, :], (k < K)[:, None] & (n < N)[None, :],
                    other=0, eviction_policy="evict_first")  # fmt: skip
        a = tl.load(x + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], other=0)
        # 2**23 + q, less that: conversions of integers run at a quarter of the rate of this
        value = (q.to(tl.int32) ^ FLIP).to(tl.float32, bitcast=True) - LESS
        group = tl.minimum(first, K - 1) // GROUP
        at = (n // ROWS).to(tl.int64)
        if ZERO:
            z = tl.load(zero + at * ZERO_N + group * ZERO_K, n < N, other=0).to(tl.float32).to(COMPUTE).to(tl.float32)
            value -= z[None, :]
        if GROUPED:
            s = tl.load(scale + at * SCALE_N + group * SCALE_K, n < N, other=0).to(tl.float32)
            acc += tl.dot(a, value.to(a.dtype)) * s.to(COMPUTE).to(tl.float32)[None, :]
        else:
            acc = tl.dot(a, value.to(a.dtype), acc)
    tl.store(out + (part * M + m).to(tl.int64)[:, None] * N + n[None, :], acc, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add(sums, scale, bias, out, M, N: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, SCALE_N: tl.constexpr,
         COMPUTE: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """Adds the parts of BLOCK results up; SCALED: each has one scale."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < M * N
    n = at % N
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + part * M * N + at, inside, other=0)
    if SCALED:
        total *= tl.load(scale + n // ROWS * SCALE_N, inside, other=0).to(tl.float32).to(COMPUTE).to(tl.float32)
    if BIASED:
        total += tl.load(bias + n, inside, other=0).to(tl.float32)
    tl.store(out + at, activate(total, ACTIVATION).to(out.dtype.element_ty), inside)


def constants(codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format, chosen: Config) -> dict[str, Any]:
    """The first kernel's constants and Triton's options."""
    n, k = codes.shape
    scale_n, scale_k = strides(scale)
    zero_n, zero_k = (0, 0) if zero is None else strides(zero)
    step = min(_step(codes, form), chosen.block_k)
    flip = 128 if form.kind == "int" else 0  # as unsigned bytes
    return {
        "N": n, "K": k, "STRIDE": codes.stride(1), "FLIP": 0x4B000000 + flip,
        "LESS": float((1 << 23) + flip + form.offset), "ROWS": form.rows,
        "GROUP": min(form.group, k), "SCALE_N": scale_n, "SCALE_K": scale_k, "ZERO": zero is not None,
        "ZERO_N": zero_n, "ZERO_K": zero_k, "COMPUTE": TYPES[COMPUTE[form.compute]],
        "STEPS": triton.cdiv(triton.cdiv(k, step), chosen.parts), "PARTS": chosen.parts, "BLOCK_N": chosen.block_n,
        "BLOCK_K": step, "STAGES": chosen.stages, "num_warps": chosen.warps,
    }  # fmt: skip


def columns_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
    chosen: Config | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """The product for inputs that `supports` takes, through an activation of `_gemv_common.ACTIVATIONS`."""
    n, k = codes.shape
    flat = x.reshape(-1, k).contiguous()
    m = flat.shape[0]
    chosen = chosen or config(n, k)
    known = constants(codes, scale, zero, form, chosen)
    sums = flat.new_empty(chosen.parts, m, n, dtype=torch.float32)
    out = flat.new_empty(m, n)
    last = {"N": n, "ROWS": form.rows, "SCALED": form.group >= k, "SCALE_N": known["SCALE_N"],
            "COMPUTE": known["COMPUTE"], "BIASED": bias is not None, "ACTIVATION": activation,
            "PARTS": chosen.parts, "BLOCK": 512}  # fmt: skip
    with on_device_of(x):
        grid = triton.cdiv(n, chosen.block_n) * chosen.parts
        launch(_kernel, grid, [flat, codes.view(torch.uint8), scale, scale if zero is None else zero, sums, m], known)
        launch(_add, triton.cdiv(m * n, 512), [sums, scale, scale if bias is None else bias, out, m], last)
    return out.view(*x.shape[:-1], n)
