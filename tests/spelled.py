"""An attention block whose spelling, sizes and one deliberate mistake are drawn by the property tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


@dataclass(frozen=True)
class Spelling:
    """How a block is written. `Block` says what each choice means.

    Attributes:
        mutation: name of the one thing that is wrong or unusual, or "" (see `MUTATIONS`).
    """

    batch: int = 2
    length: int = 5
    kv_heads: int = 2
    groups: int = 1
    head_dim: int = 8
    rotary_dim: int = 8
    interleaved: bool = False
    table: str = "full"  # "full" or "half" width
    rotation: str = "cat"  # "cat", "parts", "stores" or "float"
    norm: str = "none"  # "none", "rms", "rms_call", "gemma", "layer"
    norm_over: str = "head"  # "head" or "all"
    projection: str = "separate"  # "separate", "concatenated", "per_head" or "stacked"
    bias: bool = False
    rotate_transposed: bool = True
    contiguous: bool = False
    strided_input: bool = False
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    mutation: str = ""

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv_heads * self.groups


# Each breaks the equation, the order of effects or the numerics that the pattern stands on, in one place.
MUTATIONS = [
    "alpha_2", "sub_for_add", "no_minus", "swapped_tables", "sine_scaled", "pairs_along_sequence",
    "query_table_of_other_positions", "key_table_of_other_positions", "key_rotated_backwards",
    "other_eps_for_key", "mean_over_other_dim", "norm_of_key_only", "cubed",
    "query_scaled_after", "key_scaled_after", "lane_overwritten", "rounded_between", "detached_between",
    "intermediate_returned", "rotated_key_returned", "rotated_key_flattened_and_doubled", "key_flattened_in_place",
    "mutated_before", "mutated_inside", "mutated_between_query_and_key", "mutated_after", "alias_mutated_inside",
    "table_mutated_between", "learned_tables", "per_head_tables",
    "grad_off_inside", "autocast_inside",
]  # fmt: skip


class Block(nn.Module):
    """Projection, norm, RoPE and attention, written as a `Spelling` says."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        s = self.s = spelling
        width, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        if s.projection == "separate":
            self.q, self.k, self.v = (nn.Linear(width, n, bias=s.bias) for n in (width, kv, kv))
        else:
            self.qkv = nn.Linear(width, width + 2 * kv, bias=s.bias)
        over_all = s.norm_over == "all"
        sizes = (width, kv) if over_all else (s.head_dim, s.head_dim)
        self.q_weight, self.k_weight = (nn.Parameter(1 + 0.1 * torch.randn(n)) for n in sizes)
        self.out = nn.Linear(width, 4)
        angles = torch.outer(torch.arange(s.length + 1.0), 0.5 ** torch.arange(s.rotary_dim // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        if s.mutation == "learned_tables":
            self.cos, self.sin = nn.Parameter(self.cos), nn.Parameter(self.sin)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Any:
        s, mutation = self.s, self.s.mutation
        q, k, v = self._project(x)
        q, k = self._normalise(q, k, v)
        if s.rotate_transposed:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if mutation in ("mutated_before", "mutated_inside", "alias_mutated_inside"):
            q, k = q + 0, k + 0  # the parts of a split may not be written to
        if mutation == "mutated_before":
            q.mul_(1.5)
        if mutation == "rounded_between":
            q = q.bfloat16().to(q.dtype)
        if mutation == "detached_between":
            q = q.detach()
        extra: list[Tensor] = []
        q_table = k_table = self._tables(0, k)
        if mutation == "query_table_of_other_positions":
            q_table = self._tables(1, k)
        if mutation == "key_table_of_other_positions":
            k_table = self._tables(1, k)
        q = self._rotate(q, *q_table, extra)
        if mutation == "mutated_between_query_and_key":
            q.mul_(1.5)
        if mutation == "table_mutated_between":
            k_table[0].mul_(1.5)
        cos, sin = k_table
        grad_off = torch.no_grad() if mutation == "grad_off_inside" else nullcontext()
        lowers = mutation == "autocast_inside" and x.dtype != torch.float64
        autocast = torch.autocast("cpu", torch.bfloat16) if lowers else nullcontext()
        with grad_off, autocast:
            k = self._rotate(k, cos, -sin if mutation == "key_rotated_backwards" else sin, [])
        if mutation == "query_scaled_after":
            q = q * 1.5
        if mutation == "key_scaled_after":
            k = k * 1.5
        if not s.rotate_transposed:
            q, k = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3)
        if s.contiguous:
            q, k = q.contiguous(), k.contiguous()
        if mutation == "mutated_after":
            k.mul_(1.5)
        if mutation == "lane_overwritten":
            k = k.clone()
            k[..., 0] = 0.0
        if mutation == "rotated_key_returned":
            extra.append(k * 2)
        if mutation in ("rotated_key_flattened_and_doubled", "key_flattened_in_place"):
            flat = k.transpose(1, 2).reshape(s.batch, s.length, -1)
            flat = flat.mul_(2.0) if mutation == "key_flattened_in_place" else flat * 2
            extra.append(flat.sum(-1))
        v = v.transpose(1, 2)
        if s.groups > 1:
            k, v = (
                t[:, :, None].expand(-1, -1, s.groups, -1, -1).reshape(s.batch, s.heads, -1, s.head_dim) for t in (k, v)
            )
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        return self.out(out.transpose(1, 2).reshape(s.batch, out.shape[2], -1)), extra

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.s
        width, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        if s.projection == "per_head":  # GPT-NeoX
            q, k, v = self.qkv(x).view(*x.shape[:2], s.heads, 3 * s.head_dim).chunk(3, dim=-1)
            return q, k, v
        if s.projection == "stacked":  # OpenAI's and timm's
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, s.heads, s.head_dim).unbind(2)
            return q, k, v
        if s.projection == "concatenated":
            q, k, v = self.qkv(x).split([width, kv, kv], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        shape = (*x.shape[:2], -1, s.head_dim)
        if s.norm != "none" and s.norm_over == "all":
            q, k = self._norm(q, self.q_weight), self._norm(k, self.k_weight)
        return q.view(shape), k.view(shape), v.view(shape)

    def _normalise(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s
        if s.norm == "none" or s.norm_over == "all":
            return q, k
        if s.mutation != "norm_of_key_only":
            q = self._norm(q, self.q_weight)
        return q, self._norm(k, self.k_weight, 100 * EPS if s.mutation == "other_eps_for_key" else EPS)

    def _norm(self, x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
        s = self.s
        wide, dim = x.float(), -1
        if s.mutation == "mean_over_other_dim":
            dim = 1
        power = 4 if s.mutation == "cubed" else 2
        if s.norm == "rms_call" and dim == -1 and power == 2:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        if s.norm == "layer":  # Cohere: LayerNorm without bias
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.pow(power).mean(dim, keepdim=True) + eps)
        if s.norm == "gemma":
            return (normed * (1.0 + weight.float())).to(x.dtype)
        return weight * normed.to(x.dtype)

    def _tables(self, start: int, like: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s
        tables = []
        for table in (self.cos, self.sin):
            rows = table[start : start + s.length].to(like.dtype)  # type: ignore[index]
            if s.table == "full":
                rows = rows.repeat_interleave(2, dim=-1) if s.interleaved else torch.cat((rows, rows), dim=-1)
            rows = rows.clone()[None, None] if s.rotate_transposed else rows.clone()[None, :, None]
            if s.mutation == "per_head_tables" and s.groups == 1:
                heads = like.shape[1] if s.rotate_transposed else like.shape[2]
                factor = torch.arange(1, heads + 1, dtype=like.dtype) / heads
                rows = rows * (factor[:, None, None] if s.rotate_transposed else factor[:, None])
            tables.append(rows)
        return tables[0], tables[1]

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor, extra: list[Tensor]) -> Tensor:
        s, mutation = self.s, self.s.mutation
        if mutation == "swapped_tables":
            cos, sin = sin, cos
        if mutation == "sine_scaled":
            sin = sin * 1.5
        turned, rest = x[..., : s.rotary_dim], x[..., s.rotary_dim :]
        if s.rotation == "float":
            turned = self._turn(turned.float(), cos.float(), sin.float(), x, extra).to(x.dtype)
        else:
            turned = self._turn(turned, cos, sin, x, extra)
        return torch.cat((turned, rest), dim=-1) if s.rotary_dim < s.head_dim else turned

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, whole: Tensor, extra: list[Tensor]) -> Tensor:
        s, mutation = self.s, self.s.mutation
        if s.rotation in ("parts", "stores"):
            return self._turn_parts(x, cos, sin, whole, extra)
        if s.table == "half":
            cos, sin = (
                t.repeat_interleave(2, dim=-1) if s.interleaved else torch.cat((t, t), dim=-1) for t in (cos, sin)
            )
        first = x * cos
        self._meddle(first, whole, extra)
        dim = (2 if s.rotate_transposed else 1) if mutation == "pairs_along_sequence" else -1
        if s.interleaved and dim == -1:
            x1, x2 = x[..., ::2], x[..., 1::2]
            second = torch.stack((x2 if mutation == "no_minus" else -x2, x1), dim=-1).flatten(-2)
        else:
            x1, x2 = x.chunk(2, dim=dim) if x.shape[dim] > 1 else (x, x[..., :0])
            second = torch.cat((x2 if mutation == "no_minus" else -x2, x1), dim=dim)
        second = second * sin
        if mutation == "alpha_2":
            return torch.add(first, second, alpha=2)
        return first - second if mutation == "sub_for_add" else first + second

    def _turn_parts(self, x: Tensor, cos: Tensor, sin: Tensor, whole: Tensor, extra: list[Tensor]) -> Tensor:
        s, mutation = self.s, self.s.mutation
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1) if s.interleaved else x.chunk(2, dim=-1)
        if s.table == "full":
            half = s.rotary_dim // 2
            cos, sin = (t[..., ::2] if s.interleaved else t[..., :half] for t in (cos, sin))
        one = x1 * cos
        self._meddle(one, whole, extra)
        cross: Callable[..., Tensor] = torch.add if mutation in ("no_minus", "sub_for_add") else torch.sub
        alpha = 2 if mutation == "alpha_2" else 1
        one = cross(one, x2 * sin, alpha=alpha)
        two = x2 * cos + x1 * sin
        if s.rotation == "stores":  # Wan
            out = torch.empty_like(x)
            if s.interleaved:
                out[..., 0::2], out[..., 1::2] = one, two
            else:
                out[..., : s.rotary_dim // 2], out[..., s.rotary_dim // 2 :] = one, two
            return out
        return torch.stack((one, two), dim=-1).flatten(-2) if s.interleaved else torch.cat((one, two), dim=-1)

    def _meddle(self, product: Tensor, whole: Tensor, extra: list[Tensor]) -> None:
        """What may happen half-way through a rotation."""
        if self.s.mutation == "intermediate_returned":
            extra.append(product * 3)
        if self.s.mutation == "mutated_inside":
            whole.mul_(1.5)
        if self.s.mutation == "alias_mutated_inside":
            whole[..., :1].add_(1.0)


def make_input(s: Spelling) -> Tensor:
    """The block's input, with or without strides of its own."""
    width = s.heads * s.head_dim
    if s.strided_input:
        return torch.randn(s.length, s.batch, 2 * width, dtype=s.dtype)[..., ::2].transpose(0, 1).requires_grad_()
    return torch.randn(s.batch, s.length, width, dtype=s.dtype, requires_grad=True)
