"""One decoding step of attention on a static key-value cache: RoPE, append, attend to what is there.

    position[i] = length + i, then length += Q          # or positions[i], when they are given
    key_cache[:, :, position[i]] = rope(k[:, i]);  value_cache[:, :, position[i]] = v[:, i]
    out = softmax(rope(q) @ key_cache^T * scale where mask, else -inf) @ value_cache

The mask decides what is attended to, whatever it means; keys before the first and behind the last that it keeps are not
read, so a step costs the tokens that are in the cache, not its size. All is decided on the device: the same launch
serves every length, also from a CUDA graph. Flash decoding (Dao et al. 2023): the keys are split over programs, whose
results a second kernel adds up, always in one order. A program waits for its part of the mask, then for all the keys
and values that it keeps; one query of a head is multiplied with fused multiply-adds, several on tensor cores.

- q [B, Q, H, D]; k, v [B, Q, H_kv, D], H a multiple of H_kv; any strides with lanes side by side; bf16, fp16, fp32.
- cos, sin [B or 1, Q, lanes], any float dtype, or None when rotary_dim is 0; `cos_lanes` and `sin_lanes` as in
  `partial_rope`: (mult, first, second) tells where the table keeps a pair's values.
- key_cache, value_cache [B, H_kv, S, D]: written in place.
- length: int64 without dimensions, in [0, S), counted up in place; or None, and positions [Q] of integers in [0, S).
- mask [B or 1, H or 1, Q, S], boolean, any strides: True attends.
- Returns [B, Q, H, D]; zeros for a query that attends to nothing. fp32 arithmetic, rounded once. No gradient.
- q_weight, k_weight [D], contiguous, any float dtype, both or neither: each head of q and k goes through an RMSNorm
  before RoPE, x / sqrt(mean(x^2) + norm_eps) * (weight + norm_offset), as in Qwen3.
- early: the launches may begin before the one before them has ended (programmatic dependent launch).
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._calls import Call, Calls
from ._decode_attention_kernels import merge_kernel, one_query_kernel, queries_kernel
from ._gemv_common import launch_options, starts_early
from ._ops import HAS_TRITON, INTERPRETED, define_opaque_op, no_triton, triton
from ._qk_common import DTYPES, Spec, acc_dtype, check_tables, join_pairs, require, split_pairs, table_values
from ._qk_tile import pow2, table_strides

# Keys of a tile, warps of a program, at most about how many programs and how many parts of the keys.
BLOCK_N, NUM_WARPS, PROGRAMS, MAX_SPLITS = 64, 4, 1024, 64
MAX_QUERIES, MAX_ROWS, MAX_DIM = 8, 64, 256
# Of two dimensions that are alike, Triton spreads threads over the first up to 3.6, over the last in 3.9. The other one
# makes the kernel slower, with barriers, and not wrong.
OWN = 1 if HAS_TRITON and triton.__version__.startswith("3.6") else 0


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


def _normed(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """Each head through its RMSNorm, not rounded; x itself without a weight."""
    if weight is None:
        return x
    wide = x.to(acc_dtype(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * (weight.to(wide.dtype) + offset)


def reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
              value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
              interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
              scale: float, early: bool = False, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
              norm_eps: float = 0.0, norm_offset: float = 0.0) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments."""
    spec = Spec("none", 0.0, 0.0, rotary_dim, interleaved, cos_lanes, sin_lanes)
    q, k = (_normed(x, w, norm_eps, norm_offset) for x, w in ((q, q_weight), (k, k_weight)))
    if length is not None:
        positions = torch.arange(q.shape[1], device=q.device) + length
        length.add_(q.shape[1])
    assert positions is not None
    key_cache.index_copy_(2, positions, _turned(k, cos, sin, spec).to(key_cache.dtype).transpose(1, 2))
    value_cache.index_copy_(2, positions, v.transpose(1, 2))
    query = _turned(q, cos, sin, spec).to(key_cache.dtype).transpose(1, 2)
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
    for name, given in (("length", length), ("positions", positions), ("mask", mask)):
        need(
            given is None or given.device == q.device,
            f"{name}.device",
            None if given is None else given.device,
            f"q's {q.device}",
        )
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


