"""A weight of codes written out in one pass, bit for bit as `packed_weight.decode`: for products with many rows.

Arithmetic is in fp32, rounded to the format's type after each step: with 24 bits that is what a step of 8 or 11 bits
would give. A program takes TILE bytes of BLOCK_N rows; it is bound by what it writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import INTERPRETED, launch, no_triton, on_device_of, tl, triton
from .packed_weight import COMPUTE, Format, decode, weight_shape

BLOCK_N, TILE = 4, 1024


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot read these, or None."""
    if reason := no_triton(x):
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {x.dtype}; allowed: fp16, bf16"
    if form.nibbles.startswith("rows"):
        return f"4-bit codes are {form.nibbles!r}: a byte has two rows"
    if not all(part is None or part.is_contiguous() for part in (codes, scale, zero, lut)):
        return "codes, scale, zero point or table are not contiguous"
    if form.kind == "fp8_e4m3" and not INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "the device is older than sm_89"
    if form.kind == "lut16" and zero is not None:
        return "a table of 16 and a zero point"
    return None


@triton.jit
def _weight(q, n, column, inside, scale, zero, lut, KIND: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
            ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ARITHMETIC: tl.constexpr,
            COMPUTE: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """Codes as numbers in COMPUTE."""
    if KIND == "lut16":
        value = tl.load(lut + q.to(tl.int32)).to(COMPUTE).to(tl.float32)
    elif KIND == "int" and BITS == 4:
        value = ((q.to(tl.int32) ^ 8) - 8 - OFFSET).to(COMPUTE).to(tl.float32)
    elif KIND == "int" or KIND == "uint":
        value = (q.to(tl.int32) - OFFSET).to(tl.float32).to(COMPUTE).to(tl.float32)
    else:
        value = q.to(tl.float32)
    if ARITHMETIC != "output":
        at = (n // ROWS).to(tl.int64) * GROUPS + column // GROUP
        s = tl.load(scale + at, inside, other=0.0).to(COMPUTE).to(tl.float32)
        if ZERO:
            z = tl.load(zero + at, inside, other=0).to(COMPUTE).to(tl.float32)
        if ZERO and ARITHMETIC == "sub_mul":
            value = (value - z).to(COMPUTE).to(tl.float32)
        value = (value * s).to(COMPUTE).to(tl.float32)
        if ARITHMETIC == "mul_add":
            value = (value + z).to(COMPUTE).to(tl.float32)
        elif ARITHMETIC == "mul_sub":
            value = (value - z).to(COMPUTE).to(tl.float32)
    return value


@triton.jit
def _kernel(codes, scale, zero, lut, out, N, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
            RUN: tl.constexpr, HIGH_FIRST: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            OFFSET: tl.constexpr, ARITHMETIC: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr,
            BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    ROW_BYTES: tl.constexpr = K * BITS // 8
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    tiles: tl.constexpr = (ROW_BYTES + TILE - 1) // TILE
    n = (tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    byte = (tl.program_id(0) % tiles * TILE + tl.arange(0, TILE))[None, :]
    inside = (n < N) & (byte < ROW_BYTES)
    q = tl.load(codes + n.to(tl.int64) * ROW_BYTES + byte, inside, eviction_policy="evict_first")
    row = out + n.to(tl.int64) * K
    if BITS == 8:
        value = _weight(q, n, byte, inside, scale, zero, lut, KIND, OFFSET, BITS, ROWS, GROUP, GROUPS, ARITHMETIC,
                        COMPUTE, ZERO)  # fmt: skip
        tl.store(row + byte, value.to(out.dtype.element_ty), inside)
    else:
        if HIGH_FIRST:
            first, second = q >> 4, q & 15
        else:
            first, second = q & 15, q >> 4
        if RUN == 0:
            one, other = 2 * byte, 2 * byte + 1
        else:
            one = byte // RUN * (2 * RUN) + byte % RUN
            other = one + RUN
        a = _weight(first, n, one, inside, scale, zero, lut, KIND, OFFSET, BITS, ROWS, GROUP, GROUPS, ARITHMETIC,
                    COMPUTE, ZERO).to(out.dtype.element_ty)  # fmt: skip
        b = _weight(second, n, other, inside, scale, zero, lut, KIND, OFFSET, BITS, ROWS, GROUP, GROUPS, ARITHMETIC,
                    COMPUTE, ZERO).to(out.dtype.element_ty)  # fmt: skip
        if RUN == 0:  # pairs lie side by side: one wide store
            column = tl.program_id(0) % tiles * (2 * TILE) + tl.arange(0, 2 * TILE)[None, :]
            tl.store(row + column, tl.interleave(a, b), (n < N) & (column < K))
        else:
            tl.store(row + one, a, inside)
            tl.store(row + other, b, inside)


def decode_on_device(
    codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """`packed_weight.decode` in one kernel, for parts that `supports` takes."""
    n, k = weight_shape(codes, form)
    if codes.numel() == 0:
        return decode(codes, scale, zero, lut, form, dtype)
    run = int(codes.shape[-1]) if form.nibbles.startswith("half") else 0
    out = codes.new_empty((n, k), dtype=dtype)
    row_bytes = k * form.bits // 8
    tile = min(TILE, triton.next_power_of_2(row_bytes))
    rows = BLOCK_N * (TILE // tile)
    arguments = [codes, scale, scale if zero is None else zero, scale if lut is None else lut, out, n]
    constants = {
        "K": k, "BITS": form.bits, "KIND": form.kind, "RUN": run, "HIGH_FIRST": form.nibbles.endswith("high"),
        "ROWS": form.rows, "GROUP": min(form.group, k), "OFFSET": form.offset, "ARITHMETIC": form.arithmetic,
        "COMPUTE": _TYPES[COMPUTE[form.compute]], "ZERO": zero is not None, "BLOCK_N": rows, "TILE": tile,
        "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    with on_device_of(codes):
        launch(_kernel, triton.cdiv(n, rows) * triton.cdiv(row_bytes, tile), arguments, constants)
    return out


_TYPES = {torch.float32: getattr(tl, "float32", None), torch.float16: getattr(tl, "float16", None),
          torch.bfloat16: getattr(tl, "bfloat16", None)}  # fmt: skip
