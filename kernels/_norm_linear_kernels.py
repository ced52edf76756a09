"""The kernels of norm_linear_gemv: of one row with fused multiply-adds, of several on tensor cores."""

from __future__ import annotations

from ._gemv_common import activate, read_ahead, wait_for_inputs
from ._gemv_rows import add_product
from ._ops import tl, triton


@triton.jit
def _normalised(x, k, scale, shift, eps, offset, K: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
                SHIFTED: tl.constexpr):  # fmt: skip
    """One row in fp32, normalised; zeros past its end.

    The weights, asked for before, are on their way from memory for longer than scale and shift from the cache.
    """
    y = tl.load(x + k, k < K, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(k < K, y - tl.sum(y, 0) / K, 0.0)
    if NORM != "none":
        y = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    if SCALED:
        y = y * (tl.load(scale + k, k < K, other=0.0).to(tl.float32) + offset)
    if SHIFTED:
        y = y + tl.load(shift + k, k < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _tile(weight, n, k, N, K: tl.constexpr):
    return tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], other=0.0,
                   eviction_policy="evict_first")  # fmt: skip


@triton.jit
def _bias(bias, n, N, BIASED: tl.constexpr):
    found = tl.zeros(n.shape, tl.float32)
    if BIASED:
        found = tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    return found


@triton.jit
def _block(n, tile, gate_tile, added, gate_added, y0, x, scale, shift, out, N, k, eps, offset, M: tl.constexpr,
           K: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, GATED: tl.constexpr,
           ACTIVATION: tl.constexpr):  # fmt: skip
    """The rows n of a weight times all rows of x; y0 is the first row of x, normalised."""
    for m in tl.static_range(M):
        y = y0
        if m > 0:
            y = _normalised(x + m * K, k, scale, shift, eps, offset, K, NORM, SCALED, SHIFTED)
        found = activate(tl.sum(tile.to(tl.float32) * y[None, :], 1) + added, ACTIVATION)
        if GATED:
            found = found * (tl.sum(gate_tile.to(tl.float32) * y[None, :], 1) + gate_added)
        tl.store(out + m * N + n, found.to(out.dtype.element_ty), n < N)


@triton.jit
def _share(first, programs, x, weight, bias, other, other_bias, scale, shift, out, N, eps, offset, M: tl.constexpr,
           K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
           BIASED: tl.constexpr, OTHER_BIASED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
           BLOCK_N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr,
           EARLY: tl.constexpr):  # fmt: skip
    """A program's share of one weight: the blocks first, first + programs, ...

    The first weights are asked for before the norm, which takes less than their way from memory.
    """
    k, col = tl.arange(0, KP), tl.arange(0, BLOCK_N)
    n = first * BLOCK_N + col
    if STAGES == 1:
        tile = _tile(weight, n, k, N, K)
        gate_tile = tile
        if GATED:
            gate_tile = _tile(other, n, k, N, K)
        added, gate_added = _bias(bias, n, N, BIASED), _bias(other_bias, n, N, OTHER_BIASED)
    if EARLY and STAGES > 1:
        read_ahead(weight + n.to(tl.int64) * K, weight + N.to(tl.int64) * K, AHEAD, LINES)
        if GATED:
            read_ahead(other + n.to(tl.int64) * K, other + N.to(tl.int64) * K, AHEAD, LINES)
    if EARLY:
        wait_for_inputs(EARLY)
    elif STAGES == 1:
        tl.debug_barrier()  # or else the compiler asks for the weights behind the norm
    y0 = _normalised(x, k, scale, shift, eps, offset, K, NORM, SCALED, SHIFTED)
    if STAGES == 1:
        _block(n, tile, gate_tile, added, gate_added, y0, x, scale, shift, out, N, k, eps, offset, M, K, NORM,
               SCALED, SHIFTED, GATED, ACTIVATION)  # fmt: skip
    elif STAGES == 0:  # as the last, for the interpreter: Triton 3.6's cannot take a range's bounds from NumPy 2.5
        block = first
        while block * BLOCK_N < N:
            n = block * BLOCK_N + col
            tile = _tile(weight, n, k, N, K)
            gate_tile = tile
            if GATED:
                gate_tile = _tile(other, n, k, N, K)
            added, gate_added = _bias(bias, n, N, BIASED), _bias(other_bias, n, N, OTHER_BIASED)
            _block(n, tile, gate_tile, added, gate_added, y0, x, scale, shift, out, N, k, eps, offset, M, K, NORM,
                   SCALED, SHIFTED, GATED, ACTIVATION)  # fmt: skip
            block += programs
    else:
        for block in tl.range(first, tl.cdiv(N, BLOCK_N), programs, num_stages=STAGES):
            n = block * BLOCK_N + col
            added, gate_added = _bias(bias, n, N, BIASED), _bias(other_bias, n, N, OTHER_BIASED)
            tile = _tile(weight, n, k, N, K)
            gate_tile = tile
            if GATED:
                gate_tile = _tile(other, n, k, N, K)
            _block(n, tile, gate_tile, added, gate_added, y0, x, scale, shift, out, N, k, eps, offset, M, K, NORM,
                   SCALED, SHIFTED, GATED, ACTIVATION)  # fmt: skip


