"""Rotary embeddings over the lanes of all heads at once, as LTX-Video writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.rewrite.pattern import Example

B, S, D = 2, 5, 8


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    yield _all_heads("all_heads_at_once")
    yield _all_heads("all_heads_at_once_normalised", norm=_rms)
    yield _all_heads("all_heads_at_once_of_each_batch", norm=_rms_call, batch=B)


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern may fire on them only if the result stays right."""
    yield _all_heads("all_heads_of_the_query", False, cut_key=True)
    yield _all_heads("all_heads_and_fewer_of_the_key", False, kv_heads=1)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rms_call(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class AllHeads(nn.Module):
    """Query and key are normalised and rotated before they are cut into heads, which have angles of their own."""

    def __init__(
        self, norm: Callable[[Tensor, Tensor], Tensor] | None, batch: int, kv_heads: int, cut_key: bool
    ) -> None:
        super().__init__()
        width, self.kv_heads, self.norm, self.cut_key = 2 * D, kv_heads, norm, cut_key
        self.q, self.k, self.v = (nn.Linear(width, n * D) for n in (2, kv_heads, kv_heads))
        self.q_weight, self.k_weight = (nn.Parameter(1 + 0.1 * torch.randn(n * D)) for n in (2, kv_heads))
        start = torch.arange(batch, dtype=torch.float32)[:, None, None]
        angles = (start + torch.arange(S)[:, None]) * 0.7 ** torch.arange(width // 2)
        self.angles: Tensor
        self.register_buffer("angles", angles)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norm is not None:
            q, k = self.norm(q, self.q_weight), self.norm(k, self.k_weight)
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (self.angles.cos(), self.angles.sin()))
        q = _interleaved(q, cos, sin)
        if self.cut_key:
            k = _interleaved(k.view(B, S, -1, D), cos[:, :, None, :D], sin[:, :, None, :D])
        else:
            k = _interleaved(k, cos[..., : k.shape[-1]], sin[..., : k.shape[-1]])
        q, k, v = (t.unflatten(2, (-1, D)).transpose(1, 2) if t.dim() == 3 else t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads == 1).transpose(1, 2).flatten(2)


def _all_heads(name: str, fuses: bool = True, norm: Any = None, batch: int = 1, **how: Any) -> Example:
    def make(dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        block = AllHeads(norm, batch, **{"kv_heads": 2, "cut_key": False, **how}).to(dtype)
        return block, (torch.randn(B, S, 2 * D, dtype=dtype, requires_grad=True),)

    return Example(name, make, fuses)