def _split(size: int, pairs: int) -> int:
    """How many programs share the keys of a head: a power of two."""
    wanted = min(max(PROGRAMS // pairs, 1), triton.cdiv(size, BLOCK_N), MAX_SPLITS)
    return 1 << (wanted.bit_length() - 1)


_calls = Calls()


def _forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
             value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
             interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
             scale: float, early: bool = False, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
             norm_eps: float = 0.0, norm_offset: float = 0.0) -> Tensor:  # fmt: skip
    given = (q, k, v, cos, sin, key_cache, value_cache, length, positions, mask, q_weight, k_weight)
    norm = (norm_eps, norm_offset)
    options = (rotary_dim, interleaved, tuple(cos_lanes), tuple(sin_lanes), scale, early, *norm)
    chosen = (_split, BLOCK_N, NUM_WARPS, PROGRAMS, MAX_SPLITS, OWN)
    return _calls.make(given, (*options, chosen), _first, *given, *options)


def _first(call: Call, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
           value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor,
           q_weight: Tensor | None, k_weight: Tensor | None, rotary_dim: int, interleaved: bool,
           cos_lanes: Sequence[int], sin_lanes: Sequence[int], scale: float, early: bool, norm_eps: float,
           norm_offset: float) -> Tensor:  # fmt: skip
    """The first call of its kind."""
    spec = Spec("none", 0.0, 0.0, rotary_dim, interleaved, cos_lanes, sin_lanes)
    _check(q, k, v, cos, sin, key_cache, value_cache, length, positions, mask, spec)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        fits = weight is not None and weight.shape == (q.shape[3],) and weight.is_contiguous()
        shown = None if weight is None else tuple(weight.shape)
        neither = q_weight is None and k_weight is None
        require("decode_attention", fits or neither, name, shown, f"[{q.shape[3]}], contiguous, with the other's")
    if supports(q, k, key_cache) is not None or q.numel() == 0:
        return reference(q, k, v, cos, sin, key_cache, value_cache, length, positions, mask, rotary_dim, interleaved,
                         cos_lanes, sin_lanes, scale, False, q_weight, k_weight, norm_eps, norm_offset)  # fmt: skip
    batch, queries, heads, dim = q.shape
    kv_heads, size = k.shape[2], key_cache.shape[2]
    group, pairs = heads // kv_heads, batch * kv_heads
    rows = 1 if queries * group == 1 else max(pow2(queries * group), 16)
    splits = _split(size, pairs)
    out = call.empty(q.shape, q.dtype)
    partial = call.empty((pairs, splits, queries * group, dim), torch.float32)
    top_total = call.empty((pairs, splits, queries * group, 2), torch.float32)
    position = length if length is not None else positions
    assert position is not None
    c0, c1, c2 = cos_lanes if rotary_dim else (0, 0, 0)
    s0, s1, s2 = sin_lanes if rotary_dim else (0, 0, 0)
    mask_strides = [0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True)]
    early, lanes = starts_early(q, early), max(pow2(dim), 16)
    common = {"KV_HEADS": kv_heads, "GROUP": group, "Q": queries, "D": dim, "DP": lanes,
              "COUNTED": length is not None, "SPLITS": splits, "EARLY": early, **launch_options(early)}  # fmt: skip
    arguments = [
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], q if cos is None else cos, *table_strides(cos),
        q if sin is None else sin, *table_strides(sin), key_cache, *key_cache.stride()[:3], value_cache,
        *value_cache.stride()[:3], position, 0 if length is not None else position.stride(0), mask, *mask_strides,
        size, partial, top_total, scale * math.log2(math.e), q if q_weight is None else q_weight,
        q if k_weight is None else k_weight, norm_eps, norm_offset,
    ]  # fmt: skip
    kinds: dict[str, Any] = {
        **common, "TILES": triton.cdiv(size, BLOCK_N * splits), "R": rotary_dim, "INTERLEAVED": interleaved,
        "C0": c0, "C1": c1, "C2": c2, "S0": s0, "S1": s1, "S2": s2,
        "NORM": q_weight is not None,
    }  # fmt: skip
    if rows == 1:
        side = min(NUM_WARPS * 32 * 16 // (lanes * q.element_size()), BLOCK_N)  # 16 bytes of a key for each thread
        call.launch(one_query_kernel, pairs * splits, arguments, {
            **kinds, "DEEP": BLOCK_N // side, "SIDE": side, "OWN": OWN, "num_warps": NUM_WARPS,
        })  # fmt: skip
    else:
        call.launch(queries_kernel, pairs * splits, arguments, {
            **kinds, "ROWS": rows, "NEW": 16, "BLOCK_N": BLOCK_N, "WIDE": INTERPRETED,
            "num_warps": NUM_WARPS if rows <= 16 else 2 * NUM_WARPS,
        })  # fmt: skip  # the interpreter multiplies bfloat16 as integers
    call.launch(merge_kernel, pairs * queries * group, [partial, top_total, out, position], {**common, "SP": splits})
    return out


def _fake(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, key_cache: Tensor,
          value_cache: Tensor, length: Tensor | None, positions: Tensor | None, mask: Tensor, rotary_dim: int,
          interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
          scale: float, early: bool = False, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
          norm_eps: float = 0.0, norm_offset: float = 0.0) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


decode_attention = define_opaque_op(
    "torch_fuse::decode_attention", _forward, _fake, mutates=("key_cache", "value_cache", "length")
)
