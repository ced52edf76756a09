"""Wan's transformer block in the numerics that its implementations have, each written down from what it computes.

h = norm(x) * (1 + scale) + shift;  x = x + gate * out(attention(rope(norm(q h)), rope(norm(k h)), v h))
x = x + out(attention(norm(q norm(x)), norm(k text), v text));  x = x + gate * mlp(norm(x) * (1 + scale) + shift)

The implementations differ in where they round: the rotation in float32 by stores or in float64 by complex numbers, the
residual stream in the weights' type or in float32 (under autocast), the gate rounded or not, one modulation for each
sample or for each token.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, HEADS, TEXT, IMAGE = 32, 2, 5, 3
D = C // HEADS


class AllHeadsRmsNorm(nn.Module):
    """RMSNorm over the lanes of all heads, as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C) * 0.2 + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (C,), self.weight, 1e-6)


class WrittenAllHeadsRmsNorm(AllHeadsRmsNorm):
    """Written out in float32, rounded before the weight."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed.type_as(x) * self.weight


class Attention(nn.Module):
    """Self-attention or cross-attention with norms over all heads."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.norm_q, self.norm_k = norm(), norm()

    def heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        return q.unflatten(2, (HEADS, D)), k.unflatten(2, (HEADS, D)), v.unflatten(2, (HEADS, D))


