"""The kernel of paged_decode_attention: one part of the keys of a head, found through the block table."""

from __future__ import annotations

from ._decode_attention_kernels import attend
from ._gemv_common import wait_for_inputs
from ._ops import tl, triton


@triton.jit
def paged_kernel(q, q_b, q_s, q_h, key_cache, kc_n, kc_s, kc_h, value_cache, vc_n, vc_s, vc_h, table, t_b, t_s, blocks,
                 mask, m_b, m_h, m_s, m_n, size, partial, top_total, log2_scale, KV_HEADS: tl.constexpr,
                 GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
                 EARLY: tl.constexpr, PAGE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK_N: tl.constexpr, ADDITIVE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The keys split * BLOCK_N + ..., every SPLITS-th tile, for the Q * GROUP queries that read a head of keys."""
    log2_scale = tl.cast(log2_scale, tl.float32)
    program = tl.program_id(0)
    pair, split = program // SPLITS, program % SPLITS
    b, hk = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row, lane, col = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, BLOCK_N)
    i, g = row // GROUP, row % GROUP
    exists, real = (row < Q * GROUP)[:, None], (lane < D)[None, :]
    mask_row = mask + b * m_b + (hk * GROUP + g)[:, None] * m_h + i[:, None] * m_s
    wait_for_inputs(EARLY)
    query = tl.load(q + b * q_b + (hk * GROUP + g)[:, None] * q_h + i[:, None] * q_s + lane[None, :], exists & real,
                    other=0.0)  # fmt: skip
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for tile in range(TILES):
        n = (split + tile * SPLITS) * BLOCK_N + col
        inside = n < size
        block = tl.load(table + b * t_b + (n // PAGE) * t_s, inside, other=0).to(tl.int64)
        block = tl.where(block < 0, block + blocks, block)  # as an index of PyTorch's
        inside = inside & (block >= 0) & (block < blocks)
        bias = None
        if ADDITIVE:
            bias = tl.load(mask_row + n[None, :] * m_n, exists & inside[None, :], other=-float("inf")).to(tl.float32)
            attends = bias > -float("inf")
            # the lowest number is a mask too, and stays a number: a row of nothing else has equal weights
            bias = tl.maximum(bias * 1.4426950408889634, -3.4028234e38)
        else:
            attends = tl.load(mask_row + n[None, :] * m_n, exists & inside[None, :], other=0) != 0
        there = (tl.max(attends.to(tl.int32), 0) > 0)[:, None] & real
        within = (n % PAGE).to(tl.int64)
        key = tl.load(key_cache + hk * kc_h + (block * kc_n + within * kc_s)[:, None] + lane[None, :], there, other=0.0)
        value = tl.load(value_cache + hk * vc_h + (block * vc_n + within * vc_s)[:, None] + lane[None, :], there,
                        other=0.0)  # fmt: skip
        acc, top, total = attend(query, key, value, attends, log2_scale, acc, top, total, WIDE, bias)
    at_row = (pair * SPLITS + split).to(tl.int64) * (Q * GROUP) + row
    tl.store(top_total + 2 * at_row, top, row < Q * GROUP)
    tl.store(top_total + 2 * at_row + 1, total, row < Q * GROUP)
    tl.store(partial + at_row[:, None] * D + lane[None, :], acc, exists & real)
