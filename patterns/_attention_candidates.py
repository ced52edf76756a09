"""The exact backends an attention can have: how each is called, what it cannot do, what it looks like in a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.fx import Node

from torch_fuse._compat import cudnn_attention, flash_attention
from torch_fuse.kernels import dense_attention, fa4_attention
from torch_fuse.rewrite.builder import Builder

from ._attention_site import Site

Tensors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Candidate:
    """A backend besides PyTorch's own pick.

    Attributes:
        name: in reports and in what is remembered.
        target: what a graph calls.
        arguments: positional and keyword arguments after query, key and value.
        refusal: why it cannot take these tensors of a site, or None.
        several: whether it returns several results, of which the first is the attention.
        gradients: whether it has a gradient.
        own_launch: whether a call costs the processor other time than one of SDPA's operators.
        pick: how PyTorch calls it, where it is one of its backends.
    """

    name: str
    target: Any
    arguments: Callable[[Site], tuple[tuple[Any, ...], dict[str, Any]]]
    refusal: Callable[[Tensors, Site], str | None]
    several: bool = False
    gradients: bool = False
    own_launch: bool = False
    pick: str = ""

    @property
    def op(self) -> str:
        """Qualified name of the operator."""
        return self.target._schema.name if hasattr(self.target, "_schema") else self.name

    def call(self, tensors: Tensors, site: Site) -> Tensor:
        """The attention of tensors."""
        args, kwargs = self.arguments(site)
        out = self.target(*tensors, *args, **kwargs)
        return out[0] if self.several else out

    def emit(self, builder: Builder, nodes: tuple[Node, Node, Node], site: Site) -> Node:
        """The attention in a graph."""
        args, kwargs = self.arguments(site)
        out = builder.call(self.target, *nodes, *args, **kwargs)
        return builder.call(operator.getitem, out, 0) if self.several else out


def pytorch(tensors: Tensors, site: Site) -> Callable[[Tensors], Tensor]:
    """The attention as the graph has it, for these tensors or others that require gradients.

    Repetition of heads is done before and not a part of it; where gradients are wanted it is, as its gradient is.
    """
    before = None if site.gradients else _repeated(tensors, site)

    def call(leaves: Tensors) -> Tensor:
        q, k, v = _repeated(leaves, site) if before is None else before
        return F.scaled_dot_product_attention(q, k, v, is_causal=site.is_causal, scale=site.scale, enable_gqa=site.gqa)

    return call


def _repeated(tensors: Tensors, site: Site) -> Tensors:
    q, k, v = tensors
    if site.repetition == 1:
        return tensors
    return q, k.repeat_interleave(site.repetition, 1), v.repeat_interleave(site.repetition, 1)


def _torch_refusal(can_use: Callable[..., bool], name: str) -> Callable[[Tensors, Site], str | None]:
    def refusal(tensors: Tensors, site: Site) -> str | None:
        q, k, _ = tensors
        if q.shape[3] % 8:
            return f"head_dim is {q.shape[3]}; allowed: multiples of 8"
        usable = can_use(SDPAParams(*tensors, None, 0.0, site.is_causal, q.shape[1] != k.shape[1]))
        return None if usable else f"torch.backends.cuda.{name} says no"

    return refusal


def _ours(op: Any) -> Callable[[Tensors, Site], str | None]:
    return lambda tensors, site: op.supports(*(x.detach() for x in tensors), site.is_causal, site.scale)


def _of_op(site: Site) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (site.is_causal, site.scale), {}


CANDIDATES = (
    Candidate(
        "cudnn",
        cudnn_attention,
        lambda site: ((None, site.gradients, 0.0, site.is_causal), {"scale": site.scale}),
        _torch_refusal(can_use_cudnn_attention, "can_use_cudnn_attention"),
        several=True,
        gradients=True,
        pick="cudnn_attention",
    ),
    Candidate(
        "flash",
        flash_attention,
        lambda site: ((0.0, site.is_causal), {"scale": site.scale}),
        _torch_refusal(can_use_flash_attention, "can_use_flash_attention"),
        several=True,
        gradients=True,
        pick="flash_attention",
    ),
    Candidate("ours", dense_attention.dense_attention, _of_op, _ours(dense_attention), own_launch=True),
    Candidate("fa4", fa4_attention.fa4_attention, _of_op, _ours(fa4_attention), own_launch=True),
)