class WanBlock(nn.Module):
    """diffusers 0.42: fp32 norms, rotation by strided stores, sums in fp32 that are rounded to the stream's type."""

    norm: type[nn.Module] = AllHeadsRmsNorm

    def __init__(self) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = Attention(self.norm), Attention(self.norm)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.table = nn.Parameter(torch.randn(1, 6, C) * C**-0.5)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, rope: Any) -> Tensor:
        rope = self.tables(rope)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition)
        h = self.modulated(x, scale, shift)
        x = self.gated(x, self.attend(h, rope), gate)
        x = x + self.cross(self.normed(x), text)
        h = self.modulated(x, mlp_scale, mlp_shift)
        return self.gated(x, self.down(F.gelu(self.up(h), approximate="tanh")), mlp_gate)

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        return (self.table + condition.float()).chunk(6, 1)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (F.layer_norm(x.float(), (C,), eps=1e-6) * (1 + scale) + shift).type_as(x)

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (C,), self.norm2.weight.float(), self.norm2.bias.float(), 1e-6).type_as(x)

    def gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return (x.float() + y * gate).type_as(x)

    def tables(self, rope: Tensor) -> Any:
        """cos and sin [1, N, 1, D] of the angles [N, D / 2]."""
        angles = rope.repeat_interleave(2, -1)[None, :, None]
        return angles.cos(), angles.sin()

    def rotated(self, x: Tensor, rope: Any) -> Tensor:
        """x [B, N, H, D]."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope
        out = torch.empty_like(x)
        out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 1::2]
        out[..., 1::2] = first * sin[..., 1::2] + second * cos[..., 0::2]
        return out.type_as(x)

    def attend(self, h: Tensor, rope: Any) -> Tensor:
        attention = self.self_attention
        q, k, v = attention.heads(h, h)
        return attention.out(self.mixed(self.rotated(q, rope), self.rotated(k, rope), v))

    def cross(self, h: Tensor, text: Tensor) -> Tensor:
        return self.cross_attention.out(self.mixed(*self.cross_attention.heads(h, text)))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


class ComplexWanBlock(WanBlock):
    """Older diffusers: the rotation is a product of complex numbers in float64, of [B, H, N, D]."""

    def tables(self, rope: Tensor) -> Any:
        return torch.polar(torch.ones_like(rope), rope)

    def rotated(self, x: Tensor, rope: Any) -> Tensor:
        pairs = torch.view_as_complex(x.transpose(1, 2).to(torch.float64).unflatten(3, (-1, 2)))
        return torch.view_as_real(pairs * rope[None, None]).flatten(3, 4).type_as(x).transpose(1, 2)


class AutocastWanBlock(ComplexWanBlock):
    """The original: fp32 weights under autocast, a complex rotation in float64, and a stream that stays in fp32."""

    norm = WrittenAllHeadsRmsNorm
    autocast: torch.dtype | None = torch.bfloat16

    def forward(self, x: Tensor, text: Tensor, condition: Tensor, rope: Any) -> Tensor:
        autocast = contextlib.nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
        with autocast:
            return super().forward(x, text, condition, rope)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (C,), eps=1e-6).type_as(x).float() * (1 + scale) + shift

    def gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return x + y * gate

    def rotated(self, x: Tensor, rope: Any) -> Tensor:
        """Sample by sample, with what lies beyond the sample's tokens joined again."""
        out = []
        for i in range(x.shape[0]):
            pairs = torch.view_as_complex(x[i, : rope.shape[0]].to(torch.float64).reshape(-1, HEADS, D // 2, 2))
            out.append(torch.cat([torch.view_as_real(pairs * rope[:, None]).flatten(2), x[i, rope.shape[0] :]]))
        return torch.stack(out).float()

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mixed(*(t.to(v.dtype) for t in (q, k, v)))


class RoundedGateWanBlock(WanBlock):
    """TurboDiffusion: gates and modulation are rounded to the stream's type; the rotation in float32."""

    norm = WrittenAllHeadsRmsNorm

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = F.layer_norm(x.float(), (C,), eps=1e-6).type_as(x)
        return h * (1 + scale.type_as(x)) + shift.type_as(x)

    def gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + y * gate.type_as(x)

    def tables(self, rope: Tensor) -> Any:
        return rope

    def rotated(self, x: Tensor, rope: Any) -> Tensor:
        first, second = x.float()[..., 0::2], x.float()[..., 1::2]
        cos, sin = rope.cos()[:, None], rope.sin()[:, None]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(3).to(x.dtype)


class TokenWanBlock(WanBlock):
    """Wan2.2-TI2V: a modulation for each token, condition [B, N, 6, C]."""

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.squeeze(2) for part in (self.table[:, None] + condition.float()).chunk(6, 2))


class ImageWanBlock(WanBlock):
    """Image-to-video: a second attention, to the image's tokens, is added before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.k_image, self.v_image, self.norm_image = nn.Linear(C, C), nn.Linear(C, C), self.norm()

    def cross(self, h: Tensor, text: Tensor) -> Tensor:
        image, text = text[:, :IMAGE], text[:, IMAGE:]
        q, k, v = self.cross_attention.heads(h, text)
        k_image = self.norm_image(self.k_image(image)).unflatten(2, (HEADS, D))
        v_image = self.v_image(image).unflatten(2, (HEADS, D))
        return self.cross_attention.out(self.mixed(q, k, v) + self.mixed(q, k_image, v_image))


class AdapterWanBlock(ImageWanBlock):
    """IP-Adapter: the image's attention times a scale."""

    def cross(self, h: Tensor, text: Tensor) -> Tensor:
        image, text = text[:, :IMAGE], text[:, IMAGE:]
        q, k, v = self.cross_attention.heads(h, text)
        k_image, v_image = (layer(image).unflatten(2, (HEADS, D)) for layer in (self.k_image, self.v_image))
        return self.cross_attention.out(self.mixed(q, k, v) + 0.6 * self.mixed(q, k_image, v_image))


class GatedOutputBlock(WanBlock):
    """attention * sigmoid(gate) before the output projection, as in Qwen3-Next."""

    def __init__(self) -> None:
        super().__init__()
        self.output_gate = nn.Linear(C, C)

    def attend(self, h: Tensor, rope: Any) -> Tensor:
        attention = self.self_attention
        q, k, v = attention.heads(h, h)
        mixed = self.mixed(self.rotated(q, rope), self.rotated(k, rope), v)
        return attention.out(mixed * torch.sigmoid(self.output_gate(h)))


BLOCKS = {
    "diffusers": WanBlock,
    "diffusers_complex": ComplexWanBlock,
    "original_autocast": AutocastWanBlock,
    "rounded_gate": RoundedGateWanBlock,
    "per_token": TokenWanBlock,
    "image_to_video": ImageWanBlock,
    "adapter": AdapterWanBlock,
    "gated_output": GatedOutputBlock,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> WanBlock:
    """A block with its weights in `dtype`: those that loading keeps in float32 stay in float32."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    if isinstance(block, AutocastWanBlock):
        block.autocast = None if dtype == torch.float32 else dtype
        return block
    block.to(dtype)
    block.table.data, block.norm2 = block.table.data.float(), block.norm2.float()
    return block


def inputs(name: str, dtype: torch.dtype = torch.float32, batch: int = 2, tokens: int = 12) -> tuple[Tensor, ...]:
    """x [B, N, C], text [B, T, C], condition [B, 6, C] or [B, N, 6, C] and the angles [N, D / 2]."""
    torch.manual_seed(1)
    rope = torch.arange(tokens)[:, None].double() / 10000 ** (torch.arange(D // 2).double() / (D // 2))
    if not issubclass(BLOCKS[name], ComplexWanBlock):
        rope = rope.float()
    if BLOCKS[name] is AutocastWanBlock:
        dtype = torch.float32
    x = torch.randn(batch, tokens, C).to(dtype)
    text = torch.randn(batch, TEXT + IMAGE, C).to(dtype)
    condition = torch.randn(batch, *((tokens,) if name == "per_token" else ()), 6, C)
    return x.requires_grad_(), text.requires_grad_(), condition.requires_grad_(), rope
