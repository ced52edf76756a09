"""Small decoders that take a step with a static cache, and things that only look like it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.rewrite.pattern import Example

HEADS, DIM, SIZE, WIDTH = 2, 8, 16, 16


def spellings() -> Iterator[Example]:
    """Decoders that become decode_stack."""
    for name, changes in _SPELLINGS.items():
        yield Example(name, step(**changes))


def near_misses() -> Iterator[Example]:
    """Decoders that do not, or not as a whole."""
    for name, changes in _NEAR_MISSES.items():
        yield Example(name, step(**changes), fuses=False)


class Block(nn.Module):
    """A decoder layer as GPT-NeoX (parallel or not) or Llama writes it."""

    def __init__(self, kind: str, kv_heads: int, inner: int, bias: bool, how: str) -> None:
        super().__init__()
        self.kind, self.kv_heads, self.how = kind, kv_heads, how
        self.seen: list[Tensor] = []
        self.gated = kind == "gated"
        norm = nn.RMSNorm if self.gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(WIDTH, eps=1e-5), norm(WIDTH, eps=1e-3 if how == "other_norm" else 1e-5)
        sizes = [HEADS * DIM, kv_heads * DIM, kv_heads * DIM] if self.gated else [3 * HEADS * DIM]
        self.ins = nn.ModuleList(nn.Linear(WIDTH, size, bias=bias) for size in sizes)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=bias)
        self.gate = nn.Linear(WIDTH, inner, bias=bias) if self.gated else None
        self.up, self.down = nn.Linear(WIDTH, inner, bias=bias), nn.Linear(inner, WIDTH, bias=bias)

    def heads(self, x: Tensor) -> list[Tensor]:
        y = self.norm1(x)
        if self.how == "heads_flipped":
            return [layer(y).view(1, 1, -1, DIM).transpose(1, 2).flip(1) for layer in self.ins]
        if self.gated:
            return [layer(y).view(1, x.shape[1], -1, DIM).transpose(1, 2) for layer in self.ins]
        return list(self.ins[0](y).view(1, x.shape[1], HEADS, 3 * DIM).transpose(1, 2).chunk(3, -1))

    def mlp(self, x: Tensor) -> Tensor:
        y = self.norm2(x)
        h = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        if self.how == "mlp_read":
            self.seen.append(h * 2)
        return self.down(h)

    def forward(self, x, cos, sin, mask, keys, values, length, positions):
        q, k, v = self.heads(x)
        q, k = (_turned(y, cos, sin) for y in (q, k))
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device) + length
            length.add_(x.shape[1])
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        groups = HEADS // self.kv_heads
        k, v = (y.repeat_interleave(groups, 1) if groups > 1 else y for y in (keys, values))
        scale = 0.5 if self.how == "other_scale" else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if self.how == "attention_read":
            self.seen.append(attended * 2)
        if self.how == "attended_transposed":
            attended = attended.transpose(2, 3).reshape(1, HEADS, 1, DIM).transpose(1, 3)
        a = self.out(attended.transpose(1, 2).reshape(1, x.shape[1], -1))
        if self.kind == "parallel":
            return x + a + self.mlp(x)
        y = x + a
        return y + self.mlp(x if self.how == "mlp_of_input" else y)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


class Decoder(nn.Module):
    """Layers, a final norm and an lm_head, with one thing made otherwise."""

    def __init__(self, kind: str, layers: int, kv_heads: int, how: str, bias: bool) -> None:
        super().__init__()
        self.how, self.layers = how, layers
        inner = [24 if how == "other_width" and i == 1 else 32 for i in range(layers)]
        self.blocks = nn.ModuleList(Block(kind, kv_heads, n, bias, how if i == 1 else "") for i, n in enumerate(inner))
        self.norm = (nn.RMSNorm if kind == "gated" else nn.LayerNorm)(WIDTH, eps=1e-3 if how == "other_eps" else 1e-5)
        self.head = nn.Linear(WIDTH, 24, bias=bias)

    def forward(self, x, cos, sin, masks, *state):
        n, how, extra = self.layers, self.how, []
        blocks: list[Any] = list(self.blocks)
        for block in blocks:
            block.seen = []
        keys, values, lengths = state[:n], state[n : 2 * n], state[2 * n :]
        positions = None
        if how in ("positions", "position_counted_first"):
            positions = torch.arange(x.shape[1], device=x.device) + lengths[0]
            if how == "position_counted_first":
                lengths[0].add_(x.shape[1])
        if how == "mask_of_the_count":  # as in transformers: read before the first layer counts
            masks = [torch.arange(SIZE, device=x.device)[None, None, None] <= lengths[0]] * n
        for i, block in enumerate(blocks):
            j = 0 if how == "shared_cache" else i
            mask, table = masks[i % len(masks)], cos * 2 if how == "other_table" and i == 1 else cos
            if how == "weight_written" and i == 1:
                blocks[0].down.weight.mul_(0.5)
            given = positions if i == 0 or how != "position_counted_first" else None
            x = block(x, table, sin, mask, keys[j], values[j], lengths[i], given)
            if how == "hidden_read":
                extra.append(x)
            if (how, i) in (("hook", 0), ("hook_at_2", 2)):
                x = x * 1.5
            if how == "cache_read" and i == 0:
                extra.append(keys[0] * 2)
            if how == "cache_written" and i == 0:
                keys[0].mul_(0.5)
            if how == "length_read" and i == 0:
                extra.append(lengths[0] * 2)
            if how == "mask_written" and i == 0:
                masks[0].logical_not_()
        if how == "no_head":
            return x, extra
        if how == "last_read":
            extra.append(x * 2)
        y = self.norm(x)
        if how != "whole":
            y = y[:, -1] if how == "last_row" else y[:, slice(0, None), :]
        return self.head(y), extra + [seen for block in blocks for seen in block.seen]


def step(
    kind: str = "parallel", layers: int = 2, kv_heads: int = HEADS, how: str = "counted", bias: bool = True,
    tokens: int = 1, masks: int = 1, grad: bool = False,
) -> Callable[[torch.dtype], tuple[nn.Module, tuple[Any, ...]]]:  # fmt: skip
    """Makes a decoder and its inputs: the stream, tables, masks, caches and counters."""

    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = Decoder(kind, layers, kv_heads, how, bias).to(dtype).requires_grad_(grad)
        angle = torch.rand(1, tokens, DIM // 2).repeat(1, 1, 2)
        seen = [(torch.arange(SIZE) <= 5 + i).expand(1, 1, tokens, SIZE).clone() for i in range(masks)]
        caches = [torch.randn(1, kv_heads, SIZE, DIM).to(dtype) for _ in range(2 * layers)]
        lengths = [torch.tensor(5 if how == "mask_of_the_count" else 5 - i) for i in range(layers)]
        tables = (angle.cos().to(dtype), angle.sin().to(dtype))
        return model, (torch.randn(1, tokens, WIDTH).to(dtype), *tables, seen, *caches, *lengths)

    return make


# tests/test_decode_stack_pattern.py has more, in one data type.
_SPELLINGS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"kind": "sequential", "layers": 3},
    "gated_and_grouped": {"kind": "gated", "kv_heads": 1, "bias": False},
}
_NEAR_MISSES: dict[str, dict[str, Any]] = {"hidden_states_are_read": {"how": "hidden_read"}}
