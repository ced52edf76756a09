"""What attention with soft caps and sinks is written of: masks, caps, columns of sinks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CAP = 2.0


def later(x: Tensor, dim: int = 2) -> Tensor:
    """True for keys that lie after the query."""
    i = torch.arange(x.shape[dim], device=x.device)
    return i[None, :] > i[:, None]


def causal(x: Tensor, dim: int = 2) -> Tensor:
    low = torch.finfo(torch.float32).min
    return torch.where(later(x, dim), low, torch.zeros((), device=x.device))


def window(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[2], device=x.device)
    keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    return torch.where(keep, 0.0, -math.inf).to(x.dtype)


def present(x: Tensor, padding: Tensor, low: float = torch.finfo(torch.float32).min) -> Tensor:
    return torch.where(absent(x, padding), low, torch.zeros((), device=x.device))


def absent(x: Tensor, padding: Tensor) -> Tensor:
    return later(x) | (padding[:, None, None, :] == 0)


def capped(scores: Tensor) -> Tensor:
    return torch.tanh(scores / CAP) * CAP


def weigh(scores: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def column_of(sinks: Tensor, q: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)


def sink(scores: Tensor, column: Tensor, v: Tensor) -> Tensor:  # gpt-oss
    joined = torch.cat([scores, column], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return F.dropout(weights, 0.1, training=False).to(v.dtype) @ v
