"""The linear layers behind a norm for a few rows, as models write them, and what only looks like them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_fuse.rewrite.pattern import Example

Block = Callable[["_Layers", torch.Tensor], Any]


class _Layers(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.rms = nn.RMSNorm(16, eps=1e-6)
        self.a, self.b = nn.Linear(16, 24), nn.Linear(16, 32)
        self.c, self.d = nn.Linear(16, 24, bias=False), nn.Linear(16, 8, bias=False)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(self, x)


def _two_norms(m: _Layers, x: torch.Tensor) -> Any:
    return m.a(m.norm1(x)), F.gelu(m.b(m.norm2(x)))


def _example(block: Block, rows: int = 2, grad: bool = False) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = _Layers(block).to(dtype).requires_grad_(grad)
        return model, (torch.randn(rows, 1, 16, dtype=dtype),)

    return make


def _written_rms(m: _Layers, x: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return m.rms.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _gated_unit(m: _Layers, x: torch.Tensor) -> torch.Tensor:
    y = _written_rms(m, x)
    return F.silu(m.a(y)) * m.c(y)


def _gelu_new(y: torch.Tensor) -> torch.Tensor:
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


_SPELLINGS: dict[str, Block] = {
    "one": lambda m, x: m.a(m.norm1(x)),
    "two_norms_and_gelu": _two_norms,
    "three_weights": lambda m, x: [layer(_written_rms(m, x)) for layer in (m.a, m.c, m.d)],
    "four_weights": lambda m, x: [layer(y) for y in (m.norm1(x),) for layer in (m.a, m.b, m.c, m.d)],
    "gated": _gated_unit,
    "tanh_written_out": lambda m, x: _gelu_new(m.b(m.norm1(x))),
    "bias_added_later": lambda m, x: F.gelu(m.c(m.norm1(x)) + m.a.bias),
    "gated_bias_added_later": lambda m, x: (lambda y: F.silu(m.c(y) + m.a.bias) * (m.c(y) + m.a.bias))(m.norm1(x)),
    "result_read_before_and_after_gelu": lambda m, x: (lambda y: (F.gelu(y), y + 1))(m.b(m.norm1(x))),
}  # fmt: skip
_NEAR_MISSES: dict[str, Block] = {
    "norm_read_elsewhere": lambda m, x: (lambda y: (m.a(y), y * 2))(m.norm1(x)),
    "written_in_between": lambda m, x: (lambda y: (m.a(y), x.mul_(2), m.b(y)))(m.norm1(x)),
    "bias_of_one_number": lambda m, x: m.c(m.norm1(x)) + m.a.bias[:1],
    "matrix_added": lambda m, x: torch.addmm(m.a.bias.expand(2, 24), m.norm1(x)[:, 0], m.c.weight.t()),
    "no_norm": lambda m, x: m.a(x),
}


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    for name, block in _SPELLINGS.items():
        yield Example(name, _example(block))


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern must not fire on them."""
    yield Example("nine_rows", _example(_two_norms, 9), fuses=False)
    yield Example("gradients", _example(_two_norms, grad=True), fuses=False)
    for name, block in _NEAR_MISSES.items():
        yield Example(name, _example(block), fuses=False)
