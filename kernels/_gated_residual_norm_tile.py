"""What gated_residual_norm's two kernels share: how a row is cut into parts, loaded, and normalised.

A program holds a whole row. C = 2560 lanes take registers and instructions of 4096 as one power of two, but of 2560 as
two: MAIN + REST = 2048 + 512. REST is 0 where a single part is no larger. Statistics are scalars: as tensors they would
carry the layout of one part, and Triton would move the other part through shared memory to meet it.
"""

from __future__ import annotations

from typing import NamedTuple

from ._ops import tl, triton


class Config(NamedTuple):
    """Warps of a row, and whether it is cut in two; benchmarks/bench_gated_residual_norm.py --sweep tries others."""

    num_warps: int
    split: bool = True


def parts(width: int, split: bool) -> dict[str, int | bool]:
    """The kernels' arguments for how `width` lanes are cut into two powers of two, and which of them is not full."""
    whole = 1 << (width - 1).bit_length()
    main = 1 << (width.bit_length() - 1)
    rest = 0 if main == width else 1 << (width - main - 1).bit_length()
    if not split or main + rest >= whole:
        return {"C": width, "MAIN": whole, "REST": 0, "MASK_MAIN": whole != width, "MASK_REST": False}
    return {"C": width, "MAIN": main, "REST": rest, "MASK_MAIN": False, "MASK_REST": main + rest != width}


@triton.jit
def load(ptr, keep, MASK: tl.constexpr):
    """fp32 values, 0 where not to be kept."""
    if MASK:  # noqa: SIM108  # only one of the two is compiled
        values = tl.load(ptr, mask=keep, other=0.0)
    else:
        values = tl.load(ptr)
    return values.to(tl.float32)


@triton.jit
def store(ptr, values, keep, MASK: tl.constexpr):
    """Rounds once, and stores."""
    if MASK:
        tl.store(ptr, values.to(ptr.dtype.element_ty), mask=keep)
    else:
        tl.store(ptr, values.to(ptr.dtype.element_ty))


@triton.jit
def load_factor(ptr, p_b, p_s, b, s, col, keep, LANES: tl.constexpr, MASK: tl.constexpr):
    """A gate, scale or shift of row (b, s): its lanes, or the one number where there is only one."""
    row = ptr + (b * p_b + s * p_s)
    if LANES:
        return load(row + col, keep, MASK)
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        return tl.load(row).to(tl.float32)


@triton.jit
def row_mean(a, b, C: tl.constexpr, REST: tl.constexpr):
    """Sum over the lanes of both parts, over C."""
    total = tl.sum(a, axis=0)
    if REST:
        total += tl.sum(b, axis=0)
    return total * (1.0 / C)


@triton.jit
def normalised(a, b, keep_a, keep_b, C: tl.constexpr, REST: tl.constexpr, MASK_MAIN: tl.constexpr,
               MASK_REST: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """(r - mean) * rstd of both parts (without the mean for rms) and rstd. b is unused when REST is 0."""
    if LAYER:
        mean = row_mean(a, b, C, REST)
        a -= mean
        if MASK_MAIN:  # lanes of padding stay zero, for the sum of squares
            a = tl.where(keep_a, a, 0.0)
        if REST:
            b -= mean
            if MASK_REST:
                b = tl.where(keep_b, b, 0.0)
    square = row_mean(a * a, b * b, C, REST)
    rstd = tl.rsqrt(square + EPS)
    return a * rstd, b * rstd, rstd