@triton.jit
def row_kernel(x, eps, offset, w0, b0, s0, c0, out0, n0, p0, w1, b1, s1, c1, out1, n1, p1, w2, b2, s2, c2, out2, n2,
               p2, WEIGHTS: tl.constexpr, BIASED0: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr,
               ACTIVATION0: tl.constexpr, ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr, M: tl.constexpr,
               K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
               GATED: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
               LINES: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """The first p0 programs stream w0, the next p1 w1, the last p2 w2."""
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    program = tl.program_id(0)
    if program < p0:
        _share(program, p0, x, w0, b0, w1, b1, s0, c0, out0, n0, eps, offset, M, K, KP, NORM, SCALED, SHIFTED, BIASED0,
               BIASED1, GATED, ACTIVATION0, BLOCK_N, STAGES, AHEAD, LINES, EARLY)  # fmt: skip
    if WEIGHTS > 1:  # noqa: SIM102  # one decided when compiling, one when running
        if (program >= p0) & (program < p0 + p1):
            _share(program - p0, p1, x, w1, b1, w1, b1, s1, c1, out1, n1, eps, offset, M, K, KP, NORM, SCALED, SHIFTED,
                   BIASED1, False, False, ACTIVATION1, BLOCK_N, STAGES, AHEAD, LINES, EARLY)  # fmt: skip
    if WEIGHTS > 2:  # noqa: SIM102
        if program >= p0 + p1:
            _share(program - p0 - p1, p2, x, w2, b2, w2, b2, s2, c2, out2, n2, eps, offset, M, K, KP, NORM, SCALED,
                   SHIFTED, BIASED2, False, False, ACTIVATION2, BLOCK_N, STAGES, AHEAD, LINES, EARLY)  # fmt: skip


@triton.jit
def _tile_of_rows(block, x, weight, bias, other, other_bias, out, N, M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr,
                  BIASED: tl.constexpr, OTHER_BIASED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
                  STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    n, row = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, MP)
    zero = tl.zeros([PARTS, BLOCK_N, MP], tl.float32)
    parts = add_product(zero, x, weight, n, N, K, M, MP, BLOCK_K, PARTS, SPAN, STAGES, WIDE)
    found = activate(tl.sum(parts, 0) + _bias(bias, n, N, BIASED)[:, None], ACTIVATION)
    if GATED:
        parts = add_product(zero, x, other, n, N, K, M, MP, BLOCK_K, PARTS, SPAN, STAGES, WIDE)
        found = found * (tl.sum(parts, 0) + _bias(other_bias, n, N, OTHER_BIASED)[:, None])
    there = (n < N)[:, None] & (row < M)[None, :]
    tl.store(out + row[None, :] * N + n[:, None], found.to(out.dtype.element_ty), there)


@triton.jit
def rows_kernel(x0, w0, b0, out0, n0, p0, x1, w1, b1, out1, n1, p1, x2, w2, b2, out2, n2, WEIGHTS: tl.constexpr,
                BIASED0: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr, ACTIVATION0: tl.constexpr,
                ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
                SPAN: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of BLOCK_N rows of a weight for each program: p0 tiles of w0, p1 of w1, the rest of w2."""
    program = tl.program_id(0)
    if program < p0:
        _tile_of_rows(program, x0, w0, b0, w1, b1, out0, n0, M, MP, K, BIASED0, BIASED1, GATED, ACTIVATION0, BLOCK_N,
                      BLOCK_K, PARTS, SPAN, STAGES, WIDE)  # fmt: skip
    if WEIGHTS > 1:  # noqa: SIM102  # one decided when compiling, one when running
        if (program >= p0) & (program < p0 + p1):
            _tile_of_rows(program - p0, x1, w1, b1, w1, b1, out1, n1, M, MP, K, BIASED1, False, False, ACTIVATION1,
                          BLOCK_N, BLOCK_K, PARTS, SPAN, STAGES, WIDE)  # fmt: skip
    if WEIGHTS > 2:  # noqa: SIM102
        if program >= p0 + p1:
            _tile_of_rows(program - p0 - p1, x2, w2, b2, w2, b2, out2, n2, M, MP, K, BIASED2, False, False, ACTIVATION2,
                          BLOCK_N, BLOCK_K, PARTS, SPAN, STAGES, WIDE)  # fmt: skip
