"""Linear layers and the residual sum for a few rows, as models write them, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_fuse.rewrite.pattern import Example

Block = Callable[["_Layers", torch.Tensor, torch.Tensor, torch.Tensor], Any]


class _Layers(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(32, 24), nn.Linear(32, 24, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        return self.block(self, x, y, z)


def _example(block: Block, rows: int = 2, grad: bool = False) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = _Layers(block).to(dtype).requires_grad_(grad)
        return model, tuple(torch.randn(rows, 1, n, dtype=dtype) for n in (24, 16, 32))

    return make


_SPELLINGS: dict[str, Block] = {
    "two": lambda m, x, y, z: m.b(z) + m.a(y) + x,
    "residual_first": lambda m, x, y, z: x + (m.a(y) + m.c(z)),
    "one": lambda m, x, y, z: x + m.b(z),
    "no_bias": lambda m, x, y, z: m.c(z) + x,
    "behind_dropout": lambda m, x, y, z: x + F.dropout(m.b(z), 0.1, False) + F.dropout(m.a(y), 0.0, True),
    "read_again": lambda m, x, y, z: (lambda r: (r, r + m.a(y)))(x + m.b(z)),
}
_NEAR_MISSES: dict[str, Block] = {
    "linear_read_again": lambda m, x, y, z: (lambda h: (x + h, h * 2))(m.b(z)),
    "scaled": lambda m, x, y, z: x + 2 * m.b(z),
    "alpha": lambda m, x, y, z: torch.add(x, m.b(z), alpha=2),
    "difference": lambda m, x, y, z: x - m.b(z),
    "bias_of_one_number": lambda m, x, y, z: x + (m.c(z) + m.a.bias[:1]),
    "broadcast": lambda m, x, y, z: x[:1] + m.b(z),
    "written_in_between": lambda m, x, y, z: (lambda h: (z.mul_(2), x + h))(m.b(z)),
}


def spellings() -> Iterator[Example]:
    """Blocks on which the pattern must fire."""
    for name, block in _SPELLINGS.items():
        yield Example(name, _example(block))


def near_misses() -> Iterator[Example]:
    """Blocks that look alike; the pattern must not fire on them."""
    yield Example("nine_rows", _example(_SPELLINGS["two"], 9), fuses=False)
    yield Example("gradients", _example(_SPELLINGS["two"], grad=True), fuses=False)
    for name, block in _NEAR_MISSES.items():
        yield Example(name, _example(block), fuses=False)
