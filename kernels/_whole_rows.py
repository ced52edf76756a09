"""One row of x times whole rows of streamed weights: a program asks for all its rows at once, then waits once.

    out[n] = residual[n] + x1 @ w1[n] + b1[n] [+ x2 @ w2[n] + b2[n]]

Neighbouring programs read neighbouring rows, each from end to end, so memory is read in long runs. Nothing is copied
to shared memory, and a program meets no barrier before its last sum.
"""

from __future__ import annotations

from ._gemv_common import wait_for_inputs
from ._ops import tl, triton

MAX_PIECES = 16  # of C columns in a row: 16 bytes of each for a thread


@triton.jit
def _piece(row, C: tl.constexpr, START: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    """The columns START, ..., START + T * C - 1 of rows [R], as [R, T, C]."""
    k = START + tl.arange(0, T)[:, None] * C + tl.arange(0, C)[None, :]
    at = row[:, None, None] + k[None, :, :]
    if START + T * C > K:
        tile = tl.load(at, (k < K)[None, :, :], other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, eviction_policy="evict_first")
    return tile


@triton.jit
def _asked(row, K: tl.constexpr, C: tl.constexpr):
    """All of rows [R] in pieces of 8, 4, 2 and 1 times C columns and of the rest; those that a row lacks are alike."""
    n: tl.constexpr = K // C
    a = _piece(row, C, 0, 8, K) if n & 8 else row
    b = _piece(row, C, (n & 8) * C, 4, K) if n & 4 else row
    c = _piece(row, C, (n & 12) * C, 2, K) if n & 2 else row
    d = _piece(row, C, (n & 14) * C, 1, K) if n & 1 else row
    e = _piece(row, C, n * C, 1, K) if K % C else row
    return a, b, c, d, e


@triton.jit
def _times(acc, tile, x, C: tl.constexpr, START: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    k = START + tl.arange(0, T)[:, None] * C + tl.arange(0, C)[None, :]
    y = tl.load(x + k, k < K, other=0.0).to(tl.float32)
    return acc + tl.sum(tile.to(tl.float32) * y[None, :, :], 1)


@triton.jit
def _product(acc, asked, x, K: tl.constexpr, C: tl.constexpr):
    n: tl.constexpr = K // C
    acc = _times(acc, asked[0], x, C, 0, 8, K) if n & 8 else acc
    acc = _times(acc, asked[1], x, C, (n & 8) * C, 4, K) if n & 4 else acc
    acc = _times(acc, asked[2], x, C, (n & 12) * C, 2, K) if n & 2 else acc
    acc = _times(acc, asked[3], x, C, (n & 14) * C, 1, K) if n & 1 else acc
    return _times(acc, asked[4], x, C, n * C, 1, K) if K % C else acc


@triton.jit
def whole_rows_kernel(residual, x1, w1, b1, x2, w2, b2, out, N, K1: tl.constexpr, K2: tl.constexpr,
                      BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr,
                      EARLY: tl.constexpr):  # fmt: skip
    """BLOCK_N elements of the result."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)
    there = n < N
    if K2 > 0:
        second = _asked(w2 + row * K2, K2, C)
    first = _asked(w1 + row * K1, K1, C)
    added = tl.zeros([BLOCK_N], tl.float32)
    if BIASED1:
        added += tl.load(b1 + n, there, other=0.0).to(tl.float32)
    if BIASED2:
        added += tl.load(b2 + n, there, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_inputs(EARLY)
    else:
        tl.debug_barrier()  # or else the compiler asks for weights between its sums
    added += tl.load(residual + n, there, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_N, C], tl.float32)
    if K2 > 0:
        acc = _product(acc, second, x2, K2, C)
    acc = _product(acc, first, x1, K1, C)
    tl.store(out + n, (tl.sum(acc, 1) + added).to(out.dtype.element_ty), there)
