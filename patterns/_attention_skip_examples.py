"""Spellings and near misses of an attention's projection combined with a skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.rewrite.pattern import Example

B, S, C, HEADS = 2, 5, 16, 2
Spelling = Callable[["Block", Tensor, Tensor, Tensor], Any]


class Block(nn.Module):
    """Self-attention with an output projection; `spelling(block, x, attention, t)` combines them."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.qkv, self.proj, self.next = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, C)
        self.bare = nn.Linear(C, C, bias=False)
        self.gates = nn.Linear(C, C)
        self.conv1d = nn.Parameter(torch.randn(C, C) / C**0.5)
        self.scale = nn.Parameter(torch.randn(C))
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.spelling = spelling

    def forward(self, x: Tensor, t: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, C // HEADS)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.spelling(self, x, attention, t)


def per_sample(value: Tensor) -> Tensor:
    return value[:, None, None]


def edm(t: Tensor, sigma: float = 0.5) -> tuple[Tensor, Tensor]:
    """EDM's and rCM's coefficients."""
    return per_sample(sigma**2 / (t**2 + sigma**2)), per_sample(sigma * t / (t**2 + sigma**2) ** 0.5)


def trigflow(t: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cos(t) + torch.sin(t)
    return per_sample(1 / both), per_sample(-torch.sin(t) / both)


def rcm(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    skip, out = edm(t)
    return (skip * x + out * m.proj(y)).to(x.dtype)


def rcm_trigflow(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    skip, out = trigflow(t)
    return (m.proj(y) * out + x * skip).type_as(x)


def trigflow_divided(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return ((x.float() - per_sample(torch.sin(t)) * m.proj(y)) / per_sample(1.5 + torch.cos(t))).to(x.dtype)


def wide_result(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    skip, out = edm(t)
    return skip.float() * x + out.float() * m.proj(y)


def cast_coefficients(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    skip, out = (c.to(x.dtype) for c in edm(t))
    return m.next(torch.mul(skip, x).add(torch.mul(m.proj(y), out)))


def dit_gate(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + m.gates(t[:, None] * m.scale).unsqueeze(1) * m.proj(y)


def wan_gate(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return (x.float() + m.proj(y).float() * per_sample(t).float()).type_as(x)


def layer_scale(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return m.proj(y).mul(m.scale) + x


def per_token(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.sigmoid(m.gates(x)[..., :1]) * m.proj(y) + x


def full_gate(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + torch.sigmoid(m.gates(x)) * m.proj(y)


def tanh_gate(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.addcmul(x, m.proj(y), m.alpha.tanh())


def addcmul_value(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.addcmul(x * 0.5, per_sample(t), m.proj(y), value=-2)


def numbers(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.add(0.7 * x, F.dropout(m.proj(y), 0.0, True), alpha=0.3)


def halved(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return (x + m.proj(y)) / 2


def difference(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.rsub(m.proj(y) * per_sample(t), x, alpha=2), -(m.bare(y) / 3) - x


def nested_factors(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x * m.scale * per_sample(t) * 0.5 + m.scale * (m.proj(y) * per_sample(t))


def lerp(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.lerp(x, m.proj(y), per_sample(t.sigmoid()))


def lerp_back(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return m.proj(y).lerp(x, 0.75)


def written_out_lerp(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + (per_sample(t) * (m.proj(y) - x)).to(x.dtype), torch.addcmul(x, x - m.bare(y), per_sample(t))


def written_out_lerp_back(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    h = m.proj(y)
    return h + 0.25 * (x - h)


def complement(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    gate = per_sample(torch.sigmoid(t))
    return gate * x + (1 - gate) * m.proj(y)


def product_and_bias(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x - per_sample(t) * (y @ m.bare.weight.T + m.scale)


def conv1d(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    flat = torch.addmm(m.scale, y.view(-1, y.size(-1)), m.conv1d)
    return x + per_sample(t) * F.dropout(flat.view(x.size()), 0.1, False)


def flat(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    x = x.flatten(0, 1)
    return x * m.scale - m.proj(y.flatten(0, 1))


def norm_of_a_scaled_skip(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    r = per_sample(t) * x + 0.5 * m.proj(y)
    return r, m.next(F.layer_norm(r, (C,)))


_SPELLINGS = (
    rcm, rcm_trigflow, trigflow_divided, wide_result, cast_coefficients, dit_gate, wan_gate, layer_scale, per_token,
    full_gate, tanh_gate, addcmul_value, numbers, halved, difference, nested_factors, lerp, lerp_back,
    written_out_lerp, written_out_lerp_back, complement, product_and_bias, conv1d, flat, norm_of_a_scaled_skip,
)  # fmt: skip


def plain_sum(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + m.proj(y)


def norm_follows(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    r = x + per_sample(t) * m.proj(y)
    return r, m.next(F.layer_norm(r, (C,), m.scale))


def no_projection(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + per_sample(t) * y


def projection_read_again(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    h = m.proj(y)
    return x + per_sample(t) * h, h.mean()


def product_read_again(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    h = per_sample(t) * m.proj(y)
    return x + h, h * 2


def sum_read_unrounded(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    r = x.float() + per_sample(t).float() * m.proj(y)
    return r.to(x.dtype), r.mean()


def dropped(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + per_sample(t) * F.dropout(m.proj(y), 0.5, True)


def activated(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + per_sample(t) * F.relu(m.proj(y))


def broadcast_skip(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x[:, :1] * per_sample(t) + m.proj(y)


def gate_along_tokens(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return (x.transpose(1, 2) + per_sample(t) * m.proj(y).transpose(1, 2)) * 2


def gate_by_projection(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    h = m.proj(y)
    return x + h * torch.sigmoid(h)


def other_end_in_lerp(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return m.bare(x) + per_sample(t) * (m.proj(y) - x)


def lerp_of_broadcast(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return torch.lerp(x[:, :1], m.proj(y), 0.25)


def rounded_below(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    """What the graph loses on purpose stays lost."""
    return x + per_sample(t) * m.proj(y).bfloat16()


def scaled_in_place(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return m.proj(y).mul_(per_sample(t)).add_(x)


def skip_written_between(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    x = x * 1
    r = 0.5 * x
    x.mul_(2)
    return r + per_sample(t) * m.proj(y), x


def wide_skip_written_between(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    """What is written is the skip's cast, where that is a copy."""
    wide = (x.detach() * 1).float()
    wide.mul_(2)
    return (wide + per_sample(t) * m.proj(y)).to(x.dtype), wide


def cast_before_the_skip_is_written(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    x = x.detach() * 1
    wide = x.float()
    h = wide.sum()
    x.mul_(2)
    return (wide + per_sample(t) * m.proj(y)).to(x.dtype), x, h


def coefficient_written_between(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    t = t.detach() * 1
    r = per_sample(t) * x.detach()
    t.add_(1)
    return r + m.proj(y), t


def result_written(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    r = x + per_sample(t) * m.proj(y)
    h = r + 1
    r.mul_(2)
    return r, h


def skip_twice(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + per_sample(t) * m.proj(y) + x * 0.5


def integer_gate(m: Block, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + m.proj(y) * (t > 0)[:, None, None]


_NEAR_MISSES = (
    plain_sum, norm_follows, no_projection, projection_read_again, product_read_again, sum_read_unrounded, dropped,
    activated, broadcast_skip, gate_along_tokens, gate_by_projection, other_end_in_lerp, lerp_of_broadcast,
    rounded_below, scaled_in_place, skip_written_between, wide_skip_written_between, cast_before_the_skip_is_written,
    coefficient_written_between, result_written, skip_twice, integer_gate,
)  # fmt: skip


def make(spelling: Spelling, dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """The block and its inputs x [B, S, C] and t [B], which need gradients."""
    t = torch.rand(B).to(dtype) + 0.25
    return Block(spelling).to(dtype), (torch.randn(B, S, C, dtype=dtype, requires_grad=True), t.requires_grad_())


def _example(spelling: Spelling, fuses: bool) -> Example:
    return Example(spelling.__name__, lambda dtype: make(spelling, dtype), fuses)


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    return (_example(spelling, True) for spelling in _SPELLINGS)


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern may fire on them only if the result stays right."""
    return (_example(spelling, False) for spelling in _NEAR_MISSES)
