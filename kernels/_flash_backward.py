"""FlashAttention-2's backward pass for `_flash`: one kernel for keys and values, one for queries, no atomic adds.

    p = exp(scores - lse); delta = sum(out * grad)            per query
    dv = p.T @ grad;  ds = p * (grad @ v.T - delta);  dk = ds.T @ q * scale;  dq = ds @ k * scale

With a soft cap, ds is multiplied by 1 - tanh(..)^2. Sinks change nothing here: they are in lse, and in delta.

The first kernel takes a tile of keys and goes through the queries that see it, of all heads that share the keys; the
second takes a tile of queries and goes through its keys. Both skip and mask tiles as the forward pass does. Sums are
in fp32 and always in the same order; p and ds are rounded to the inputs' dtype for their products.
"""

import math
from typing import Any

from torch import Tensor

from ._flash import (
    PARTS,
    Band,
    Config,
    batch_stride,
    cap_rate,
    dot_parts,
    in_band,
    key_tiles,
    load_parts,
    store_parts,
    tanh_of,
)  # fmt: skip
from ._ops import INTERPRETED, launch, on_device_of, tl, triton


@triton.jit
def _add_query_tile(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, q_s, grad, grad_s, lse, delta, i, key, q_length,
                    log2_scale, rate, lane1, lane2, D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, first_key):  # fmt: skip
    """What the i-th tile of queries adds to the gradients of a tile of keys and values."""
    index = i * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < q_length
    offset = index.to(tl.int64)
    q1, q2 = load_parts(q + (offset * q_s)[:, None], exists[:, None], lane1, lane2, D2)
    s = dot_parts(k1, k2, q1, q2, D2)  # keys x queries
    if CAPPED:
        s = tanh_of(s, rate)
    lse_row = tl.load(lse + index, exists, other=float("inf"))
    p = tl.exp2(tl.fma(s, log2_scale, -lse_row[None, :]))
    masked = first_key < 0
    if HAS_RIGHT:
        masked = masked | (first_key + BLOCK_N - 1 > i * BLOCK_M + RIGHT)
    if HAS_LEFT:
        masked = masked | (first_key < i * BLOCK_M + BLOCK_M - 1 - LEFT)
    if masked:
        seen = in_band(exists[None, :], index[None, :], key[:, None], LEFT, RIGHT, HAS_LEFT, HAS_RIGHT)
        p = tl.where(seen, p, 0.0)
    g1, g2 = load_parts(grad + (offset * grad_s)[:, None], exists[:, None], lane1, lane2, D2)
    rounded = p.to(g1.dtype)
    dv1 = tl.dot(rounded, g1, dv1)
    if D2 > 0:
        dv2 = tl.dot(rounded, g2, dv2)
    dp = dot_parts(v1, v2, g1, g2, D2)
    ds = p * (dp - tl.load(delta + index, exists, other=0.0)[None, :])
    if CAPPED:
        ds = ds * (1.0 - s * s)
    ds = ds.to(q1.dtype)
    dk1 = tl.dot(ds, q1, dk1)
    if D2 > 0:
        dk2 = tl.dot(ds, q2, dk2)
    return dk1, dk2, dv1, dv2


