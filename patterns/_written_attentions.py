"""Attention of q, k and v [B, H, S, D] written out in the ways that libraries write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 3, 9, 8
SCALE = 0.3


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, dim=-1) @ v


def causal(x: Tensor) -> Tensor:
    """True for keys that lie after the query."""
    i = torch.arange(S, device=x.device)
    return i[None, :] > i[:, None]


def float_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.1, training=False) @ v


def everything_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-J
    scores = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores *= SCALE
    scores = scores.masked_fill_(causal(q), -math.inf)
    return scores.softmax(-1) @ v


def written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(causal(q), -math.inf)
    return scores.softmax(-1) @ v


def written_to_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores.mul_(SCALE)
    scores.masked_fill_(causal(q), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 1, H, S, D).reshape(B, H, S, D) for x in (k, v))
    return plain(q, k, v)


def reshaped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # BART, BLOOM
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, S, S)
    weights = scores.masked_fill(causal(q), torch.finfo(q.dtype).min)
    return torch.bmm(weights.softmax(-1).view(B * H, S, S), v).view(B, H, S, D)


def bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


def beta_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # diffusers
    empty = torch.empty(B * H, S, S, dtype=q.dtype, device=q.device)
    return torch.bmm(torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE).softmax(dim=-1), v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S, device=q.device)
    keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    scores = q @ k.mT * SCALE
    return (scores + torch.where(keep, 0.0, -math.inf).to(q.dtype)).softmax(-1) @ v


def mask_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(S, S, device=q.device).masked_fill(causal(q), torch.finfo(torch.float32).min)
    return (q @ k.mT * SCALE + mask).softmax(-1).to(v.dtype) @ v


def mask_scaled(q: Tensor, k: Tensor, v: Tensor, factor: float = 0.25) -> Tensor:  # CodeGen
    mask = torch.zeros(S, S, device=q.device).masked_fill(causal(q), torch.finfo(torch.float32).min)
    return ((q.float() @ k.float().mT + mask) * factor).softmax(-1).to(v.dtype) @ v


def padding_scaled(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.where(later_or_absent(q, padding), torch.finfo(torch.float32).min, torch.zeros((), device=q.device))
    return ((q.float() @ k.float().mT + mask) / 3).softmax(-1).to(v.dtype) @ v


def times_keys(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:  # GPT
    scores = q @ k.mT * SCALE
    return (scores * kept + -1e4 * (1 - kept)).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-2
    low = torch.full([], -math.inf, dtype=q.dtype, device=q.device)
    return torch.where(~causal(q), q @ k.mT / 3.0, low).softmax(-1) @ v


def old_bert(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-10000 is no mask but a bias: it is added exactly."""
    late = (torch.arange(S, device=q.device) > 5).to(q.dtype)
    return (q @ k.mT * SCALE + late * -10000.0).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def bias_and_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (bias[0] + q @ k.mT).masked_fill(causal(q), -math.inf).softmax(-1) @ v


def bias_scaled_with_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def bias_cast_up(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q.float() @ k.float().mT) * SCALE + bias.float()).softmax(-1).type_as(v) @ v


def later_or_absent(q: Tensor, padding: Tensor) -> Tensor:
    return causal(q) | (padding[:, None, None, :] == 0)


def padding_added(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, low: float | None = None) -> Tensor:
    low = torch.finfo(torch.float32).min if low is None else low
    mask = torch.where(later_or_absent(q, padding), low, torch.zeros((), device=q.device))
    return (q @ k.mT * SCALE + mask).softmax(-1).to(v.dtype) @ v


def padding_added_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return padding_added(q, k, v, padding, -math.inf)


def padding_filled(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, low: float | None = None) -> Tensor:
    low = torch.finfo(q.dtype).min if low is None else low
    scores = (q @ k.mT * SCALE).masked_fill(causal(q), low)
    return scores.masked_fill(padding[:, None, None, :] == 0, low).softmax(-1) @ v


def padding_written(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:  # XLM
    scores = (q * SCALE) @ torch.cat([torch.tensor([], dtype=q.dtype), k], dim=-2).transpose(2, 3)
    mask = (padding == 0).view(B, 1, 1, S).expand_as(scores)
    scores.masked_fill_(mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).type_as(scores) @ v


def padding_filled_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return padding_filled(q, k, v, padding, -math.inf)


def padding_and_bias(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + bias
    return scores.masked_fill(later_or_absent(q, padding), torch.finfo(q.dtype).min).softmax(-1) @ v


def padding_where(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return torch.where(later_or_absent(q, padding), torch.finfo(q.dtype).min, q @ k.mT).softmax(-1) @ v
