"""Products of two to eight rows with streamed weights, on tensor cores: the weights' rows are the tile's long side.

    y[m] = norm(x[m]) * (w + offset) + c            # normalise: one small launch, rounded to x's dtype
    out[m, n] = sum_k y[m, k] * weight[n, k]        # add_product: each warp takes its own part of k

Splitting k over the warps of a program keeps many bytes on their way for a tile of 16 rows of a weight, which is what
it takes to give every multiprocessor some; the parts are added up in the program, always in one order.
"""

from __future__ import annotations

from ._ops import tl, triton


@triton.jit
def normalise(x, eps, offset, s0, c0, s1, c1, s2, c2, out, M, K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr,
              SCALED: tl.constexpr, SHIFTED: tl.constexpr):  # fmt: skip
    """Program j * M + m writes the row m of x, through the norm j, to out [J, M, K]."""
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)
    program = tl.program_id(0)
    which, k = program // M, tl.arange(0, KP)
    scale = k.to(tl.float32)
    shift = scale
    if SCALED:
        scale = _vector(s0, s1, s2, which, k, K)
    if SHIFTED:
        shift = _vector(c0, c1, c2, which, k, K)
    y = tl.load(x + (program % M) * K + k, k < K, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(k < K, y - tl.sum(y, 0) / K, 0.0)
    if NORM != "none":
        y = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    if SCALED:
        y = y * (scale + offset)
    if SHIFTED:
        y = y + shift
    tl.store(out + program * K + k, y.to(out.dtype.element_ty), k < K)


@triton.jit
def _vector(v0, v1, v2, which, k, K: tl.constexpr):
    found = tl.load(v0 + k, k < tl.where(which == 0, K, 0), other=0.0).to(tl.float32)
    found += tl.load(v1 + k, k < tl.where(which == 1, K, 0), other=0.0).to(tl.float32)
    return found + tl.load(v2 + k, k < tl.where(which == 2, K, 0), other=0.0).to(tl.float32)


@triton.jit
def add_product(acc, x, weight, n, N, K: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BLOCK_K: tl.constexpr,
                PARTS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Adds weight[n] @ x^T to acc [PARTS, BLOCK_N, MP]; part p takes the columns p * SPAN, ..., (p + 1) * SPAN - 1."""
    part, col, row = tl.arange(0, PARTS)[:, None], tl.arange(0, BLOCK_K)[None, :], tl.arange(0, MP)
    from_row = weight + n.to(tl.int64)[None, :, None] * K
    from_x = x + row[None, None, :] * K
    for start in tl.range(0, SPAN, BLOCK_K, num_stages=STAGES):
        k = part * SPAN + start + col
        inside = (start + col < SPAN) & (k < K)
        tile = tl.load(from_row + k[:, None, :], inside[:, None, :] & (n < N)[None, :, None], other=0.0,
                       eviction_policy="evict_first")  # fmt: skip
        y = tl.load(from_x + k[:, :, None], inside[:, :, None] & (row < M)[None, None, :], other=0.0)
        if WIDE:
            acc += tl.dot(tile.to(tl.float32), y.to(tl.float32), input_precision="ieee")
        else:
            acc = tl.dot(tile, y, acc)
    return acc
