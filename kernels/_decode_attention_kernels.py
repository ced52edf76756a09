"""The kernels of decode_attention: one part of the keys of a head, and the sum of a query's parts."""

from __future__ import annotations

from ._gemv_common import wait_for_inputs
from ._ops import tl, triton


@triton.jit
def _rotated(x, x_lane, cos, cos_d, sin, sin_d, keep, R: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr,
             C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr):  # fmt: skip
    """The lanes `x_lane` of the heads at the pointers x (cos and sin: of their tables), rotated, in fp32."""
    own = tl.load(x + x_lane, keep, other=0.0).to(tl.float32)
    if R == 0:
        return own
    if INTERLEAVED:
        is_first, pair, partner = x_lane % 2 == 0, x_lane // 2, x_lane ^ 1
    else:
        is_first, pair = x_lane < R // 2, x_lane % (R // 2)
        partner = tl.where(is_first, x_lane + R // 2, x_lane - R // 2)
    turns = keep & (x_lane < R)
    other = tl.load(x + partner, turns, other=0.0).to(tl.float32)
    c = tl.load(cos + (C0 * pair + tl.where(is_first, C1, C2)) * cos_d, turns, other=1.0).to(tl.float32)
    s = tl.load(sin + (S0 * pair + tl.where(is_first, S1, S2)) * sin_d, turns, other=0.0).to(tl.float32)
    return own * c + tl.where(is_first, -other, other) * s


@triton.jit
def _attend(query, key, value, attends, log2_scale, acc, top, total, WIDE: tl.constexpr):
    """Adds keys [N, DP] to the softmax of queries [ROWS, DP]; key and value are zero where there are none."""
    if query.shape[0] == 1:
        s = tl.sum(key.to(tl.float32) * query.to(tl.float32), 1)[None, :]
    elif WIDE:
        s = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
    else:
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
    s = tl.where(attends, s * log2_scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    if query.shape[0] == 1:
        found = tl.sum(tl.trans(p) * value.to(tl.float32), 0)[None, :]
    elif WIDE:
        found = tl.dot(p, value.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return acc * decay[:, None] + found, new_top, total


@triton.jit
def _old_keys(start, end, query, key_cache, kc_s, value_cache, vc_s, mask_row, m_n, exists, position, position_s, first,
              log2_scale, acc, top, total, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COUNTED: tl.constexpr,
              BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """The tile of keys from `start`, without those past `end` and the new tokens'."""
    n, lane = start + tl.arange(0, BLOCK_N), tl.arange(0, DP)
    old = n < end
    for j in tl.static_range(Q):
        if COUNTED:  # noqa: SIM108  # the other branch must not be compiled
            old = old & (n != first + j)
        else:
            old = old & (n != tl.load(position + j * position_s))
    there = old[:, None] & (lane < D)[None, :]
    offset = n.to(tl.int64)[:, None]
    key = tl.load(key_cache + offset * kc_s + lane[None, :], there, other=0.0)
    value = tl.load(value_cache + offset * vc_s + lane[None, :], there, other=0.0)
    attends = tl.load(mask_row + n[None, :] * m_n, exists[:, None] & old[None, :], other=0) != 0
    return _attend(query, key, value, attends, log2_scale, acc, top, total, WIDE)


@triton.jit
def part_kernel(q, q_b, q_s, q_h, k, k_b, k_s, k_h, v, v_b, v_s, v_h, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s,
                sin_d, key_cache, kc_b, kc_h, kc_s, value_cache, vc_b, vc_h, vc_s, position, position_s, mask, m_b,
                m_h, m_s, m_n, size, partial, top_total, out, log2_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                Q: tl.constexpr, ROWS: tl.constexpr, NEW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                COUNTED: tl.constexpr, PAIRS: tl.constexpr, SPLITS: tl.constexpr, SCAN: tl.constexpr,
                SCANS: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
                C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, BLOCK_N: tl.constexpr,
                STAGES: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One part of the keys of one head of keys, for all Q * GROUP queries that read it (padded to ROWS).

    With SPLITS == 1 the result is written as it is and the last program to read the count adds the new tokens to it:
    each adds 2^32 when it reads, which the last takes away again, so that none can see the new count. Integers add up
    to the same in any order.
    """
    log2_scale = tl.cast(log2_scale, tl.float32)
    dtype = key_cache.dtype.element_ty
    program = tl.program_id(0)
    pair, split = program // SPLITS, program % SPLITS
    b, hk = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row, lane, fresh = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, NEW)
    i, g = row // GROUP, row % GROUP
    exists, real, is_new = row < Q * GROUP, (lane < D)[None, :], fresh < Q
    mask_row = mask + b * m_b + (hk * GROUP + g)[:, None] * m_h + i[:, None] * m_s
    key_cache += b * kc_b + hk * kc_h
    value_cache += b * vc_b + hk * vc_h
    cos += b * cos_b
    sin += b * sin_b
    wait_for_inputs(EARLY)
    first = tl.cast(0, tl.int64)
    if COUNTED:
        if SPLITS == 1:
            read = tl.atomic_add(position, 4294967296, sem="relaxed")
            first = read & 4294967295
            if (read >> 32) == PAIRS - 1:
                tl.atomic_add(position, Q - PAIRS * 4294967296, sem="relaxed")
        else:
            first = tl.load(position)
        at = first + fresh
    else:
        at = tl.load(position + fresh * position_s, is_new, other=-1).to(tl.int64)
    # where the unfused graph rounds
    query = _rotated(q + b * q_b + (hk * GROUP + g)[:, None] * q_h + i[:, None] * q_s, lane[None, :],
                     cos + i[:, None] * cos_s, cos_d, sin + i[:, None] * sin_s, sin_d, exists[:, None] & real, R,
                     INTERLEAVED, C0, C1, C2, S0, S1, S2).to(dtype)  # fmt: skip
    own = is_new & (fresh < tl.where(split == 0, Q, 0))
    new_key = _rotated(k + b * k_b + hk * k_h + fresh[:, None] * k_s, lane[None, :], cos + fresh[:, None] * cos_s,
                       cos_d, sin + fresh[:, None] * sin_s, sin_d, own[:, None] & real, R, INTERLEAVED, C0, C1, C2, S0,
                       S1, S2).to(dtype)  # fmt: skip
    new_value = tl.load(v + b * v_b + hk * v_h + fresh[:, None] * v_s + lane[None, :], own[:, None] & real, other=0.0)
    low, high = size, 0
    for scan in range(SCANS):
        n = scan * SCAN + tl.arange(0, SCAN)
        seen = tl.load(mask_row + n[None, :] * m_n, exists[:, None] & (n < size)[None, :], other=0) != 0
        seen = tl.max(seen.to(tl.int32), 0) > 0
        low = tl.minimum(low, tl.min(tl.where(seen, n, size), 0))
        high = tl.maximum(high, tl.max(tl.where(seen, n + 1, 0), 0))
    own = own & (at >= 0) & (at < size)
    seen_new = tl.load(mask_row + at[None, :] * m_n, exists[:, None] & own[None, :], other=0)
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    part = tl.cdiv(tl.maximum(high - low, 0), SPLITS * BLOCK_N) * BLOCK_N
    start = low + split * part
    end = tl.minimum(start + part, high)
    if STAGES == 0:  # for the interpreter: Triton 3.6's cannot take a range's bounds from NumPy 2.5
        while start < end:
            acc, top, total = _old_keys(start, end, query, key_cache, kc_s, value_cache, vc_s, mask_row, m_n, exists,
                                        position, position_s, first, log2_scale, acc, top, total, Q, D, DP, COUNTED,
                                        BLOCK_N, WIDE)  # fmt: skip
            start += BLOCK_N
    else:
        for tile in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            acc, top, total = _old_keys(tile, end, query, key_cache, kc_s, value_cache, vc_s, mask_row, m_n, exists,
                                        position, position_s, first, log2_scale, acc, top, total, Q, D, DP, COUNTED,
                                        BLOCK_N, WIDE)  # fmt: skip
    there = own[:, None] & real
    tl.store(key_cache + at[:, None] * kc_s + lane[None, :], new_key, there)
    tl.store(value_cache + at[:, None] * vc_s + lane[None, :], new_value, there)
    acc, top, total = _attend(query, new_key, new_value, seen_new != 0, log2_scale, acc, top, total, WIDE)
    if SPLITS == 1:
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + ((b * Q + i) * (KV_HEADS * GROUP) + hk * GROUP + g)[:, None] * D + lane[None, :]
        tl.store(target, result.to(dtype), exists[:, None] & real)
    else:
        at_row = (pair * SPLITS + split).to(tl.int64) * (Q * GROUP) + row
        tl.store(top_total + 2 * at_row, top, exists)
        tl.store(top_total + 2 * at_row + 1, total, exists)
        written = exists[:, None] & real & (total > 0)[:, None]
        tl.store(partial + at_row[:, None] * D + lane[None, :], acc, written)


@triton.jit
def merge_kernel(partial, top_total, out, length, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q: tl.constexpr,
                 D: tl.constexpr, DP: tl.constexpr, COUNTED: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """Adds up the parts of one query, in the order of the keys' parts, and counts the new tokens."""
    program = tl.program_id(0)
    pair, row = program // (Q * GROUP), program % (Q * GROUP)
    split, lane = tl.arange(0, SP), tl.arange(0, DP)
    wait_for_inputs(EARLY)
    at = (pair * SPLITS + split).to(tl.int64) * (Q * GROUP) + row
    top = tl.load(top_total + 2 * at, split < SPLITS, other=-float("inf"))
    total = tl.load(top_total + 2 * at + 1, split < SPLITS, other=0.0)
    some = total > 0
    highest = tl.max(top, 0)
    weight = tl.where(some, tl.exp2(top - highest), 0.0)
    part = tl.load(partial + at[:, None] * D + lane[None, :], some[:, None] & (lane < D)[None, :], other=0.0)
    whole = tl.sum(weight * total, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    b, hk, i, g = pair // KV_HEADS, pair % KV_HEADS, row // GROUP, row % GROUP
    target = out + ((b * Q + i).to(tl.int64) * (KV_HEADS * GROUP) + hk * GROUP + g) * D
    tl.store(target + lane, result.to(out.dtype.element_ty), lane < D)
    if COUNTED and program == 0:
        tl.store(length, tl.load(length) + Q)
