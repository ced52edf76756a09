"""The kernels of decode_attention: one part of the keys of a head, and the sum of a query's parts."""

from __future__ import annotations

from ._gemv_common import wait_for_inputs
from ._ops import tl, triton


@triton.jit
def _rotated(x, x_lane, cos, cos_d, sin, sin_d, keep, weight, eps, w_offset, R: tl.constexpr, INTERLEAVED: tl.constexpr,
             C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
             S2: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """The lanes `x_lane` of the heads at the pointers x (cos and sin: of their tables), rotated, in fp32.

    NORM: each head goes through an RMSNorm first; LANES is the dimension that its lanes lie along.
    """
    own = tl.load(x + x_lane, keep, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(own * own, LANES, keep_dims=True) / D + eps)
        own = own * scale * (tl.load(weight + x_lane, x_lane < D, other=0.0).to(tl.float32) + w_offset)
    if R == 0:
        return own
    if INTERLEAVED:
        is_first, pair, partner = x_lane % 2 == 0, x_lane // 2, x_lane ^ 1
    else:
        is_first, pair = x_lane < R // 2, x_lane % (R // 2)
        partner = tl.where(is_first, x_lane + R // 2, x_lane - R // 2)
    turns = keep & (x_lane < R)
    other = tl.load(x + partner, turns, other=0.0).to(tl.float32)
    if NORM:
        other = other * scale * (tl.load(weight + partner, x_lane < R, other=0.0).to(tl.float32) + w_offset)
    c = tl.load(cos + (C0 * pair + tl.where(is_first, C1, C2)) * cos_d, turns, other=1.0).to(tl.float32)
    s = tl.load(sin + (S0 * pair + tl.where(is_first, S1, S2)) * sin_d, turns, other=0.0).to(tl.float32)
    return own * c + tl.where(is_first, -other, other) * s


@triton.jit
def _kept(mask_row, m_n, n, size, exists):
    """Whether keys n are attended to; exists: for which queries."""
    return tl.load(mask_row + n * m_n, exists & (n < size), other=0) != 0


@triton.jit
def one_query_kernel(q, q_b, q_s, q_h, k, k_b, k_s, k_h, v, v_b, v_s, v_h, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s,
                     sin_d, key_cache, kc_b, kc_h, kc_s, value_cache, vc_b, vc_h, vc_s, position, position_s, mask, m_b,
                     m_h, m_s, m_n, size, partial, top_total, log2_scale, q_weight, k_weight, eps, w_offset,
                     KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                     COUNTED: tl.constexpr, SPLITS: tl.constexpr,
                     TILES: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr,
                     C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
                     DEEP: tl.constexpr, SIDE: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr,
                     NORM: tl.constexpr):  # fmt: skip
    """One part of the keys of one head, for its only query: the tiles split, split + SPLITS, ... of DEEP * SIDE keys.

    Two waits for the memory: for the mask, then for all keys and values of a tile. A thread has DEEP keys to itself and
    a softmax of its own; the SIDE of them are added up once, behind the last tile, so the loop meets no barrier. OWN is
    the dimension of a tile that the compiler leaves to each thread.
    """
    log2_scale = tl.cast(log2_scale, tl.float32)
    dtype = key_cache.dtype.element_ty
    program = tl.program_id(0)
    pair, split = program // SPLITS, program % SPLITS
    b, hk = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    lane = tl.arange(0, DP)
    inner = tl.expand_dims(tl.arange(0, SIDE), OWN) + tl.expand_dims(tl.arange(0, DEEP), 1 - OWN) * SIDE
    real = lane < D
    mask_row = mask + b * m_b + hk * m_h
    key_cache += b * kc_b + hk * kc_h
    value_cache += b * vc_b + hk * vc_h
    cos += b * cos_b
    sin += b * sin_b
    wait_for_inputs(EARLY)
    n = split * (DEEP * SIDE) + inner
    seen = _kept(mask_row, m_n, n, size, True)
    at = tl.load(position).to(tl.int64)
    own = (split == 0) & (at >= 0) & (at < size)
    acc = tl.zeros([SIDE, DP], tl.float32)
    top, total = tl.full([SIDE], -float("inf"), tl.float32), tl.zeros([SIDE], tl.float32)
    # where the unfused graph rounds
    query = _rotated(q + b * q_b + hk * q_h, lane, cos, cos_d, sin, sin_d, real, q_weight, eps, w_offset, R,
                     INTERLEAVED, C0, C1, C2, S0, S1, S2, D, NORM, 0).to(dtype).to(tl.float32)  # fmt: skip
    for tile in range(TILES):
        n = (split + tile * SPLITS) * (DEEP * SIDE) + inner
        following = seen
        if TILES > 1:
            following = _kept(mask_row, m_n, n + SPLITS * (DEEP * SIDE), size, True)
        old = seen & (n != at)
        there = old[:, :, None] & real[None, None, :]
        row = n.to(tl.int64)[:, :, None]
        key = tl.load(key_cache + row * kc_s + lane[None, None, :], there, other=0.0)
        value = tl.load(value_cache + row * vc_s + lane[None, None, :], there, other=0.0)
        s = tl.sum(key.to(tl.float32) * query[None, None, :], 2)
        s = tl.where(old, s * log2_scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, OWN))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - tl.expand_dims(shift, OWN))
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, OWN)
        acc = acc * decay[:, None] + tl.sum(p[:, :, None] * value.to(tl.float32), OWN)
        top = new_top
        seen = following
    mine = lane < tl.where(own, D, 0)
    new_key = _rotated(k + b * k_b + hk * k_h, lane, cos, cos_d, sin, sin_d, mine, k_weight, eps, w_offset, R,
                       INTERLEAVED, C0, C1, C2, S0, S1, S2, D, NORM, 0).to(dtype)  # fmt: skip
    new_value = tl.load(v + b * v_b + hk * v_h + lane, mine, other=0.0)
    seen_new = own & (tl.load(mask_row + tl.where(own, at, 0) * m_n) != 0)
    tl.store(key_cache + at * kc_s + lane, new_key, mine)
    tl.store(value_cache + at * vc_s + lane, new_value, mine)
    s_new = tl.where(seen_new, tl.sum(new_key.to(tl.float32) * query, 0) * log2_scale, -float("inf"))
    highest = tl.maximum(tl.max(top, 0), s_new)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weight, weight_new = tl.exp2(top - shift), tl.exp2(s_new - shift)
    result = tl.sum(acc * weight[:, None], 0) + weight_new * new_value.to(tl.float32)
    at_part = (pair * SPLITS + split).to(tl.int64)
    tl.store(partial + at_part * D + lane, result, real)
    tl.store(top_total + 2 * at_part, highest)
    tl.store(top_total + 2 * at_part + 1, tl.sum(total * weight, 0) + weight_new)


