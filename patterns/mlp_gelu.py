"""The GELU between the two linear layers of an MLP, in a kernel of its own that is bound by memory.

Before: linear(gelu(linear(x)))        # F.gelu, or 0.5 * x * (1 + erf(x / sqrt(2))), or GELU-new with tanh
After:  linear(torch_fuse.gelu(linear(x)))

For GPT-NeoX, GPT-J, Phi, GPT-2, BERT, ViT, Wan and others. Both matrix products belong to the GEMM library, so Inductor
too gives the GELU a kernel of its own, and spends 40 instructions an element on erf; ours spends 17 (tanh: 11).
Wins on CUDA in bfloat16 and float16 from a million elements on; measured: see docs. A GELU with other neighbours is
left to Inductor, which fuses it with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from torch_fuse.graph.activation import gelus, match_gelu
from torch_fuse.graph.linear import from_linear, into_linears
from torch_fuse.graph.values import size_hint, tensor
from torch_fuse.kernels import gelu
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Fewer elements than this, and the launch costs more than the instructions that it saves.
MIN_ELEMENTS = 2**20


@register
class MlpGelu(Pattern):
    """The GELU of an MLP in a kernel that is bound by memory, not by erf."""

    name = "mlp_gelu"
    op = "torch_fuse::gelu"

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return [found.node for found in gelus(view.nodes)]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        found = match_gelu(anchor)
        if found is None or from_linear(found.input, found.nodes) is None or not into_linears(anchor):
            return None
        note = "erf" if found.approximate == "none" else "tanh"
        return Match(anchor, {"gelu": found}, (anchor,), found.nodes, (found.input,), note)

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        x = tensor(match.bindings["gelu"].input)
        assert x is not None
        reason = gelu.supports(x.new_empty(0))
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        elements = math.prod(size_hint(size, 1) for size in x.shape)
        if elements < MIN_ELEMENTS:
            return f"{elements} elements: bound by the launch; it pays from {MIN_ELEMENTS} on"
        return None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        found = match.bindings["gelu"]
        if options.kernels == "reference":
            return {match.anchor: builder.call(F.gelu, found.input, approximate=found.approximate)}
        return {match.anchor: builder.call(gelu.gelu, found.input, found.approximate)}

    def spellings(self) -> Iterator[Example]:
        for name, activation in _GELUS.items():
            yield Example(name, _mlp(activation))
        yield Example("fp32_inside", _mlp(lambda x: F.gelu(x.float()).type_as(x)))
        yield Example("dropout_behind", _mlp(lambda x: F.dropout(F.gelu(x), 0.0, training=True)))
        yield Example("views_around", _mlp(lambda x: F.gelu(x.view(-1, x.shape[-1])).contiguous().view(x.shape)))

    def near_misses(self) -> Iterator[Example]:
        for name, activation in _NOT_GELUS.items():
            yield Example(name, _mlp(activation), fuses=False)


# -- examples ------------------------------------------------------------------------------------------------------

Activation = Callable[[torch.Tensor], torch.Tensor]
_TANH = math.sqrt(2 / math.pi)


class _Mlp(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


def _mlp(activation: Activation) -> Callable[[torch.dtype], tuple[nn.Module, tuple[Any, ...]]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
        return _Mlp(activation).to(dtype), (torch.randn(2, 5, 8, dtype=dtype, requires_grad=True),)

    return make


def _second_user(x: torch.Tensor) -> torch.Tensor:
    y = F.gelu(x)
    return y * y.mean()


_GELUS: dict[str, Activation] = {
    "erf": F.gelu,
    "tanh": lambda x: F.gelu(x, approximate="tanh"),
    "erf_written_out": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf_halved_last": lambda x: (torch.erf(x * 0.70710678) + 1) * x / 2,
    "erf_distributed": lambda x: 0.5 * x + 0.5 * x * torch.erf(x * math.sqrt(0.5)),
    "erf_cdf": lambda x: x * (0.5 + torch.erf(x.div(math.sqrt(2.0))).mul(0.5)),
    "new": lambda x: 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.044715 * torch.pow(x, 3.0)))),
    "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "new_cubed_by_products": lambda x: x * (0.5 * (torch.tanh((x * x * x * 0.044715 + x) * 0.79788456) + 1)),
    "sigmoid": lambda x: x * torch.sigmoid(2 * _TANH * (x + 0.044715 * x**3)),
}
_NOT_GELUS: dict[str, Activation] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "other_cubic": lambda x: 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.0448 * torch.pow(x, 3.0)))),
    "other_power": lambda x: 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.044715 * torch.pow(x, 2.0)))),
    "not_halved": lambda x: 0.6 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "erf_without_root": lambda x: 0.5 * x * (1.0 + torch.erf(x)),
    "one_minus_erf": lambda x: 0.5 * x * (1.0 - torch.erf(x / math.sqrt(2.0))),
    "other_gate": lambda x: 0.5 * x.flip(-1) * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "second_user": _second_user,
    "other_neighbours": lambda x: F.gelu(x + 1.0),
    "dropped": lambda x: F.gelu(x) * (torch.arange(24, device=x.device) % 2),
}
