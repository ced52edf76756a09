"""A weight of codes written out in one pass, bit for bit as `packed_weight.decode`: for products with many rows.

Arithmetic is in fp32, rounded to the format's type after each step: with 24 bits that is what a step of 8 or 11 bits
would give. It is bound by what it writes, so all else is done once for the weights of a chunk: neighbours in a row that
share a scale, eight as a rule, which a thread stores with one instruction of 16 bytes. Neighbouring threads have
neighbouring chunks: of a row, or, where rows are closer to each other in memory than a row's pieces (GPTQ), four chunks
of eight rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._bit_planes import BITS
from ._dequant_arithmetic import TYPES, exact, number, weight
from ._dequant_layout import bytes_in_row, bytes_of, from_aligned, run_of, strides
from ._dequant_planes import decode_planes, no_planes
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
    if bytes_of(codes) is None:
        return f"codes {list(codes.shape)} have strides {list(codes.stride())}; allowed: pieces at one distance"
    if lut is not None and not lut.is_contiguous():
        return "the table is not contiguous"
    if form.kind == "fp8_e4m3" and not INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "the device is older than sm_89"
    if form.kind == "lut16" and zero is not None:
        return "a table of 16 and a zero point"
    if codes.numel() >= 1 << 31:
        return "there are more codes than 32 bits count"
    return no_planes(codes, form) if form.bits in BITS else None


@triton.jit
def _kernel(codes, scale, zero, lut, out, count, N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
            KIND: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr, HIGH_FIRST: tl.constexpr,
            ROWS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, ARITHMETIC: tl.constexpr,
            COMPUTE: tl.constexpr, EXACT: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
            ZERO: tl.constexpr, ZERO_N: tl.constexpr, ZERO_K: tl.constexpr, APART: tl.constexpr, EACH: tl.constexpr,
            IN_ROW: tl.constexpr, BYTES: tl.constexpr, SPAN: tl.constexpr, BETWEEN: tl.constexpr, ROW: tl.constexpr,
            LEAD: tl.constexpr, ALIGNED: tl.constexpr, ACROSS: tl.constexpr, CHUNKS: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """CHUNKS chunks of BYTES bytes of codes; a row of these has IN_ROW chunks.

    HALVES: a byte [n, k] is two rows' weight, n's and (n + HALVES)'s; or 0. APART: the two weights of a byte may have
    two scales. EACH: each weight of a chunk has its own. SCALE_N, ..., ZERO_K: strides. ACROSS: neighbouring chunks are
    of neighbouring rows. SPAN, BETWEEN, ROW: see `_dequant_layout.Bytes`. Chunks start at multiples of ALIGNED.
    """
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    chunk = (tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    inside = chunk < count
    lane = tl.arange(0, BYTES)[None, :]
    if ACROSS:
        BANDS: tl.constexpr = (N if HALVES == 0 else HALVES) // 8
        tile = chunk // 32
        n = tile % BANDS * 8 + chunk % 8
        byte = (tile // BANDS * 4 + chunk % 32 // 8) * BYTES
    else:
        n, byte = chunk // IN_ROW, chunk % IN_ROW * BYTES
    FLAT: tl.constexpr = not ACROSS and BYTES * IN_ROW == ROW and SPAN == ROW
    if FLAT:
        start = chunk.to(tl.int64) * BYTES + LEAD
    else:
        start = n.to(tl.int64) * ROW + (byte // SPAN).to(tl.int64) * BETWEEN + (LEAD + byte % SPAN)
    at = tl.multiple_of(start, [ALIGNED, ALIGNED]) + lane
    if EVEN:
        q = tl.load(codes + at, eviction_policy="evict_first")
    else:
        q = tl.load(codes + at, inside, eviction_policy="evict_first")
    first = chunk.to(tl.int64) * BYTES
    if ACROSS:
        first = n.to(tl.int64) * (IN_ROW * BYTES) + byte
    if BITS == 8:
        value = number(q, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        column = byte
        if EACH:
            column = byte + lane
        value = weight(value, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K, ZERO,
                       ZERO_N, ZERO_K, ARITHMETIC, COMPUTE)  # fmt: skip
        if EVEN:
            tl.store(out + first + lane, value)
        else:
            tl.store(out + first + lane, value, inside)
    else:
        low, high = q & 15, (q >> 4) & 15
        if HIGH_FIRST:
            low, high = high, low
        a = number(low, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        b = number(high, lut, KIND, OFFSET, BITS, COMPUTE, EXACT)
        if HALVES > 0:
            column, step = byte, 0
        elif RUN == 0:
            column, step = 2 * byte, 1
        else:
            column, step = byte // RUN * (2 * RUN) + byte % RUN, RUN
        if APART:
            a = weight(a, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K, ZERO, ZERO_N,
                       ZERO_K, ARITHMETIC, COMPUTE)  # fmt: skip
            b = weight(b, n + HALVES, column + step, inside, scale, zero, out, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K,
                       ZERO, ZERO_N, ZERO_K, ARITHMETIC, COMPUTE)  # fmt: skip
        if HALVES == 0 and RUN == 0:  # pairs lie side by side: one wide store
            pairs = tl.interleave(a, b)
            if not APART:
                pairs = weight(pairs, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K,
                               ZERO, ZERO_N, ZERO_K, ARITHMETIC, COMPUTE)  # fmt: skip
            to = out + 2 * first + tl.arange(0, 2 * BYTES)[None, :]
            if EVEN:
                tl.store(to, pairs)
            else:
                tl.store(to, pairs, inside)
        else:
            to = out + first + lane
            if HALVES == 0:
                to = out + tl.multiple_of(n.to(tl.int64) * K + column, [BYTES, BYTES]) + lane
            tl.store(to, a, inside)
            tl.store(to + (RUN if HALVES == 0 else HALVES * K), b, inside)


def chunk_of(codes: Tensor, form: Format) -> tuple[int, bool]:
    """Bytes of a chunk, a power of two, and whether a byte's two weights may have two scales."""
    _, k = weight_shape(codes, form)
    run, alone, where = run_of(codes, form), form.group >= k, bytes_of(codes)
    assert where is not None
    pairs = form.bits == 4 and run == 0
    most = 4 if pairs else 8
    apart = form.bits == 4 and (not pairs or (not alone and form.group % 2 == 1))
    of_group = 1 if pairs and apart else form.group // 2 if pairs else form.group
    if form.bits == 8 and form.group == 1:
        of_group = 0
    sizes = (bytes_in_row(codes, form), where.span, run or 0, 0 if alone else of_group)
    return next(size for size in (most, most // 2, most // 4, 1) if all(whole % size == 0 for whole in sizes)), apart


def constants(codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format, lead: int = 0) -> dict[str, Any]:
    """The kernel's constants and Triton's options."""
    n, k = weight_shape(codes, form)
    size, apart = chunk_of(codes, form)
    where = bytes_of(codes)
    assert where is not None
    in_row = bytes_in_row(codes, form) // size
    scale_n, scale_k = strides(scale)
    zero_n, zero_k = (0, 0) if zero is None else strides(zero)
    halves = codes.shape[0] if form.nibbles.startswith("rows") else 0
    return {
        "N": n, "K": k, "BITS": form.bits, "KIND": form.kind, "RUN": run_of(codes, form) or 0, "HALVES": halves,
        "HIGH_FIRST": form.nibbles.endswith("high"), "ROWS": form.rows, "GROUP": min(form.group, k),
        "OFFSET": form.offset, "ARITHMETIC": form.arithmetic, "COMPUTE": TYPES[COMPUTE[form.compute]],
        "EXACT": exact(form),
        "SCALE_N": scale_n, "SCALE_K": scale_k, "ZERO": zero is not None, "ZERO_N": zero_n, "ZERO_K": zero_k,
        "APART": apart, "EACH": form.bits == 8 and 1 == form.group < k, "IN_ROW": in_row, "BYTES": size,
        "SPAN": where.span, "BETWEEN": where.between, "ROW": where.row, "LEAD": lead,
        "ALIGNED": math.gcd(where.row, where.between, size, lead),
        "ACROSS": where.row < where.between and codes.shape[0] % 8 == 0 and in_row % 4 == 0, "CHUNKS": CHUNKS,
        "EVEN": codes.numel() // size % CHUNKS == 0, "num_warps": WARPS, "enable_fp_fusion": False,
    }  # fmt: skip


def decode_on_device(
    codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """`packed_weight.decode` in one kernel, for parts that `supports` takes."""
    n, k = weight_shape(codes, form)
    if codes.numel() == 0:
        return decode(codes, scale, zero, lut, form, dtype)
    if form.bits in BITS:
        return decode_planes(codes, scale, zero, form, dtype)
    if form.bits == 8 and codes.dim() == 2 and codes.stride(0) == 1 < codes.stride(1):  # as its transpose is laid out
        swapped = form._replace(rows=form.group, group=form.rows)
        zeros = None if zero is None else zero.t()
        return decode_on_device(codes.t(), scale.t(), zeros, lut, swapped, dtype).t()
    out = codes.new_empty((n, k), dtype=dtype)
    read, lead = from_aligned(codes)
    known = constants(codes, scale, zero, form, lead)
    count = codes.numel() // known["BYTES"]
    arguments = [read, scale, scale if zero is None else zero, scale if lut is None else lut, out, count]
    with on_device_of(codes):
        launch(_kernel, triton.cdiv(count, CHUNKS), arguments, known)
    return out
