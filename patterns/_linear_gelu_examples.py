"""The first linear layer of an MLP and its GELU, as models write them, and what only looks like them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_fuse.rewrite.pattern import Example

Block = Callable[["_Layers", torch.Tensor], Any]
_TANH = math.sqrt(2 / math.pi)


class _Layers(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.bare = nn.Linear(8, 24, bias=False)
        self.conv1d = nn.Parameter(torch.randn(8, 24) / 8**0.5)
        self.rows = nn.Parameter(torch.randn(10, 24))

    def forward(self, x: torch.Tensor) -> Any:
        return self.block(self, x)


def _example(block: Block, grad: bool = False) -> Callable[[torch.dtype], Any]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        model = _Layers(block).to(dtype).requires_grad_(grad)
        return model, (torch.randn(2, 5, 8, dtype=dtype),)

    return make


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _erf_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


def _new_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.044715 * torch.pow(x, 3.0))))


def _conv1d(m: _Layers, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer as GPT-2 writes it."""
    y = torch.addmm(m.up.bias if bias is None else bias, x.view(-1, x.size(-1)), m.conv1d)
    return y.view(*x.size()[:-1], 24)


_TANH_GELU: dict[str, Block] = {
    "tanh": lambda m, x: m.down(_gelu(m.up(x))),
    "written_out": lambda m, x: m.down(_new_gelu(m.up(x))),
    "sigmoid": lambda m, x: m.down((lambda y: y * torch.sigmoid(2 * _TANH * (y + 0.044715 * y**3)))(m.up(x))),
    "fp32_inside": lambda m, x: m.down(_gelu(m.up(x).float()).to(x.dtype)),
    "conv1d": lambda m, x: m.down(_new_gelu(_conv1d(m, x))),
    "bias_added_later": lambda m, x: m.down(_gelu(x @ m.bare.weight.T + m.up.bias)),
    "views_around": lambda m, x: m.down(_gelu(m.up(x).view(-1, 24)).view(2, 5, 24)),
    "dropout_behind": lambda m, x: m.down(F.dropout(_gelu(m.up(x)), 0.1, training=False)),
    "only_its_type_read_elsewhere": lambda m, x: (lambda y: (m.down(_gelu(y)), x.float().type_as(y)))(m.up(x)),
}


def _input_written_between(m: _Layers, x: torch.Tensor) -> Any:
    x = x + 0
    y = m.up(x)
    return x.mul_(2), m.down(_gelu(y))


_UNLIKE_TANH_GELU: dict[str, Block] = {
    "erf": lambda m, x: m.down(F.gelu(m.up(x))),
    "other_cubic": lambda m, x: m.down(
        (lambda y: 0.5 * y * (1 + torch.tanh(_TANH * (y + 0.0448 * y**3))))(m.up(x)),
    ),
    "quick_gelu": lambda m, x: m.down((lambda y: y * torch.sigmoid(1.702 * y))(m.up(x))),
    "read_before_the_gelu": lambda m, x: (lambda y: m.down(_gelu(y)) + y.mean())(m.up(x)),
    "no_bias": lambda m, x: m.down(_gelu(m.bare(x))),
    "bias_a_row": lambda m, x: m.down(_gelu(_conv1d(m, x, m.rows))),
    "bias_scaled": lambda m, x: m.down(_gelu(torch.add(m.bare(x), m.up.bias, alpha=2))),
    "dropped_between": lambda m, x: m.down(_gelu(F.dropout(m.up(x), 0.5, training=True) * 0)),
    "scaled_between": lambda m, x: m.down(_gelu(m.up(x) * 2)),
    "written_between": lambda m, x: m.down(_gelu(m.up(x).mul_(2))),
    "bias_added_in_place": lambda m, x: m.down(_gelu(m.bare(x).add_(m.up.bias))),
    "input_written_between": _input_written_between,
    "gated": lambda m, x: m.down(_gelu(m.up(x)) * m.bare(x)),
}
_ERF_GELU: dict[str, Block] = {
    "called": lambda m, x: m.down(F.gelu(m.up(x))),
    "written_out": lambda m, x: m.down(_erf_gelu(m.up(x))),
    "fp32_inside": lambda m, x: m.down(F.gelu(m.up(x).float()).to(x.dtype)),
    "bias_added_later": lambda m, x: m.down(F.gelu(x @ m.bare.weight.T + m.up.bias)),
    "views_around": lambda m, x: m.down(F.gelu(m.up(x).view(-1, 24)).view(2, 5, 24)),
}
_UNLIKE_ERF_GELU: dict[str, Block] = {
    "tanh": lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")),
    "no_bias": lambda m, x: m.down(F.gelu(m.bare(x))),
    "read_before_the_gelu": lambda m, x: (lambda y: m.down(F.gelu(y)) + y.mean())(m.up(x)),
    "scaled_between": lambda m, x: m.down(F.gelu(m.up(x) * 2)),
    "written_between": lambda m, x: m.down(F.gelu(m.up(x).mul_(2))),
    "gated": lambda m, x: m.down(F.gelu(m.up(x)) * m.bare(x)),
}


def spellings(approximate: str) -> Iterator[Example]:
    """Blocks on which the pattern for this GELU ("tanh" or "none", as `F.gelu` calls them) must fire."""
    for name, block in (_TANH_GELU if approximate == "tanh" else _ERF_GELU).items():
        yield Example(name, _example(block))


def near_misses(approximate: str) -> Iterator[Example]:
    """Blocks that look alike; it must not fire on them."""
    tanh = approximate == "tanh"
    wanted = _TANH_GELU["tanh"] if tanh else _ERF_GELU["called"]
    yield Example("gradients", _example(wanted, grad=True), fuses=False)
    for name, block in (_UNLIKE_TANH_GELU if tanh else _UNLIKE_ERF_GELU).items():
        yield Example(name, _example(block), fuses=False)
