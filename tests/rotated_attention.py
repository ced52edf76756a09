"""Attention on a rotated query and key, q, k and v [B, S, H, D], and its comparison with the graph as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Comparison, compare
from torch import Tensor

PATTERN = "norm_qkv_rope_attention"
B, S, H, D = 2, 5, 2, 8


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention summed over lanes, so that its own layout does not show."""
    return F.scaled_dot_product_attention(q, k, v).sum(-1)


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def tables(length: int = S, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(float(length)), 0.5 ** torch.arange(D // 2))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qkv(dtype: torch.dtype = torch.float32, batch: int = B, length: int = S) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(batch, length, H, D, dtype=dtype, requires_grad=True) for _ in range(3))


def compared(model: Callable[..., Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Comparison:
    """`model(q, k, v, cos, sin)`, q, k and v being [B, S, H, D]."""
    kwargs.setdefault("executor", "aot_eager")
    return compare(model, (*qkv(dtype), *tables(dtype=dtype)), **kwargs)


def agrees(model: Callable[..., Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Comparison:
    result = compared(model, dtype, **kwargs)
    assert not result.problems, result.reasons
    return result


def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return attend(rope(heads_first(q), cos, sin), rope(heads_first(k), cos, sin), heads_first(v))
