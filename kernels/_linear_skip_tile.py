"""The Triton kernel of linear_skip: a tiled product whose epilogue combines it with x."""

from __future__ import annotations

from ._ops import tl, triton


@triton.jit
def _factor(pointer, stride_b, stride_s, stride_n, batch, position, n, keep_m, keep_n, KIND: tl.constexpr):
    """A coefficient of a tile in fp32: one number a row, one a lane, or all of them."""
    rows = batch * stride_b + position * stride_s
    if KIND == "row":
        return tl.load(pointer + rows, keep_m, other=0.0).to(tl.float32)[:, None]
    elif KIND == "lane":  # noqa: RET505  # a jit function's other branches must not be compiled
        return tl.load(pointer + n.to(tl.int64) * stride_n, keep_n, other=0.0).to(tl.float32)[None, :]
    else:
        at = rows[:, None] + n.to(tl.int64)[None, :] * stride_n
        return tl.load(pointer + at, keep_m[:, None] & keep_n[None, :], other=0.0).to(tl.float32)


@triton.jit
def _towards(start, end, weight, LERP: tl.constexpr):
    """start + weight * (end - start); LERP: as torch.lerp has it, infinities included."""
    step = end - start
    if not LERP:
        return start + weight * step
    return tl.where(tl.abs(weight) < 0.5, start + weight * step, end - step * (1.0 - weight))


@triton.jit
def _load_x(x, x_b, x_s, batch, position, n, keep_m, keep_n):
    at = (batch * x_b + position * x_s)[:, None] + n[None, :]
    return tl.load(x + at, keep_m[:, None] & keep_n[None, :], other=0.0)


@triton.jit
def kernel(y, y_m, weight, w_n, w_k, bias, x, x_b, x_s, a, a_b, a_s, a_n, b, b_b, b_s, b_n, out, linear, alpha, beta,
           rows, length, N: tl.constexpr, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, MODE: tl.constexpr,
           ONE_A: tl.constexpr, ONE_B: tl.constexpr, EARLY: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One tile of out [rows, N]. A and B: kinds of a and b; ONE_A, ONE_B: their numbers are 1."""
    # GROUP tiles of rows take turns with the columns, so that tiles in flight share rows and columns in L2.
    index, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = index // (GROUP * tiles_n) * GROUP
    size = min(tiles_m - first, GROUP)
    tile_m, tile_n = first + index % (GROUP * tiles_n) % size, index % (GROUP * tiles_n) // size
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    keep_m, keep_n = m < rows, n < N
    batch, position = (m // length).to(tl.int64), (m % length).to(tl.int64)
    if EARLY:  # its latency is hidden behind the product, at the cost of registers
        skip = _load_x(x, x_b, x_s, batch, position, n, keep_m, keep_n)

    # Rows and columns that there are not read the first ones; nothing stores them.
    y_at = y + tl.where(keep_m, m, 0).to(tl.int64)[:, None] * y_m + k[None, :]
    w_at = weight + tl.where(keep_n, n, 0)[None, :] * w_n + k[:, None] * w_k
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            left, right = tl.load(y_at), tl.load(w_at)
        else:
            left = tl.load(y_at, (k < K - start)[None, :], other=0.0)
            right = tl.load(w_at, (k < K - start)[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        y_at += BLOCK_K
        w_at += BLOCK_K * w_k

    if bias is not None:
        acc += tl.load(bias + n, keep_n, other=0.0).to(tl.float32)[None, :]
    keep = keep_m[:, None] & keep_n[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if linear is not None:
        tl.store(linear + at, acc.to(linear.dtype.element_ty), keep)
    if not EARLY:
        skip = _load_x(x, x_b, x_s, batch, position, n, keep_m, keep_n)
    skip = skip.to(tl.float32)
    if MODE == "sum":
        if a is not None:
            skip *= _factor(a, a_b, a_s, a_n, batch, position, n, keep_m, keep_n, A)
        if not ONE_A:
            skip *= tl.cast(alpha, tl.float32)  # Inductor passes Python floats as float64
        if b is not None:
            acc *= _factor(b, b_b, b_s, b_n, batch, position, n, keep_m, keep_n, B)
        if not ONE_B:
            acc *= tl.cast(beta, tl.float32)
        acc += skip
    else:
        mix = tl.zeros([1, 1], tl.float32) + tl.cast(beta, tl.float32)
        if b is not None:
            mix = mix * _factor(b, b_b, b_s, b_n, batch, position, n, keep_m, keep_n, B)
        if MODE == "lerp" or MODE == "step":
            acc = _towards(skip, acc, mix, MODE == "lerp")
        else:
            acc = _towards(acc, skip, mix, MODE == "lerp_back")
    tl.store(out + at, acc.to(out.dtype.element_ty), keep)
