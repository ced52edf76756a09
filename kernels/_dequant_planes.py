"""A weight of codes whose bits lie in several places written out, bit for bit as `packed_weight.decode`.

As `_dequant_decode`: a chunk is neighbours in a row that share a scale, eight as a rule, which a thread stores with one
instruction of 16 bytes. It reads the bytes of each plane that have bits of its codes; those that have bits of other
chunks' too are read again, from L1, as the chunks are at work in the same program.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._bit_planes import Plane, planes
from ._dequant_arithmetic import TYPES, exact, number, weight
from ._dequant_layout import bytes_of, from_aligned, strides
from ._ops import launch, on_device_of, tl, triton
from .packed_weight import COMPUTE, Format, weight_shape

CHUNKS, WARPS = 512, 4  # of a program: four chunks a thread


def no_planes(codes: Tensor, form: Format) -> str | None:
    """Why the kernel cannot read codes where they lie, or None."""
    where, (n, k) = bytes_of(codes), weight_shape(codes, form)
    if where is None or where.span % codes.shape[-1]:
        return f"blocks of codes {list(codes.shape)} have strides {list(codes.stride())}; allowed: bytes side by side"
    if n * k // width_of(codes, form) >= 1 << 31:
        return "there are more codes than 32 bits count"
    return None


def width_of(codes: Tensor, form: Format) -> int:
    """Weights of a chunk, a power of two: of one block and one scale."""
    _, k = weight_shape(codes, form)
    weights = 8 * codes.shape[-1] // form.bits
    return math.gcd(8, weights, 0 if form.group >= k else form.group)


@triton.jit
def _plane(codes, start, column, lane, inside, BITS: tl.constexpr, RUN: tl.constexpr, AT: tl.constexpr,
           WIDTH: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """A plane's bits of the codes from a column of a block on; the block is `start` bytes behind `codes`."""
    SIDES: tl.constexpr = 8 // BITS
    if RUN % WIDTH == 0:  # of all codes of the chunk in the same place of neighbouring bytes
        side = column // RUN % SIDES
        first = start + (AT + column // (RUN * SIDES) * RUN + column % RUN)
        at = tl.multiple_of(first, [ALIGNED, ALIGNED]) + lane
    elif RUN == 1 and SIDES % WIDTH == 0:  # in one byte
        side = column % SIDES + lane
        at = start + (AT + column // SIDES)
    else:
        each = column + lane
        side = each // RUN % SIDES
        at = start + (AT + each // (RUN * SIDES) * RUN + each % RUN)
    q = tl.load(codes + at, inside, other=0).to(tl.int32)
    return (q >> (side * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _kernel(codes, scale, zero, out, count, BLOCK: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr,
            LOW_BITS: tl.constexpr, LOW_RUN: tl.constexpr, LOW_AT: tl.constexpr, LOW_ALIGNED: tl.constexpr,
            HIGH_BITS: tl.constexpr, HIGH_RUN: tl.constexpr, HIGH_AT: tl.constexpr, HIGH_ALIGNED: tl.constexpr,
            KIND: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
            ARITHMETIC: tl.constexpr, COMPUTE: tl.constexpr, EXACT: tl.constexpr, SCALE_N: tl.constexpr,
            SCALE_K: tl.constexpr, ZERO: tl.constexpr, ZERO_N: tl.constexpr, ZERO_K: tl.constexpr,
            SPAN: tl.constexpr, BETWEEN: tl.constexpr, ROW: tl.constexpr, LEAD: tl.constexpr, CHUNKS: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """CHUNKS chunks of WIDTH weights. A block is BLOCK weights in SIZE bytes, SPAN of which lie side by side.

    A plane has its BITS in RUNs of bytes from its AT of the block on; HIGH_BITS is 0 where there is one plane.
    """
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    IN_ROW: tl.constexpr = K // WIDTH
    chunk = (tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    inside = chunk < count
    lane = tl.arange(0, WIDTH)[None, :]
    n, column = chunk // IN_ROW, chunk % IN_ROW * WIDTH
    byte = column // BLOCK * SIZE
    start = n.to(tl.int64) * ROW + (byte // SPAN).to(tl.int64) * BETWEEN + (LEAD + byte % SPAN)
    q = _plane(codes, start, column % BLOCK, lane, inside, LOW_BITS, LOW_RUN, LOW_AT, WIDTH, LOW_ALIGNED)
    if HIGH_BITS > 0:
        high = _plane(codes, start, column % BLOCK, lane, inside, HIGH_BITS, HIGH_RUN, HIGH_AT, WIDTH, HIGH_ALIGNED)
        q |= high << LOW_BITS
    value = number(q, scale, KIND, OFFSET, LOW_BITS + HIGH_BITS, COMPUTE, EXACT)
    value = weight(value, n, column, inside, scale, zero, out, ROWS, GROUP, GROUPS, SCALE_N, SCALE_K, ZERO, ZERO_N,
                   ZERO_K, ARITHMETIC, COMPUTE)  # fmt: skip
    tl.store(out + chunk.to(tl.int64) * WIDTH + lane, value, inside)


def placed(codes: Tensor, form: Format) -> list[tuple[Plane, int]]:
    """The planes of a block and the byte that each begins at, the one with the codes' low bits first."""
    found, at = [], 0
    for plane in planes(form.nibbles):
        found.append((plane, at))
        at += codes.shape[-1] * plane.bits // form.bits
    return sorted(found, key=lambda each: -each[0].bits)


class High(NamedTuple):
    """`bits` of each code, in runs of `run` bytes, `at` bytes behind the lower halves of a block; those of the high
    halves of bytes are `step` bits from those of the low halves."""

    bits: int
    run: int
    at: int
    step: int


def halves(codes: Tensor, form: Format) -> tuple[Tensor, Format, High] | None:
    """Codes of 5 or 6 bits as their lower four (4-bit codes in runs), and where the others lie; else None.

    None, too, unless a byte of higher bits has those of both halves of a byte, as Q6_K and Q5_K have.
    """
    (low, at), *rest = placed(codes, form)
    if low.bits != 4 or len(rest) != 1:
        return None
    high, other = rest[0]
    if low.run % high.run or 8 // high.bits * high.run % (2 * low.run):
        return None
    size = codes.shape[-1] * 4 // form.bits
    nibbles = codes.narrow(-1, at, size).unflatten(-1, (-1, low.run))
    step = low.run // high.run * high.bits
    return nibbles, form._replace(bits=4, nibbles="half"), High(high.bits, high.run, other - at, step)


def constants(codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format, lead: int = 0) -> dict[str, Any]:
    """The kernel's constants and Triton's options."""
    _, k = weight_shape(codes, form)
    where, size = bytes_of(codes), codes.shape[-1]
    assert where is not None
    scale_n, scale_k = strides(scale)
    zero_n, zero_k = (0, 0) if zero is None else strides(zero)
    width = width_of(codes, form)
    bits: dict[str, int] = {}
    for name, (plane, at) in zip(("LOW", "HIGH"), [*placed(codes, form), (Plane(0, 1), 0)], strict=False):
        aligned = math.gcd(where.row, where.between, size, lead, at, plane.run, width)
        bits |= {f"{name}_BITS": plane.bits, f"{name}_RUN": plane.run, f"{name}_AT": at, f"{name}_ALIGNED": aligned}
    return {
        "BLOCK": 8 * size // form.bits, "SIZE": size, "K": k, **bits, "KIND": form.kind, "OFFSET": form.offset,
        "ROWS": form.rows, "GROUP": min(form.group, k), "ARITHMETIC": form.arithmetic,
        "COMPUTE": TYPES[COMPUTE[form.compute]], "EXACT": exact(form), "SCALE_N": scale_n, "SCALE_K": scale_k,
        "ZERO": zero is not None, "ZERO_N": zero_n, "ZERO_K": zero_k, "SPAN": where.span, "BETWEEN": where.between,
        "ROW": where.row, "LEAD": lead, "CHUNKS": CHUNKS, "WIDTH": width, "num_warps": WARPS,
        "enable_fp_fusion": False,
    }  # fmt: skip


def decode_planes(codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format, dtype: torch.dtype) -> Tensor:
    """`packed_weight.decode` in one kernel, for parts of which `no_planes` says nothing."""
    n, k = weight_shape(codes, form)
    out = codes.new_empty((n, k), dtype=dtype)
    read, lead = from_aligned(codes)
    known = constants(codes, scale, zero, form, lead)
    count = n * k // known["WIDTH"]
    with on_device_of(codes):
        launch(_kernel, triton.cdiv(count, CHUNKS), [read, scale, scale if zero is None else zero, out, count], known)
    return out