@triton.jit
def _key_kernel(q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, keep, keep_b, ranges, ranges_b, grad, grad_b,
                grad_h, grad_s, lse, delta, dk, dv, batch, q_length, length, log2_scale, scale, H: tl.constexpr,
                GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    log2_scale, scale = tl.cast(log2_scale, tl.float32), tl.cast(scale, tl.float32)
    rate = log2_scale
    if SOFTCAP > 0:
        rate = cap_rate(log2_scale, SOFTCAP)
        log2_scale = tl.cast(SOFTCAP * 1.4426950408889634, tl.float32)
    KV: tl.constexpr = H // GROUP
    program = tl.program_id(0)
    tile = program // (batch * KV)
    b = (program % (batch * KV) // KV).to(tl.int64)
    h = (program % KV).to(tl.int64)
    lane1, lane2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2 if D2 > 0 else D1)[None, :]
    first_key = tile * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    exists = (key < length)[:, None]
    offset = key.to(tl.int64)
    k1, k2 = load_parts(k + b * k_b + h * k_h + (offset * k_s)[:, None], exists, lane1, lane2, D2)
    v1, v2 = load_parts(v + b * v_b + h * v_h + (offset * v_s)[:, None], exists, lane1, lane2, D2)
    dk1, dk2 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)
    dv1, dv2 = tl.zeros([BLOCK_N, D1], tl.float32), tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)

    low, high = 0, q_length
    if HAS_RIGHT:
        low = tl.maximum(low, first_key - RIGHT)
    if HAS_LEFT:
        high = tl.minimum(high, tl.maximum(first_key + BLOCK_N + LEFT, 0))
    if KEEP:
        first_kept = tl.load(ranges + b * ranges_b)
        end_kept = tl.load(ranges + b * ranges_b + 1)
        high = tl.where((first_key < end_kept) & (first_key + BLOCK_N > first_kept), high, 0)
    start, end = low // BLOCK_M, tl.cdiv(high, BLOCK_M)
    steps = tl.maximum(end - start, 0)
    q += b * q_b + h * GROUP * q_h
    grad += b * grad_b + h * GROUP * grad_h
    lse += (b * H + h * GROUP) * q_length
    delta += (b * H + h * GROUP) * q_length
    if INTERPRET:
        step = 0
        while step < steps * GROUP:
            g, i = (step // steps).to(tl.int64), start + step % steps
            dk1, dk2, dv1, dv2 = _add_query_tile(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q + g * q_h, q_s, grad + g * grad_h, grad_s, lse + g * q_length,
                delta + g * q_length, i, key, q_length, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT, HAS_LEFT,
                HAS_RIGHT, SOFTCAP > 0, BLOCK_M, BLOCK_N, first_key,
            )  # fmt: skip
            step += 1
    else:
        for step in tl.range(0, steps * GROUP):
            g, i = (step // steps).to(tl.int64), start + step % steps
            dk1, dk2, dv1, dv2 = _add_query_tile(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q + g * q_h, q_s, grad + g * grad_h, grad_s, lse + g * q_length,
                delta + g * q_length, i, key, q_length, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT, HAS_LEFT,
                HAS_RIGHT, SOFTCAP > 0, BLOCK_M, BLOCK_N, first_key,
            )  # fmt: skip

    dk1, dk2 = dk1 * scale, dk2 * scale
    if KEEP:  # the rows of padding
        kept = (tl.load(keep + b * keep_b + key, key < length, other=0) != 0)[:, None]
        dk1, dk2 = tl.where(kept, dk1, 0.0), tl.where(kept, dk2, 0.0)
        dv1, dv2 = tl.where(kept, dv1, 0.0), tl.where(kept, dv2, 0.0)
    at = (((b * length + offset) * KV + h) * (D1 + D2))[:, None]
    store_parts(dk + at, dk1, dk2, exists, lane1, lane2, D2)
    store_parts(dv + at, dv1, dv2, exists, lane1, lane2, D2)


@triton.jit
def _add_key_tile(dq1, dq2, q1, q2, g1, g2, k, k_s, v, v_s, keep, lse_row, delta_row, j, solid, full, length, index,
                  log2_scale, rate, lane1, lane2, D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                  HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, CAPPED: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """What the j-th tile of keys adds to the gradients of a tile of queries."""
    key = j * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (key < length)[:, None]
    offset = key.to(tl.int64)[:, None]
    k1, k2 = load_parts(k + offset * k_s, exists, lane1, lane2, D2)
    s = dot_parts(q1, q2, k1, k2, D2)
    if CAPPED:
        s = tanh_of(s, rate)
    p = tl.exp2(tl.fma(s, log2_scale, -lse_row[:, None]))
    masked = j >= full
    if HAS_LEFT or KEEP:
        masked = masked | (j < solid)
    if masked:
        seen = (key < length)[None, :]
        if KEEP:
            seen = seen & (tl.load(keep + key, key < length, other=0) != 0)[None, :]
        p = tl.where(in_band(seen, index[:, None], key[None, :], LEFT, RIGHT, HAS_LEFT, HAS_RIGHT), p, 0.0)
    v1, v2 = load_parts(v + offset * v_s, exists, lane1, lane2, D2)
    dp = dot_parts(g1, g2, v1, v2, D2)
    ds = p * (dp - delta_row[:, None])
    if CAPPED:
        ds = ds * (1.0 - s * s)
    ds = ds.to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1)
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2)
    return dq1, dq2


@triton.jit
def _query_kernel(q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, keep, keep_b, ranges, ranges_b, grad, grad_b,
                  grad_h, grad_s, lse, delta, dq, batch, q_length, length, log2_scale, scale, H: tl.constexpr,
                  GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                  HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    log2_scale, scale = tl.cast(log2_scale, tl.float32), tl.cast(scale, tl.float32)
    rate = log2_scale
    if SOFTCAP > 0:
        rate = cap_rate(log2_scale, SOFTCAP)
        log2_scale = tl.cast(SOFTCAP * 1.4426950408889634, tl.float32)
    program = tl.program_id(0)
    tile = tl.cdiv(q_length, BLOCK_M) - 1 - program // (batch * H)
    b = (program % (batch * H) // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    lane1, lane2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2 if D2 > 0 else D1)[None, :]
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = index < q_length
    offset = index.to(tl.int64)[:, None]
    q1, q2 = load_parts(q + b * q_b + h * q_h + offset * q_s, exists[:, None], lane1, lane2, D2)
    g1, g2 = load_parts(grad + b * grad_b + h * grad_h + offset * grad_s, exists[:, None], lane1, lane2, D2)
    lse_row = tl.load(lse + (b * H + h) * q_length + index, exists, other=float("inf"))
    delta_row = tl.load(delta + (b * H + h) * q_length + index, exists, other=0.0)
    k += b * k_b + h // GROUP * k_h
    v += b * v_b + h // GROUP * v_h
    keep += b * keep_b
    dq1, dq2 = tl.zeros([BLOCK_M, D1], tl.float32), tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    start, end, solid, full = key_tiles(tile * BLOCK_M, q_length, length, ranges, b, ranges_b, LEFT, RIGHT, HAS_LEFT,
                                    HAS_RIGHT, KEEP, BLOCK_M, BLOCK_N)  # fmt: skip
    if INTERPRET:
        j = start
        while j < end:
            dq1, dq2 = _add_key_tile(dq1, dq2, q1, q2, g1, g2, k, k_s, v, v_s, keep, lse_row, delta_row, j, solid, full,
                                     length, index, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT, HAS_LEFT,
                                     HAS_RIGHT, KEEP, SOFTCAP > 0, BLOCK_N)  # fmt: skip
            j += 1
    else:
        for j in tl.range(start, end):
            dq1, dq2 = _add_key_tile(dq1, dq2, q1, q2, g1, g2, k, k_s, v, v_s, keep, lse_row, delta_row, j, solid, full,
                                     length, index, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT, HAS_LEFT,
                                     HAS_RIGHT, KEEP, SOFTCAP > 0, BLOCK_N)  # fmt: skip
    at = ((b * q_length + offset) * H + h) * (D1 + D2)
    store_parts(dq + at, dq1 * scale, dq2 * scale, exists[:, None], lane1, lane2, D2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, key_keep: Tensor | None,
             key_range: Tensor | None, band: Band, scale: float, key_config: Config,
             query_config: Config, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches both kernels from an opaque op; returns dq, dk and dv, each [B, S, H, D] in memory.

    Args:
        grad: of the result, [B, H, S_q, D] with a last stride of 1.
        lse: what the forward pass wrote, [B, H, S_q] in fp32.
        delta: sums of out * grad, [B, H, S_q] in fp32.
        key_config: how the kernel for keys and values runs; the other arguments are `_flash.attend`'s.
        query_config: how the kernel for queries runs.
        softcap: the cap of the scores, 0 for none.
    """
    batch, heads, length, dim = q.shape
    kv, keys = k.shape[1:3]
    dq, dk, dv = q.new_empty(batch, length, heads, dim), *(x.new_empty(batch, keys, kv, dim) for x in (k, v))
    keep, ranges = (q, q) if key_keep is None or key_range is None else (key_keep, key_range)
    inputs = [
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], keep, batch_stride(keep), ranges,
        batch_stride(ranges), grad, *grad.stride()[:3], lse, delta,
    ]  # fmt: skip
    sizes = [batch, length, keys, scale * math.log2(math.e), scale]
    constants = {
        "H": int(heads), "GROUP": int(heads) // int(kv), "D1": PARTS[int(dim)][0], "D2": PARTS[int(dim)][1],
        "KEEP": key_keep is not None, "SOFTCAP": float(softcap), "INTERPRET": INTERPRETED, **band.arguments(),
    }  # fmt: skip
    with on_device_of(q):
        grid = triton.cdiv(keys, key_config.block_n) * batch * kv
        launch(_key_kernel, grid, [*inputs, dk, dv, *sizes], {**constants, **_options(key_config)})
        grid = triton.cdiv(length, query_config.block_m) * batch * heads
        launch(_query_kernel, grid, [*inputs, dq, *sizes], {**constants, **_options(query_config)})
    return dq, dk, dv


def _options(config: Config) -> dict[str, Any]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps,
            "num_stages": config.num_stages}  # fmt: skip
