"""Paged attention as models write it out, and some that `paged_decode_attention` may not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_H, _D, _N, _T = 4, 8, 7, 3


class _Step(nn.Module):
    """The attention of a step, with its append to the cache."""

    def __init__(self, kv_heads: int, how: str, mask: str, page: int) -> None:
        super().__init__()
        self.kv_heads, self.how, self.mask, self.page = kv_heads, how, mask, page
        self.proj = nn.Linear(16, (_H + 2 * kv_heads) * _D)

    def forward(self, x, keys, values, table, slots, live):
        queries = x.shape[1]
        sizes = [_H * _D, self.kv_heads * _D, self.kv_heads * _D]
        q, k, v = (y.unflatten(-1, (-1, _D)) for y in self.proj(x).split(sizes, -1))
        if self.how not in ("heads_first", "not_appended", "heads_in_between"):
            for cache, new in ((keys, k), (values, v)):
                cache.view(-1, self.kv_heads, _D)[slots] = new.flatten(0, 1)
        other = table.flip(1) if self.how == "other_table" else table
        if self.how == "scaled_between":
            key, value = self.gathered(keys, table), self.gathered(values, table)
            keys.mul_(2)
        else:
            key, value = self.gathered(keys, table), self.gathered(values, other)
        if self.kv_heads != _H:
            key, value = (y.repeat_interleave(_H // self.kv_heads, 1) for y in (key, value))
        size = key.shape[2]
        seen = live[:, None] + torch.arange(queries, device=x.device)
        keep = (torch.arange(size, device=x.device) <= seen[..., None])[:, None]
        mask = keep if self.mask == "bool" else None
        if self.mask == "added":
            mask = torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_fill(~keep, torch.finfo(x.dtype).min)
        return F.scaled_dot_product_attention(q.transpose(1, 2), key, value, attn_mask=mask).transpose(1, 2)

    def gathered(self, cache, table):
        batch = table.shape[0]
        if self.how == "index_select":
            blocks = cache.index_select(0, table.flatten())
            return blocks.view(batch, -1, self.kv_heads, _D).transpose(1, 2)
        if self.how == "heads_first":  # [N, H, page, D]
            return cache[table].permute(0, 2, 1, 3, 4).reshape(batch, self.kv_heads, -1, _D)
        if self.how == "an_index_a_key":
            return cache.view(-1, self.kv_heads, _D)[table[0]].transpose(0, 1).unsqueeze(0)
        if self.how == "keys_of_all_blocks_in_turn":  # key j is in block j % T
            return cache[table].transpose(1, 2).reshape(batch, -1, self.kv_heads, _D).transpose(1, 2)
        if self.how == "heads_in_between":  # lanes of the keys taken for heads
            return cache[table].reshape(batch, self.kv_heads, -1, _D)
        return cache[table].flatten(1, 2).transpose(1, 2)


def step(
    batch: int = 2, queries: int = 1, kv_heads: int = _H, how: str = "", mask: str = "bool", page: int = 4,
    grad: bool = False, index: torch.dtype = torch.int64,
) -> Callable[[torch.dtype], tuple[nn.Module, tuple[Any, ...]]]:  # fmt: skip
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = _Step(kv_heads, how, mask, page).to(dtype).requires_grad_(grad)
        shape = (_N, kv_heads, page, _D) if how == "heads_first" else (_N, page, kv_heads, _D)
        caches = tuple(torch.randn(shape).to(dtype) for _ in range(2))
        rows = _N * page if how == "an_index_a_key" else _N
        table = torch.stack([torch.randperm(rows)[: 10 if how == "an_index_a_key" else _T] for _ in range(batch)])
        slots, live = torch.randperm(_N * page)[: batch * queries], torch.arange(batch) + 5
        return model, (torch.randn(batch, queries, 16).to(dtype), *caches, table.to(index), slots, live)

    return make


SPELLINGS: dict[str, dict[str, Any]] = {
    "one_token": {},
    "three_tokens_grouped": {"queries": 3, "kv_heads": 2},
    "multi_query": {"kv_heads": 1, "index": torch.int32},
    "index_select": {"how": "index_select"},
    "heads_first": {"how": "heads_first", "kv_heads": 2},
    "an_index_a_key": {"how": "an_index_a_key", "batch": 1},
    "added_mask": {"mask": "added"},
    "blocks_of_one": {"page": 1, "mask": "added"},
}
NEAR_MISSES: dict[str, dict[str, Any]] = {
    "no_mask": {"mask": "none"},
    "keys_of_all_blocks_in_turn": {"how": "keys_of_all_blocks_in_turn"},
    "heads_in_between": {"how": "heads_in_between"},
    "other_table_of_values": {"how": "other_table"},
    "cache_written_after_the_gather": {"how": "scaled_between"},
    "too_many_tokens": {"queries": 9, "batch": 1},
    "gradients": {"grad": True, "how": "not_appended"},
}