@triton.jit
def attend(query, key, value, attends, log2_scale, acc, top, total, WIDE: tl.constexpr, bias=None):
    """Adds keys [N, DP] to the softmax of queries [ROWS, DP]; key and value are zero where there are none.

    bias: what is added to the scores, times log2(e).
    """
    if WIDE:
        s = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
    else:
        s = tl.dot(query, tl.trans(key), input_precision="ieee")
    s = s * log2_scale
    if bias is not None:
        s += bias
    s = tl.where(attends, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    if WIDE:
        found = tl.dot(p, value.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return acc * decay[:, None] + found, new_top, total


@triton.jit
def queries_kernel(q, q_b, q_s, q_h, k, k_b, k_s, k_h, v, v_b, v_s, v_h, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s,
                   sin_d, key_cache, kc_b, kc_h, kc_s, value_cache, vc_b, vc_h, vc_s, position, position_s, mask, m_b,
                   m_h, m_s, m_n, size, partial, top_total, log2_scale, q_weight, k_weight, eps, w_offset,
                   KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                   COUNTED: tl.constexpr, SPLITS: tl.constexpr,
                   TILES: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
                   C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, ROWS: tl.constexpr,
                   NEW: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
                   NORM: tl.constexpr):  # fmt: skip
    """The same for all Q * GROUP queries that read a head of keys (padded to ROWS), on tensor cores."""
    log2_scale = tl.cast(log2_scale, tl.float32)
    dtype = key_cache.dtype.element_ty
    program = tl.program_id(0)
    pair, split = program // SPLITS, program % SPLITS
    b, hk = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row, lane, fresh, col = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, NEW), tl.arange(0, BLOCK_N)
    i, g = row // GROUP, row % GROUP
    exists, real, is_new = row < Q * GROUP, (lane < D)[None, :], fresh < Q
    mask_row = mask + b * m_b + (hk * GROUP + g)[:, None] * m_h + i[:, None] * m_s
    key_cache += b * kc_b + hk * kc_h
    value_cache += b * vc_b + hk * vc_h
    cos += b * cos_b
    sin += b * sin_b
    wait_for_inputs(EARLY)
    seen = _kept(mask_row, m_n, (split * BLOCK_N + col)[None, :], size, exists[:, None])
    if COUNTED:  # noqa: SIM108  # the other branch must not be compiled
        at = tl.load(position) + fresh
    else:
        at = tl.load(position + fresh * position_s, is_new, other=-1).to(tl.int64)
    # where the unfused graph rounds
    query = _rotated(q + b * q_b + (hk * GROUP + g)[:, None] * q_h + i[:, None] * q_s, lane[None, :],
                     cos + i[:, None] * cos_s, cos_d, sin + i[:, None] * sin_s, sin_d, exists[:, None] & real, q_weight,
                     eps, w_offset, R, INTERLEAVED, C0, C1, C2, S0, S1, S2, D, NORM, 1).to(dtype)  # fmt: skip
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for tile in range(TILES):
        n = (split + tile * SPLITS) * BLOCK_N + col
        following = seen
        if TILES > 1:
            following = _kept(mask_row, m_n, (n + SPLITS * BLOCK_N)[None, :], size, exists[:, None])
        is_old = tl.sum(((n[:, None] == at[None, :]) & is_new[None, :]).to(tl.int32), 1) == 0
        attends = seen & is_old[None, :]
        there = (tl.max(attends.to(tl.int32), 0) > 0)[:, None] & real
        offset = n.to(tl.int64)[:, None]
        key = tl.load(key_cache + offset * kc_s + lane[None, :], there, other=0.0)
        value = tl.load(value_cache + offset * vc_s + lane[None, :], there, other=0.0)
        acc, top, total = attend(query, key, value, attends, log2_scale, acc, top, total, WIDE)
        seen = following
    own = is_new & (fresh < tl.where(split == 0, Q, 0)) & (at >= 0) & (at < size)
    there = own[:, None] & real
    new_key = _rotated(k + b * k_b + hk * k_h + fresh[:, None] * k_s, lane[None, :], cos + fresh[:, None] * cos_s,
                       cos_d, sin + fresh[:, None] * sin_s, sin_d, there, k_weight, eps, w_offset, R, INTERLEAVED, C0,
                       C1, C2, S0, S1, S2, D, NORM, 1).to(dtype)  # fmt: skip
    new_value = tl.load(v + b * v_b + hk * v_h + fresh[:, None] * v_s + lane[None, :], there, other=0.0)
    seen_new = tl.load(mask_row + at[None, :] * m_n, exists[:, None] & own[None, :], other=0) != 0
    tl.store(key_cache + at[:, None] * kc_s + lane[None, :], new_key, there)
    tl.store(value_cache + at[:, None] * vc_s + lane[None, :], new_value, there)
    acc, top, total = attend(query, new_key, new_value, seen_new, log2_scale, acc, top, total, WIDE)
    at_row = (pair * SPLITS + split).to(tl.int64) * (Q * GROUP) + row
    tl.store(top_total + 2 * at_row, top, exists)
    tl.store(top_total + 2 * at_row + 1, total, exists)
    tl.store(partial + at_row[:, None] * D + lane[None, :], acc, exists[:, None] & real)


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
    there = (split < SPLITS)[:, None] & (lane < D)[None, :]
    part = tl.load(partial + at[:, None] * D + lane[None, :], there, other=0.0)
    weight = tl.where(total > 0, tl.exp2(top - tl.max(top, 0)), 0.0)
    whole = tl.sum(weight * total, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    b, hk, i, g = pair // KV_HEADS, pair % KV_HEADS, row // GROUP, row % GROUP
    target = out + ((b * Q + i).to(tl.int64) * (KV_HEADS * GROUP) + hk * GROUP + g) * D
    tl.store(target + lane, result.to(out.dtype.element_ty), lane < D)
    if COUNTED and program == 0:
        tl.store(length, tl.load(length) + Q)
