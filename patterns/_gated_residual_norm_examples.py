"""Spellings and near misses of residual sum, norm and modulation, as models write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.rewrite.pattern import Example

B, S, C = 2, 5, 16


class Weights(nn.Module):
    """What a spelling may use: two linear layers that give its terms, two that read its results, norms' weights."""

    def __init__(self, spelling: Callable[[Weights, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.left, self.right = (nn.Linear(C, C) for _ in range(4))
        self.w1, self.w2 = (nn.Parameter(1 + 0.1 * torch.randn(C)) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(0.1 * torch.randn(C)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(1, 6, C) / C**0.5)
        self.spelling = spelling

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        return self.spelling(self, x, condition)

    def layer(self, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, (C,), self.w1, self.b1, eps)

    def layer2(self, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, (C,), self.w2, self.b2, eps)

    def rms(self, x: Tensor) -> Tensor:
        """Llama."""
        wide = x.float()
        return self.w1 * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def gemma(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (out * (1.0 + weight.float())).type_as(x)

    def bare(self, x: Tensor) -> Tensor:
        """diffusers' FP32LayerNorm without weights."""
        return F.layer_norm(x.float(), (C,), None, None, 1e-6).to(x.dtype)


def llama(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = x + m.one(x)
    return r + m.left(m.rms(r))


def llama_rms_call(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x
    return r, m.left(F.rms_norm(r, (C,), m.w1, 1e-6))


def gemma_sandwich(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = x + m.gemma(m.one(x), m.w2)
    return r + m.left(m.gemma(r, m.w1))


def neox_parallel(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + m.two(x) + x
    return m.left(m.layer(r)) + m.right(m.layer2(r)) + r


def neox_right_association(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = x + (m.one(x) + m.two(x))
    return m.left(m.layer(r)) + m.right(m.layer2(r)) + r


def last_norm(m: Weights, x: Tensor, _: Tensor) -> Any:
    return m.left(m.layer(x + m.one(x)))


def bert_post_norm(m: Weights, x: Tensor, _: Tensor) -> Any:
    x = m.layer(F.dropout(m.one(x), 0.1, False) + x)
    return m.layer2(m.left(x) + x)


def subtracted_and_scaled(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = torch.sub(torch.add(x, m.one(x), alpha=2), m.two(x) * 0.5)
    return r, m.left(m.layer(r))


def flat(m: Weights, x: Tensor, _: Tensor) -> Any:
    x = x.flatten(0, 1)
    r = x + m.one(x) * m.w2
    return r, m.left(m.layer(r))


def wan_self_attention(m: Weights, x: Tensor, condition: Tensor) -> Any:
    gate = (m.table + condition.float()).chunk(6, dim=1)[2]
    r = (x.float() + m.one(x) * gate).type_as(x)
    h = F.layer_norm(r.float(), (C,), m.w1.float(), m.b1.float(), 1e-6).to(torch.float32).type_as(r)
    return r + m.left(h)


def wan_feed_forward(m: Weights, x: Tensor, condition: Tensor) -> Any:
    shift, scale, gate, *_ = (m.table + condition.float()).chunk(6, dim=1)
    r = (x.float() + m.one(x).float() * gate).type_as(x)
    h = (m.bare(r.float()) * (1 + scale) + shift).type_as(r)
    return r + m.left(h)


def wan_first(m: Weights, x: Tensor, condition: Tensor) -> Any:
    shift, scale, *_ = (m.table + condition.float()).chunk(6, dim=1)
    return x + m.left((m.bare(x.float()) * (1 + scale) + shift).type_as(x))


def sd3(m: Weights, x: Tensor, condition: Tensor) -> Any:
    gate, scale, shift = condition[:, 0], condition[:, 1], condition[:, 2]
    r = x + gate.unsqueeze(1) * m.one(x)
    return r + m.left(m.bare(r) * (1 + scale[:, None]) + shift[:, None])


def addcmul_gate_and_shift(m: Weights, x: Tensor, condition: Tensor) -> Any:
    gate, scale, shift = (condition[:, i : i + 1] for i in range(3))
    r = torch.addcmul(x, m.one(x), gate)
    return r, m.left(torch.addcmul(shift, m.bare(r), scale + 1))


def scale_alone(m: Weights, x: Tensor, condition: Tensor) -> Any:
    r = x + m.one(x)
    return r, m.left(m.rms(r) * (1.0 + condition[:, :1]))


def gate_per_token(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = x + m.one(x) * m.two(x)[..., :1] + m.right(x) * m.right.weight[0, 0].tanh()
    return r, m.left(m.layer(r))


def modulation_per_token(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = x + m.one(x) * m.two(x)
    return r, m.left(m.bare(r) * (1 + m.two(x)) + m.right(x))


def wide_stream(m: Weights, x: Tensor, _: Tensor) -> Any:
    """A residual stream in fp32 around layers in the model's dtype."""
    r = x.float() + m.one(x)
    return r, m.left(m.layer(r.to(x.dtype)))


_SPELLINGS = (
    llama, llama_rms_call, gemma_sandwich, neox_parallel, neox_right_association, last_norm, bert_post_norm,
    subtracted_and_scaled, flat, wan_self_attention, wan_feed_forward, wan_first, sd3, addcmul_gate_and_shift,
    scale_alone, gate_per_token, modulation_per_token, wide_stream,
)  # fmt: skip


def other_eps(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x
    return m.left(m.layer(r)) + m.right(m.layer2(r, 1e-3)) + r


def written_in_place(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x
    r.mul_(1.5)
    return m.left(m.layer(r)), r


def wide_term_written_between(m: Weights, x: Tensor, _: Tensor) -> Any:
    """What is written is the term's cast, where that is a copy."""
    y = m.one(x)
    wide = y.double() if y.dtype == torch.float32 else y.float()
    wide.mul_(2)
    r = x + wide.to(x.dtype)
    return r, m.left(m.layer(r)), y, wide


def term_written_between(m: Weights, x: Tensor, _: Tensor) -> Any:
    y = m.one(x)
    r = y + x
    y.mul_(1.5)
    return m.left(m.layer(r)), r, y


def added_in_place(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x)
    r += x
    return m.left(m.layer(r)), r


def partial_sum_returned(m: Weights, x: Tensor, _: Tensor) -> Any:
    both = m.one(x) + m.two(x)
    r = both + x
    return m.left(m.layer(r)), both


def broadcast_stream(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x[:, :1]
    return m.left(m.layer(r)), r


def norm_over_other_dim(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = (m.one(x) + x).transpose(1, 2)
    return F.layer_norm(r, (S,)), r


def two_dims(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x
    return m.left(F.layer_norm(r, (S, C)))


def scale_without_one(m: Weights, x: Tensor, condition: Tensor) -> Any:
    r = m.one(x) + x
    return r, m.left(m.bare(r) * condition[:, :1] + condition[:, 1:2])


def scale_and_two(m: Weights, x: Tensor, condition: Tensor) -> Any:
    r = m.one(x) + x
    return r, m.left(torch.add(m.bare(r), m.bare(r) * (2 + condition[:, :1]), alpha=2))


def normalised_value_returned(m: Weights, x: Tensor, condition: Tensor) -> Any:
    r = m.one(x) + x
    h = m.bare(r)
    return r, h, m.left(h * (1 + condition[:, :1]))


def step_returned(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = m.one(x) + x
    wide = r.float()
    rsqrt = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return r, rsqrt, m.left(m.w1 * (wide * rsqrt).to(x.dtype))


def unrounded_sum(m: Weights, x: Tensor, _: Tensor) -> Any:
    """The stream is rounded, the norm reads what was not."""
    total = x.float() + m.one(x).float()
    return total.to(x.dtype), m.left(m.layer(total.to(x.dtype))) + total.mean().to(x.dtype)


def lerped(m: Weights, x: Tensor, _: Tensor) -> Any:
    r = torch.lerp(x, m.one(x), 0.25)
    return r, m.left(m.layer(r))


_NEAR_MISSES = (
    other_eps, written_in_place, wide_term_written_between, term_written_between, added_in_place, partial_sum_returned,
    broadcast_stream, norm_over_other_dim, two_dims, scale_without_one, scale_and_two, normalised_value_returned,
    step_returned, unrounded_sum, lerped,
)  # fmt: skip


def _example(spelling: Callable[[Weights, Tensor, Tensor], Any], fuses: bool) -> Example:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        inputs = (torch.randn(B, S, C, dtype=dtype), torch.randn(B, 6, C, dtype=dtype))
        return Weights(spelling).to(dtype), tuple(x.requires_grad_() for x in inputs)

    return Example(spelling.__name__, make, fuses)


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    return (_example(spelling, True) for spelling in _SPELLINGS)


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern may fire on them only if the result stays right."""
    return (_example(spelling, False) for spelling in _NEAR_MISSES)
