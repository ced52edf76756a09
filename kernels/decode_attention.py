"""One decoding step of attention on a static key-value cache: RoPE, append, attend to what is there.

    position[i] = length + i, then length += Q          # or positions[i], when they are given
    key_cache[:, :, position[i]] = rope(k[:, i]);  value_cache[:, :, position[i]] = v[:, i]
    out = softmax(rope(q) @ key_cache^T * scale where mask, else -inf) @ value_cache

The mask decides what is attended to, whatever it means; tiles of keys that it drops for all queries are not read, so
a step costs the tokens that are in the cache, not its size. All is decided on the device: the same launch serves
every length, also from a CUDA graph. Flash decoding (Dao et al. 2023): the keys are split over programs, whose results
a second kernel adds up, always in one order.

- q [B, Q, H, D]; k, v [B, Q, H_kv, D], H a multiple of H_kv; any strides with lanes side by side; bf16, fp16, fp32.
- cos, sin [B or 1, Q, lanes], any float dtype, or None when rotary_dim is 0; `cos_lanes` and `sin_lanes` as in
  `partial_rope`: (mult, first, second) tells where the table keeps a pair's values.
- key_cache, value_cache [B, H_kv, S, D]: written in place.
- length: int64 without dimensions, counted up in place; or None, and positions [Q] of integers in [0, S).
- mask [B or 1, H or 1, Q, S], boolean, any strides: True attends.
- Returns [B, Q, H, D]; zeros for a query that attends to nothing. fp32 arithmetic, rounded once. No gradient.
- Raises ValueError, naming the argument, its value and what is allowed. A position outside of the cache is not
  written (`index_copy_` fails an assertion on the device).

Example:
    >>> q, kv, cache = torch.ones(1, 1, 2, 16), torch.ones(1, 1, 1, 16), torch.zeros(2, 1, 1, 8, 16)
    >>> mask = (torch.arange(8) <= 3).expand(1, 1, 1, 8)
    >>> decode_attention(q, kv, kv, None, None, *cache, None, torch.tensor([3]), mask, 0, False, [], [], 0.25).shape
    torch.Size([1, 1, 2, 16])
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import INTERPRETED, define_op, no_triton, on_device_of, tl, triton, wrap_triton
from ._qk_common import DTYPES, Spec, acc_dtype, check_tables, join_pairs, require, split_pairs, table_values
from ._qk_tile import pow2, table_strides

# Keys of a tile, warps of a program, about how many programs, at most how many parts of a row of keys.
BLOCK_N, NUM_WARPS, PROGRAMS, MAX_SPLITS = 64, 4, 1024, 64
MAX_QUERIES, MAX_ROWS, MAX_DIM = 8, 64, 256


def supports(q: Tensor, k: Tensor, key_cache: Tensor) -> str | None:
    """Why the Triton kernels cannot take the inputs (the op then runs its reference), or None."""
    if reason := no_triton(q):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}; allowed: fp32, bf16, fp16"
    queries, dim = q.shape[1], q.shape[3]
    if queries > MAX_QUERIES:
        return f"there are {queries} queries; allowed: up to {MAX_QUERIES}"
    rows = queries * (q.shape[2] // k.shape[2])
    if rows > MAX_ROWS:
        return f"{rows} queries share a head of keys; allowed: up to {MAX_ROWS}"
    if dim > MAX_DIM or dim % 8:
        return f"head_dim is {dim}; allowed: multiples of 8 up to {MAX_DIM}"
    return None


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, spec: Spec) -> Tensor:
    if cos is None or sin is None:
        return x
    dtype = acc_dtype(x)
    c1, c2 = table_values(cos, spec.cos_lanes, spec, dtype)
    s1, s2 = table_values(sin, spec.sin_lanes, spec, dtype)
    x1, x2, rest = split_pairs(x.to(dtype), spec)
    return join_pairs(x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, rest, spec).to(x.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
              value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
              interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
              scale: float) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments."""
    spec = Spec("none", 0.0, 0.0, rotary_dim, interleaved, cos_lanes, sin_lanes)
    if length is not None:
        positions = torch.arange(q.shape[1], device=q.device) + length
        length.add_(q.shape[1])
    assert positions is not None
    key_cache.index_copy_(2, positions, _turned(k, cos, sin, spec).transpose(1, 2))
    value_cache.index_copy_(2, positions, v.transpose(1, 2))
    query = _turned(q, cos, sin, spec).transpose(1, 2)
    gqa = bool(q.shape[2] != k.shape[2])
    out = F.scaled_dot_product_attention(query, key_cache, value_cache, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
           value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor,
           spec: Spec) -> None:  # fmt: skip
    def need(ok: bool, argument: str, value: object, allowed: str) -> None:
        require("decode_attention", ok, argument, value, allowed)

    for name, x in (("q", q), ("k", k), ("v", v), ("key_cache", key_cache), ("value_cache", value_cache)):
        need(x.dim() == 4, f"{name}.shape", tuple(x.shape), "four dimensions")
        need(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        need(x.device == q.device, f"{name}.device", x.device, f"q's {q.device}")
        need(x.stride(3) == 1, f"{name}.stride(3)", x.stride(3), "1")
    batch, queries, heads, dim = q.shape
    kv_heads, size = k.shape[2], key_cache.shape[2]
    need(k.shape == (batch, queries, kv_heads, dim) and kv_heads > 0 and heads % kv_heads == 0, "k.shape",
         tuple(k.shape), f"q's {tuple(q.shape)} with a number of heads that divides q's")  # fmt: skip
    need(v.shape == k.shape, "v.shape", tuple(v.shape), f"k's {tuple(k.shape)}")
    need(key_cache.shape == (batch, kv_heads, size, dim), "key_cache.shape", tuple(key_cache.shape),
         f"[{batch}, {kv_heads}, S, {dim}]")  # fmt: skip
    need(value_cache.shape == key_cache.shape, "value_cache.shape", tuple(value_cache.shape), "key_cache's")
    need((length is None) != (positions is None), "length", "given" if length is not None else None,
         "given, or else positions")  # fmt: skip
    if length is not None:
        need(length.dim() == 0 and length.dtype == torch.int64, "length", length.dtype, "int64 without dimensions")
    if positions is not None:
        need(positions.shape == (queries,), "positions.shape", tuple(positions.shape), f"[{queries}]")
    need(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "bool")
    sizes = mask.dim() == 4 and (mask.shape[0] == 1 or mask.shape[0] == batch) and mask.shape[3] == size
    need(sizes and (mask.shape[1] == 1 or mask.shape[1] == heads) and mask.shape[2] == queries, "mask.shape",
         tuple(mask.shape), f"[{batch} or 1, {heads} or 1, {queries}, {size}]")  # fmt: skip
    rotary = spec.rotary_dim
    need(0 <= rotary <= dim and rotary % 2 == 0, "rotary_dim", rotary, f"an even number, 0 to D = {dim}")
    check_tables("decode_attention", q, cos, sin, spec)


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
def _split_kernel(q, q_b, q_s, q_h, k, k_b, k_s, k_h, v, v_b, v_s, v_h, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s,
                  sin_d, key_cache, kc_b, kc_h, kc_s, value_cache, vc_b, vc_h, vc_s, position, position_s, mask, m_b,
                  m_h, m_s, m_n, size, partial, top_total, log2_scale, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                  Q: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COUNTED: tl.constexpr,
                  SPLITS: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
                  C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
                  S2: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One part of the keys of one head of keys, for all Q * GROUP queries that read it (padded to ROWS)."""
    log2_scale = tl.cast(log2_scale, tl.float32)
    dtype = key_cache.dtype.element_ty
    pair, split = tl.program_id(0), tl.program_id(1)
    b, hk = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row, lane, col = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, BLOCK_N)
    i, g = row // GROUP, row % GROUP
    exists, real = row < Q * GROUP, lane < D
    mask_row = mask + b * m_b + (hk * GROUP + g)[:, None] * m_h + i[:, None] * m_s
    key_cache += b * kc_b + hk * kc_h
    value_cache += b * vc_b + hk * vc_h
    k += b * k_b + hk * k_h
    v += b * v_b + hk * v_h
    cos += b * cos_b
    sin += b * sin_b
    q_row = q + b * q_b + (hk * GROUP + g)[:, None] * q_h + i[:, None] * q_s
    query = _rotated(q_row, lane[None, :], cos + i[:, None] * cos_s, cos_d, sin + i[:, None] * sin_s, sin_d,
                     exists[:, None] & real[None, :], R, INTERLEAVED, C0, C1, C2, S0, S1, S2)  # fmt: skip
    query = query.to(dtype)  # where the unfused graph rounds
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    tiles = TILES
    if TILES == 0:
        tiles = tl.cdiv(size, SPLITS * BLOCK_N)
    for t in range(tiles):
        start = (split + t * SPLITS) * BLOCK_N  # neighbours go to different programs: all have some of what is there
        n = start + col
        inside = n < size
        attends = tl.load(mask_row + n[None, :] * m_n, exists[:, None] & inside[None, :], other=0) != 0
        is_new = False
        for j in tl.static_range(Q):
            at = tl.load(position) + j if COUNTED else tl.load(position + j * position_s)
            is_new = is_new | ((at >= start) & (at < start + BLOCK_N))
        if is_new | (tl.max(tl.max(attends.to(tl.int32), 1), 0) > 0):
            there = inside[:, None] & real[None, :]
            offset = n.to(tl.int64)[:, None]
            key = tl.load(key_cache + offset * kc_s + lane[None, :], there, other=0.0)
            value = tl.load(value_cache + offset * vc_s + lane[None, :], there, other=0.0)
            if is_new:
                for j in tl.static_range(Q):
                    at = tl.load(position) + j if COUNTED else tl.load(position + j * position_s)
                    at = at.to(tl.int64)
                    mine = lane < tl.where((at >= start) & (at < start + BLOCK_N) & (at < size), D, 0)
                    new_key = _rotated(k + j * k_s, lane, cos + j * cos_s, cos_d, sin + j * sin_s, sin_d, real, R,
                                       INTERLEAVED, C0, C1, C2, S0, S1, S2).to(dtype)  # fmt: skip
                    new_value = tl.load(v + j * v_s + lane, real, other=0.0)
                    tl.store(key_cache + at * kc_s + lane, new_key, mine)
                    tl.store(value_cache + at * vc_s + lane, new_value, mine)
                    hit = (n == at)[:, None]
                    key = tl.where(hit, new_key[None, :], key)
                    value = tl.where(hit, new_value[None, :], value)
            if ROWS == 1:
                s = tl.sum(key.to(tl.float32) * query.to(tl.float32), 1)[None, :]
            else:
                if WIDE:
                    s = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)))
                else:
                    s = tl.dot(query, tl.trans(key), input_precision="ieee")
            s = tl.where(attends, s * log2_scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(p, 1)
            if ROWS == 1:
                weights = tl.trans(p)
                acc = acc * decay[:, None] + tl.sum(weights * value.to(tl.float32), 0)[None, :]
            else:
                if WIDE:
                    acc = acc * decay[:, None] + tl.dot(p, value.to(tl.float32))
                else:
                    acc = acc * decay[:, None] + tl.dot(p.to(dtype), value, input_precision="ieee")
            top = new_top
    at_row = (pair * SPLITS + split).to(tl.int64) * (Q * GROUP) + row
    tl.store(top_total + 2 * at_row, top, exists)
    tl.store(top_total + 2 * at_row + 1, total, exists)
    written = exists[:, None] & real[None, :] & (total > 0)[:, None]
    tl.store(partial + at_row[:, None] * D + lane[None, :], acc, written)


@triton.jit
def _merge_kernel(partial, top_total, out, length, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, Q: tl.constexpr,
                  D: tl.constexpr, DP: tl.constexpr, COUNTED: tl.constexpr, SPLITS: tl.constexpr,
                  SP: tl.constexpr):  # fmt: skip
    """Adds up the parts of one query, in the order of the keys' parts, and counts the new tokens."""
    program = tl.program_id(0)
    pair, row = program // (Q * GROUP), program % (Q * GROUP)
    split, lane = tl.arange(0, SP), tl.arange(0, DP)
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


def _split(size: int, pairs: int) -> tuple[int, int]:
    """How many programs share the keys of a head, and how many tiles each has; 0 where the size is symbolic."""
    splits = min(MAX_SPLITS, pow2(max(PROGRAMS // pairs, 1)) if isinstance(pairs, int) else 16)
    if not isinstance(size, int):
        return splits, 0
    splits = min(splits, pow2(triton.cdiv(size, BLOCK_N)))
    return splits, triton.cdiv(triton.cdiv(size, BLOCK_N), splits)


def _forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
             value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
             interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
             scale: float) -> Tensor:  # fmt: skip
    spec = Spec("none", 0.0, 0.0, rotary_dim, interleaved, cos_lanes, sin_lanes)
    _check(q, k, v, cos, sin, key_cache, value_cache, length, positions, mask, spec)
    if supports(q, k, key_cache) is not None or q.numel() == 0:
        return reference(q, k, v, cos, sin, key_cache, value_cache, length, positions, mask, rotary_dim, interleaved,
                         cos_lanes, sin_lanes, scale)  # fmt: skip
    batch, queries, heads, dim = q.shape
    kv_heads, size = k.shape[2], key_cache.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads
    rows = 1 if queries * group == 1 else max(pow2(queries * group), 16)
    splits, tiles = _split(size, pairs)
    out = q.new_empty(batch, queries, heads, dim)
    partial = q.new_empty(pairs, splits, queries * group, dim, dtype=torch.float32)
    top_total = q.new_empty(pairs, splits, queries * group, 2, dtype=torch.float32)
    position = length if length is not None else positions
    assert position is not None
    c0, c1, c2 = cos_lanes if rotary_dim else (0, 0, 0)
    s0, s1, s2 = sin_lanes if rotary_dim else (0, 0, 0)
    m_b, m_h, m_s, m_n = (0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
    common = {"KV_HEADS": kv_heads, "GROUP": group, "Q": queries, "D": dim, "DP": max(pow2(dim), 16),
              "COUNTED": length is not None, "SPLITS": splits,
              "num_warps": NUM_WARPS if rows <= 16 else 2 * NUM_WARPS}  # fmt: skip
    with on_device_of(q):
        wrap_triton(_split_kernel)[(pairs, splits)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], q if cos is None else cos, *table_strides(cos),
            q if sin is None else sin, *table_strides(sin), key_cache, *key_cache.stride()[:3], value_cache,
            *value_cache.stride()[:3], position, 0 if length is not None else position.stride(0),
            mask, m_b, m_h, m_s, m_n, size, partial, top_total, scale * math.log2(math.e), ROWS=rows,
            TILES=tiles, R=rotary_dim, INTERLEAVED=interleaved, C0=c0, C1=c1, C2=c2, S0=s0, S1=s1,
            S2=s2, BLOCK_N=BLOCK_N, WIDE=INTERPRETED, **common,
        )  # fmt: skip  # the interpreter multiplies bfloat16 as integers
        wrap_triton(_merge_kernel)[(pairs * queries * group,)](partial, top_total, out, position, SP=splits, **common)
    return out


decode_attention = define_op("torch_fuse::decode_attention", _forward, ("key_cache", "value_cache", "length"))


@decode_attention.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
          value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
          interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
          scale: float) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)
