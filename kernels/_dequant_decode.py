"""A weight of codes written out in one pass, bit for bit as `packed_weight.decode`: for products with many rows.

Arithmetic is in fp32, rounded to the format's type after each step: with 24 bits that is what a step of 8 or 11 bits
would give. It is bound by what it writes, so all else is done once for the weights of a chunk: neighbours in a row that
share a scale, eight as a rule, which a thread stores with one instruction of 16 bytes. Neighbouring threads have
neighbouring chunks, of rows that follow each other in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._ops import INTERPRETED, launch, no_triton, on_device_of, tl, triton
from .packed_weight import COMPUTE, Format, decode, weight_shape

CHUNKS, WARPS = 512, 4  # of a program: four chunks a thread


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
    if codes.numel() >= 1 << 31:
        return "there are more codes than 32 bits count"
    return None


@triton.jit
def _number(q, lut, KIND: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr,
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
def _shared(values, n, column, inside, ROWS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
            COMPUTE: tl.constexpr):  # fmt: skip
    """A chunk's scale or zero point. Integers go through fp32, as in torch."""
    at = n // ROWS
    if GROUPS > 1:
        at = at.to(tl.int64) * GROUPS + column // GROUP
    return tl.load(values + at, inside, other=0).to(tl.float32).to(COMPUTE).to(tl.float32)


@triton.jit
def _weight(value, n, column, inside, scale, zero, out, ROWS: tl.constexpr, GROUP: tl.constexpr,
            GROUPS: tl.constexpr, ARITHMETIC: tl.constexpr, COMPUTE: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """Weights of chunks as `out` has them, from their codes' numbers."""
    if ARITHMETIC != "output":
        s = _shared(scale, n, column, inside, ROWS, GROUP, GROUPS, COMPUTE)
        if ZERO:
            z = _shared(zero, n, column, inside, ROWS, GROUP, GROUPS, COMPUTE)
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


@triton.jit
def _kernel(codes, scale, zero, lut, out, count, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
            RUN: tl.constexpr, HIGH_FIRST: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            OFFSET: tl.constexpr, ARITHMETIC: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr,
            ZERO: tl.constexpr, APART: tl.constexpr, BYTES: tl.constexpr, CHUNKS: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """CHUNKS chunks of BYTES bytes of codes. APART: the two weights of a byte may have two scales."""
    IN_ROW: tl.constexpr = K * BITS // 8 // BYTES
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    chunk = (tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    inside = chunk < count
    n, byte = chunk // IN_ROW, chunk % IN_ROW * BYTES
    lane = tl.arange(0, BYTES)[None, :]
    first = chunk.to(tl.int64) * BYTES
    if EVEN:
        q = tl.load(codes + first + lane, eviction_policy="evict_first")
    else:
        q = tl.load(codes + first + lane, inside, eviction_policy="evict_first")
    if BITS == 8:
        value = _number(q, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        value = _weight(value, n, byte, inside, scale, zero, out, ROWS, GROUP, GROUPS, ARITHMETIC, COMPUTE, ZERO)
        if EVEN:
            tl.store(out + first + lane, value)
        else:
            tl.store(out + first + lane, value, inside)
    else:
        low, high = q & 15, (q >> 4) & 15
        if HIGH_FIRST:
            low, high = high, low
        a = _number(low, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        b = _number(high, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        if RUN == 0:
            column, step = 2 * byte, 1
        else:
            column, step = byte // RUN * (2 * RUN) + byte % RUN, RUN
        if APART:
            a = _weight(a, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, ARITHMETIC, COMPUTE, ZERO)
            b = _weight(b, n, column + step, inside, scale, zero, out, ROWS, GROUP, GROUPS, ARITHMETIC, COMPUTE, ZERO)
        if RUN == 0:  # pairs lie side by side: one wide store
            pairs = tl.interleave(a, b)
            if not APART:
                pairs = _weight(pairs, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, ARITHMETIC, COMPUTE,
                                ZERO)  # fmt: skip
            at = out + 2 * first + tl.arange(0, 2 * BYTES)[None, :]
            if EVEN:
                tl.store(at, pairs)
            else:
                tl.store(at, pairs, inside)
        else:
            at = out + n.to(tl.int64) * K + column + lane
            tl.store(at, a, inside)
            tl.store(at + RUN, b, inside)


def chunk_of(codes: Tensor, form: Format) -> tuple[int, bool]:
    """Bytes of a chunk, a power of two, and whether a byte's two weights may have two scales."""
    _, k = weight_shape(codes, form)
    run = int(codes.shape[-1]) if form.nibbles.startswith("half") else 0
    per_byte, alone = 8 // form.bits, form.group >= k
    pairs = per_byte == 2 and run == 0
    most = 4 if pairs else 8
    apart = run > 0 or (pairs and not alone and form.group % 2 == 1)
    of_group = 1 if pairs and apart else form.group // 2 if pairs else form.group
    sizes = (k * form.bits // 8, run, 0 if alone else of_group)
    return next(size for size in (most, most // 2, most // 4, 1) if all(whole % size == 0 for whole in sizes)), apart


def constants(codes: Tensor, zero: Tensor | None, form: Format) -> dict[str, Any]:
    """The kernel's constants and Triton's options."""
    _, k = weight_shape(codes, form)
    size, apart = chunk_of(codes, form)
    lowest, highest = {(8, "int"): (-128, 127), (8, "uint"): (0, 255), (4, "int"): (-8, 7)}.get(form[:2], (0, 15))
    integers = {torch.float32: 1 << 24, torch.float16: 2048, torch.bfloat16: 256}[COMPUTE[form.compute]]
    largest = max(abs(lowest - form.offset), abs(highest - form.offset))
    return {
        "K": k, "BITS": form.bits, "KIND": form.kind, "RUN": codes.shape[-1] if form.nibbles.startswith("half") else 0,
        "HIGH_FIRST": form.nibbles.endswith("high"), "ROWS": form.rows, "GROUP": min(form.group, k),
        "OFFSET": form.offset, "ARITHMETIC": form.arithmetic, "COMPUTE": _TYPES[COMPUTE[form.compute]],
        "EXACT": form.kind.startswith("fp8") or (form.kind != "lut16" and largest <= integers),
        "ZERO": zero is not None, "APART": apart, "BYTES": size, "CHUNKS": CHUNKS,
        "EVEN": codes.numel() // size % CHUNKS == 0, "num_warps": WARPS, "enable_fp_fusion": False,
    }  # fmt: skip


def decode_on_device(
    codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """`packed_weight.decode` in one kernel, for parts that `supports` takes."""
    n, k = weight_shape(codes, form)
    if codes.numel() == 0:
        return decode(codes, scale, zero, lut, form, dtype)
    out = codes.new_empty((n, k), dtype=dtype)
    known = constants(codes, zero, form)
    count = codes.numel() // known["BYTES"]
    arguments = [codes, scale, scale if zero is None else zero, scale if lut is None else lut, out, count]
    with on_device_of(codes):
        launch(_kernel, triton.cdiv(count, CHUNKS), arguments, known)
    return out


_TYPES = {torch.float32: getattr(tl, "float32", None), torch.float16: getattr(tl, "float16", None),
          torch.bfloat16: getattr(tl, "bfloat16", None)}  # fmt: skip
