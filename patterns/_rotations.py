"""Rotary embeddings of x [B, H, S, D] as models write them, and others that only look like one."""

from __future__ import annotations

import torch
from torch import Tensor

D = 8  # lanes of a head


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama."""
    return x * cos + rotate_half(x) * sin


def half_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(sin, rotate_half(x)), cos.mul(x))


def half_chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written by hand, with half-width tables."""
    x1, x2 = x.chunk(2, dim=-1)
    c, s = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def half_float(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(x.float(), cos.float(), sin.float()).to(x.dtype)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-NeoX: the first half of the lanes only."""
    r = D // 2
    turned, rest = x[..., :r], x[..., r:]
    return torch.cat([half(turned, cos[..., :r], sin[..., :r]), rest], dim=-1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J, Cohere."""
    return x * cos + rotate_interleaved(x) * sin


def interleaved_repeated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GLM: half-width tables, each entry twice."""
    c, s = (t[..., : D // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return x * c + rotate_interleaved(x) * s


def strided_stores(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan in diffusers."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * c - x2 * s
    out[..., 1::2] = x1 * s + x2 * c
    return out.type_as(x)


def paired(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs in a dimension of their own."""
    x1, x2 = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    c, s = cos[..., : D // 2], sin[..., : D // 2]
    return torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).flatten(3)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama 4, Flux, Qwen-Image: pairs as complex numbers."""
    table = torch.polar(torch.ones_like(cos[..., ::2], dtype=torch.float32), sin[..., ::2].float())
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def complex_of_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(table * pairs).flatten(-2).to(x.dtype)


def other_way_round(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """nanochat: by -sin."""
    return x * cos - rotate_half(x) * sin


def added_products(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Negated by a multiplication, summed by addcmul."""
    x1, x2 = x.tensor_split(2, dim=-1)
    turned = torch.cat((x2 * -1, x1), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


def split_by_size(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.split(split_size=D // 2, dim=-1)
    return x * cos + torch.cat((x2 / -1, x1), dim=-1) * sin


def reshaped_as(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoFormer: tables repeated for neighbours, reshaped to something else's shape."""
    c, s = (torch.stack([t[..., : D // 2]] * 2, dim=-1).reshape_as(cos) for t in (cos, sin))
    return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape_as(x) * s


def repeated_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-width tables, written twice and made as large as what they rotate."""
    c, s = (t[..., : D // 2].repeat(1, 1, 1, 2).expand(x.shape) for t in (cos, sin))
    return x * c + rotate_half(x) * s


def filled_by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    r = D // 2
    out[..., :r] = x[..., :r] * cos[..., :r] - x[..., r:] * sin[..., :r]
    out[..., r:] = x[..., r:] * cos[..., r:] + x[..., :r] * sin[..., r:]
    return out


def pair_matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """[1, 1, S, D / 2, 2, 2], or with the heads after the positions: numbers that need not be a rotation's."""
    c, s = cos[..., : D // 2], sin[..., : D // 2]
    return torch.stack([c, -0.7 * s, s, 1.5 * c], dim=-1).unflatten(-1, (2, 2))[0].unsqueeze(0)


def matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Kandinsky 5: a matrix for each pair."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pair_matrices(cos, sin) * pairs).sum(dim=-1).flatten(3).type_as(x)


def matrices_by_column(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """PRX, Flux's first version."""
    table, pairs = pair_matrices(cos, sin), x.reshape(*x.shape[:-1], -1, 1, 2)
    out = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
    return out.reshape(x.shape).to(x.dtype)


def matrices_of_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    (a, b), (c, d) = ((row[..., 0], row[..., 1]) for row in pair_matrices(cos, sin).unbind(-2))
    return torch.cat([a * x1 - b * x2, d * x2 - c * x1], dim=-1).to(x.dtype)


def matrices_of_each_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = pair_matrices(cos, sin)
    shape = [2 if size == 2 and axis in (1, 2) else 1 for axis, size in enumerate(x.shape)]
    table = table * torch.arange(1.0, 3.0).view(*shape, 1, 1).to(x.dtype)
    return (table * x.reshape(*x.shape[:-1], -1, 1, 2)).sum(-1).flatten(3).to(x.dtype)


def matrices_of_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The second element of the pair before."""
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
    pairs = torch.stack([pairs[..., 0], pairs[..., 1].roll(1, -2)], -1)
    return (pair_matrices(cos, sin) * pairs).sum(-1).flatten(3).to(x.dtype)


def reflection(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """No rotation, but a matrix for each pair all the same."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((x2, x1), dim=-1) * sin


def complex_conjugate_of_data(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(table * pairs.conj()).flatten(-2).to(x.dtype)


def complex_parts_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    table = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(table * pairs).flip(-1).flatten(-2).to(x.dtype)


def negated_by_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((x2 * -1, x1), dim=-1), sin, value=2)


def halved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((x2 * -2, x1), dim=-1) * sin


def scaled_sum(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(x * cos, rotate_half(x) * sin, alpha=2)


def wrong_dim(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates along another dimension than the head's."""
    x1, x2 = x[:, :1], x[:, 1:]
    return x * cos + torch.cat((-x2, x1), dim=1) * sin


def no_minus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((x2, x1), -1) * sin


def reversed_pass(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = D // 2
    return torch.cat([half(x[..., r:], cos[..., :r], sin[..., :r]), x[..., :r]], dim=-1)


def latent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek: the last lanes only."""
    r = D // 2
    return torch.cat([x[..., :r], half(x[..., r:], cos[..., :r], sin[..., :r])], dim=-1)


def twice_written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, _ = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.zeros_like(x)
    out[..., 0::2] = x1 * cos[..., 0::2]
    return out
