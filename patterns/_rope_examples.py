"""Spellings and near misses of norm -> QKV -> RoPE -> attention, as models write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.patterns import _all_heads_examples
from torch_fuse.patterns._rotations import (
    D,
    added_products,
    complex_conjugate_of_data,
    complex_numbers,
    complex_of_parts,
    complex_parts_swapped,
    filled_by_hand,
    half,
    half_chunked,
    half_float,
    half_swapped,
    halved,
    interleaved,
    interleaved_repeated,
    latent,
    matrices,
    matrices_by_column,
    matrices_of_each_head,
    matrices_of_halves,
    matrices_of_neighbours,
    negated_by_two,
    no_minus,
    other_way_round,
    paired,
    partial,
    reflection,
    repeated_tables,
    reshaped_as,
    reversed_pass,
    scaled_sum,
    split_by_size,
    strided_stores,
    twice_written,
    wrong_dim,
)
from torch_fuse.rewrite.pattern import Example

B, S = 2, 5


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
