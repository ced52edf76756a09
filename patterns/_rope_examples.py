"""Spellings and near misses of norm -> QKV -> RoPE -> attention, as models write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.patterns import _all_heads_examples
from torch_fuse.rewrite.pattern import Example

B, S, D = 2, 5, 8


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


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Llama: the weight after the downcast."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    out = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-6)
    return (out * (1.0 + weight.float())).type_as(x)


def rms_call(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def layer_written(x: Tensor, weight: Tensor) -> Tensor:
    """Cohere: LayerNorm without bias, by hand."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (weight.float() * ((wide - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


def rms_wrong_dim(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5))


def rms_cubed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5))


@dataclass(frozen=True)
class Layout:
    """How a block splits its projection and where it rotates."""

    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = half
    norm: Callable[[Tensor, Tensor], Tensor] | None = None
    scope: str = "head"
    kv_heads: int = 2
    fused: str = ""  # "per_head" (GPT-NeoX), "concatenated" or "" for three projections
    rotate_transposed: bool = True
    bias: bool = False
    after: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None
    between: Callable[[Tensor], None] | None = None


class Block(nn.Module):
    """One attention block, spelled as a `Layout` says."""

    heads = 2

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        width, kv = self.heads * D, layout.kv_heads * D
        if layout.fused:
            self.qkv = nn.Linear(width, width + 2 * kv, bias=layout.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n, bias=layout.bias) for n in (width, kv, kv))
        sizes = (width, kv) if layout.scope == "full" else (D, D)
        self.q_weight, self.k_weight = (nn.Parameter(1 + 0.1 * torch.randn(n)) for n in sizes)
        angles = torch.outer(torch.arange(S, dtype=torch.float32), 0.5 ** torch.arange(D // 2))
        pairs = (angles, angles)
        table = torch.stack(pairs, -1).flatten(1) if "interleaved" in layout.rotate.__name__ else torch.cat(pairs, 1)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = self.layout
        if layout.fused == "per_head":
            return self.qkv(x).view(B, S, self.heads, 3 * D).chunk(3, dim=-1)
        if layout.fused:
            q, k, v = self.qkv(x).split([self.heads * D, layout.kv_heads * D, layout.kv_heads * D], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        if layout.norm is not None and layout.scope == "full":
            q, k = layout.norm(q, self.q_weight), layout.norm(k, self.k_weight)
        return q.view(B, S, -1, D), k.view(B, S, -1, D), v.view(B, S, -1, D)

    def forward(self, x: Tensor) -> Any:
        layout = self.layout
        q, k, v = self.split(x)
        if layout.norm is not None and layout.scope == "head":
            q, k = layout.norm(q, self.q_weight), layout.norm(k, self.k_weight)
        cos, sin = self.cos.to(x.dtype)[None], self.sin.to(x.dtype)[None]
        if layout.rotate_transposed:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            if layout.between is not None:
                layout.between(q)
            q, k = layout.rotate(q, cos, sin), layout.rotate(k, cos, sin)
        else:
            cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
            q, k = (
                layout.rotate(q, cos, sin).permute(0, 2, 1, 3),
                layout.rotate(k, cos, sin).permute(0, 2, 1, 3),
            )
        v = v.transpose(1, 2)
        extra: Any = ()
        if layout.after is not None:
            q, extra = layout.after(q, k)
        if layout.kv_heads < self.heads:
            groups = self.heads // layout.kv_heads
            k, v = (t[:, :, None].expand(B, layout.kv_heads, groups, S, D).reshape(B, self.heads, S, D) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(B, S, -1), extra


def _example(name: str, fuses: bool = True, **layout: Any) -> Example:
    def make(dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        block = Block(Layout(**layout)).to(dtype)
        return block, (torch.randn(B, S, Block.heads * D, dtype=dtype, requires_grad=True),)

    return Example(name, make, fuses)


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    rotations = (half, half_swapped, half_chunked, half_float, partial, interleaved, interleaved_repeated,
                 strided_stores, paired, complex_numbers, complex_of_parts, other_way_round, added_products,
                 split_by_size, reshaped_as, repeated_tables, filled_by_hand, matrices, matrices_by_column,
                 matrices_of_halves, reflection)  # fmt: skip
    for rotate in rotations:
        yield _example(rotate.__name__, rotate=rotate)
        yield _example(f"{rotate.__name__}_before_transpose", rotate=rotate, rotate_transposed=False)
    for norm in (rms, rms_gemma, rms_call, layer_written):
        yield _example(f"{norm.__name__}_per_head", norm=norm)
    for norm in (rms, rms_call):
        yield _example(f"{norm.__name__}_over_all_heads", norm=norm, scope="full", rotate_transposed=False)
        yield _example(f"{norm.__name__}_over_all_heads_transposed", norm=norm, scope="full")
    yield _example("split_per_head", fused="per_head", rotate=partial, bias=True)
    yield _example("split_concatenated", fused="concatenated", kv_heads=1)
    yield _example("grouped_query", kv_heads=1, norm=rms)
    yield _example("key_escapes", after=lambda q, k: (q, k * 2))
    yield _example("query_escapes", after=lambda q, k: (q, q.sum()))
    yield _example("query_scaled_after_rotation", after=lambda q, k: (q * 0.7, ()))
    yield _example("query_scaled_by_position", after=_by_position)
    yield _example("query_joined_with_other_tokens", after=_joined)
    yield from _all_heads_examples.spellings()


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern may fire on them only if the result stays right."""
    for rotate in (
        scaled_sum,
        wrong_dim,
        no_minus,
        reversed_pass,
        twice_written,
        matrices_of_each_head,
        matrices_of_neighbours,
        complex_parts_swapped,
        complex_conjugate_of_data,
        negated_by_two,
        halved,
        latent,
    ):
        yield _example(rotate.__name__, False, rotate=rotate)
    for norm in (rms_wrong_dim, rms_cubed):
        yield _example(norm.__name__, False, norm=norm)
    yield from _all_heads_examples.near_misses()
    yield _example("query_mutated_before_rotation", False, between=_scale_in_place)
    yield _example("key_mutated_after_rotation", False, after=_double_in_place)


def _by_position(q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
    """Llama 4, Ministral 3: attention temperature."""
    return (q * torch.log1p(torch.arange(1, S + 1, device=q.device))[:, None]).to(q.dtype), ()


def _joined(q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
    """HunyuanVideo: more tokens, which are not rotated."""
    return torch.cat([q, q.new_ones(q.shape[0], q.shape[1], 2, D)], dim=2)[:, :, :S, :], ()


def _scale_in_place(x: Tensor) -> None:
    x.mul_(1.5)


def _double_in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
    k.mul_(2.0)
    return q, ()
