"""Decoding steps that `decode_attention` takes, and some that it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_B, _H, _D, _S = 2, 4, 8, 16


class _Step(nn.Module):
    """A decoding step as a model writes it."""

    def __init__(self, kv_heads: int, rope: str, order: str, mask: str) -> None:
        super().__init__()
        self.kv_heads, self.rope, self.order, self.mask = kv_heads, rope, order, mask
        self.proj = nn.Linear(16, (_H + 2 * kv_heads) * _D)

    def forward(self, x, cos, sin, keys, values, length):
        extra: Any = 0
        sizes = [_H * _D, self.kv_heads * _D, self.kv_heads * _D]
        q, k, v = (y.unflatten(-1, (-1, _D)).transpose(1, 2) for y in self.proj(x).split(sizes, -1))
        if self.rope == "half":
            q, k = (_rotate_half(y, cos, sin) for y in (q, k))
        count, span = x.shape[1], torch.arange(_S, device=x.device)
        seen = torch.arange(count, device=x.device) + length
        mask = span <= seen[:, None]
        if self.mask == "window":
            mask = mask & (span > seen[:, None] - 3)
        if self.mask == "additive":
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, float("-inf"))
        if self.mask == "padding":
            mask = (span <= length)[None, None, None].expand(x.shape[0], 1, 1, _S)
        elif self.mask == "one_for_all_keys":
            mask = mask[:, :1].expand(x.shape[0], 1, count, 1)
        elif self.mask != "two_dims":
            mask = mask[None, None].expand(x.shape[0], 1, count, _S)
        positions = torch.arange(count, device=x.device) + length
        if self.order == "read_before":
            extra = keys * 2
        if self.order == "counted":
            length.add_(count)
        if self.order == "reversed":
            positions = positions.flip(0)
        keys.index_copy_(2, positions, k)
        if self.order == "read_between":
            extra = keys.sum()
        values.index_copy_(2, positions + 1 if self.order == "other_positions" else positions, v)
        if self.order == "written_twice":
            keys.mul_(2)
        if self.order == "counted_late_read":
            length.add_(count)
            extra = length + 1
        key, value = keys, values
        if self.kv_heads != _H:
            key, value = (y.repeat_interleave(_H // self.kv_heads, 1) for y in (keys, values))
        if self.mask == "none":
            return F.scaled_dot_product_attention(q, key, value), extra
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask).transpose(1, 2), extra


def _rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def step(
    queries: int = 1, kv_heads: int = _H, rope: str = "half", order: str = "counted", mask: str = "causal",
    grad: bool = False,
) -> Callable[[torch.dtype], tuple[nn.Module, tuple[Any, ...]]]:  # fmt: skip
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = _Step(kv_heads, rope, order, mask).to(dtype).requires_grad_(grad)
        angle = torch.rand(1, queries, _D // 2).repeat(1, 1, 2)
        tables = (angle.cos().to(dtype), angle.sin().to(dtype))
        caches = tuple(torch.randn(_B, kv_heads, _S, _D).to(dtype) for _ in range(2))
        return model, (torch.randn(_B, queries, 16).to(dtype), *tables, *caches, torch.tensor(5))

    return make


SPELLINGS: dict[str, dict[str, Any]] = {
    "one_token": {},
    "three_tokens": {"queries": 3},
    "grouped": {"kv_heads": 2},
    "multi_query_two_tokens": {"kv_heads": 1, "queries": 2},
    "no_rope": {"rope": "none"},
    "positions_not_counted": {"order": "positions"},
    "positions_reversed": {"order": "reversed", "queries": 3},
    "window": {"mask": "window", "queries": 2},
    "mask_of_two_dims": {"mask": "two_dims"},
    "queries_share_a_mask": {"mask": "padding", "queries": 3},
    "count_is_read_in_between": {"order": "counted_late_read"},
}
NEAR_MISSES: dict[str, dict[str, Any]] = {
    "no_mask": {"mask": "none"},
    "additive_mask": {"mask": "additive"},
    "mask_of_one_for_all_keys": {"mask": "one_for_all_keys"},
    "too_many_tokens": {"queries": 9, "order": "positions"},
    "cache_read_before": {"order": "read_before"},
    "cache_read_in_between": {"order": "read_between"},
    "cache_written_twice": {"order": "written_twice"},
    "values_elsewhere": {"order": "other_positions"},
    "gradients": {"grad": True, "order": "positions"},
}
