"""Attention of a decoding step to a paged cache: keys and values are read where the block table says they lie.

    key[b, j] = key_cache[block_table[b, j // block], j % block], value[b, j] likewise, for j < T * block
    out = softmax(q @ key^T * scale where mask, or + mask) @ value

The gathered keys and values are not written. Flash decoding (Dao et al. 2023) over the blocks of vLLM's PagedAttention
(Kwon et al. 2023), with `decode_attention`'s arithmetic: the keys are split over programs, whose results a second
kernel adds up, always in one order. Blocks of one key are an index for each, as in transformers' continuous batching.

- q [B, Q, H, D], lanes side by side; bf16, fp16, fp32. Up to eight queries.
- key_cache, value_cache [N, block, H_kv, D], H a multiple of H_kv; any strides with lanes side by side.
- block_table [B, T]: int32 or int64 in [-N, N); negative ones count from the end.
- mask [B or 1, H or 1, Q, T * block], any strides: boolean (True attends) or of q's dtype, added to the scores.
- Returns [B, Q, H, D]; zeros for a query that attends to nothing. fp32 arithmetic, rounded once. No gradient.
- early: the launches may begin before the one before them has ended (programmatic dependent launch).
- Raises ValueError, naming the argument, its value and what is allowed. A block outside of the cache is not read
  (indexing fails an assertion on the device).

Example:
    >>> q, cache = torch.ones(1, 1, 2, 16), torch.zeros(2, 4, 8, 1, 16)
    >>> mask = (torch.arange(16) <= 9).expand(1, 1, 1, 16)
    >>> paged_decode_attention(q, *cache, torch.tensor([[3, 1]]), mask, 0.25).shape
    torch.Size([1, 1, 2, 16])
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._calls import Call, Calls
from ._decode_attention_kernels import merge_kernel
from ._gemv_common import launch_options, starts_early
from ._ops import INTERPRETED, define_opaque_op, triton
from ._paged_attention_kernel import paged_kernel
from ._qk_common import require
from ._qk_tile import pow2
from .decode_attention import BLOCK_N, NUM_WARPS, _split
from .decode_attention import supports as supports_heads


def supports(q: Tensor, key_cache: Tensor) -> str | None:
    """Why the Triton kernels cannot take the inputs (the op then runs its reference), or None."""
    return supports_heads(q, key_cache, key_cache)


def reference(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, mask: Tensor, scale: float,
              early: bool = False) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments."""
    keys, values = (cache[block_table].flatten(1, 2).transpose(1, 2) for cache in (key_cache, value_cache))
    gqa = bool(q.shape[2] != keys.shape[1])
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()


def _check(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, mask: Tensor) -> None:
    def need(ok: bool, argument: str, value: object, allowed: str) -> None:
        require("paged_decode_attention", ok, argument, value, allowed)

    for name, x in (("q", q), ("key_cache", key_cache), ("value_cache", value_cache)):
        need(x.dim() == 4, f"{name}.shape", tuple(x.shape), "four dimensions")
        need(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        need(x.device == q.device, f"{name}.device", x.device, f"q's {q.device}")
        need(x.stride(3) == 1, f"{name}.stride(3)", x.stride(3), "1")
    batch, queries, heads, dim = q.shape
    block, kv_heads = key_cache.shape[1:3]
    need(kv_heads > 0 and heads % kv_heads == 0 and key_cache.shape[3] == dim, "key_cache.shape",
         tuple(key_cache.shape), f"[N, block, a divisor of {heads}, {dim}]")  # fmt: skip
    need(value_cache.shape == key_cache.shape, "value_cache.shape", tuple(value_cache.shape), "key_cache's")
    need(block_table.dtype in (torch.int32, torch.int64), "block_table.dtype", block_table.dtype, "int32, int64")
    need(block_table.dim() == 2 and block_table.shape[0] == batch, "block_table.shape", tuple(block_table.shape),
         f"[{batch}, T]")  # fmt: skip
    need(mask.dtype in (torch.bool, q.dtype), "mask.dtype", mask.dtype, f"bool, q's {q.dtype}")
    size = block_table.shape[1] * block
    sizes = mask.dim() == 4 and (mask.shape[0] == 1 or mask.shape[0] == batch) and mask.shape[3] == size
    need(sizes and (mask.shape[1] == 1 or mask.shape[1] == heads) and mask.shape[2] == queries, "mask.shape",
         tuple(mask.shape), f"[{batch} or 1, {heads} or 1, {queries}, {size}]")  # fmt: skip


_calls = Calls()


def _forward(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, mask: Tensor, scale: float,
             early: bool = False) -> Tensor:  # fmt: skip
    given, options = (q, key_cache, value_cache, block_table, mask), (scale, early)
    return _calls.make(given, (*options, _split), _first, *given, *options)


def _first(call: Call, q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, mask: Tensor,
           scale: float, early: bool) -> Tensor:  # fmt: skip
    """The first call of its kind."""
    _check(q, key_cache, value_cache, block_table, mask)
    batch, queries, heads, dim = q.shape
    blocks, page, kv_heads, _ = key_cache.shape
    size = block_table.shape[1] * page
    if supports(q, key_cache) is not None or q.numel() == 0 or size == 0:
        return reference(q, key_cache, value_cache, block_table, mask, scale)
    group, pairs = heads // kv_heads, batch * kv_heads
    rows, splits = max(pow2(queries * group), 16), _split(size, pairs)
    out = call.empty(q.shape, q.dtype)
    partial = call.empty((pairs, splits, queries * group, dim), torch.float32)
    top_total = call.empty((pairs, splits, queries * group, 2), torch.float32)
    mask_strides = [0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True)]
    early = starts_early(q, early)
    common = {"KV_HEADS": kv_heads, "GROUP": group, "Q": queries, "D": dim, "DP": max(pow2(dim), 16), "SPLITS": splits,
              "EARLY": early, **launch_options(early)}  # fmt: skip
    arguments = [
        q, *q.stride()[:3], key_cache, *key_cache.stride()[:3], value_cache, *value_cache.stride()[:3], block_table,
        *block_table.stride(), blocks, mask, *mask_strides, size, partial, top_total, scale * math.log2(math.e),
    ]  # fmt: skip
    call.launch(paged_kernel, pairs * splits, arguments, {
        **common, "PAGE": page, "TILES": triton.cdiv(size, BLOCK_N * splits), "ROWS": rows, "BLOCK_N": BLOCK_N,
        "ADDITIVE": mask.dtype != torch.bool, "WIDE": INTERPRETED,
        "num_warps": NUM_WARPS if rows <= 16 else 2 * NUM_WARPS,
    })  # fmt: skip  # the interpreter multiplies bfloat16 as integers
    call.launch(merge_kernel, pairs * queries * group, [partial, top_total, out, block_table],
                {**common, "COUNTED": False, "SP": splits})  # fmt: skip
    return out


def _fake(q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, mask: Tensor, scale: float,
          early: bool = False) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


paged_decode_attention = define_opaque_op("torch_fuse::paged_decode_attention", _forward, _fake)
