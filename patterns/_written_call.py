"""The call that attention written out becomes: its scale, operands, mask and result, all as [B, H, ...]."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.miss import Miss
from torch_fuse.graph.product import Operand
from torch_fuse.graph.score_mask import MaskPlan
from torch_fuse.graph.score_steps import Factor, Term
from torch_fuse.graph.values import equal, same_shape, tensor
from torch_fuse.graph.written_attention import WrittenOut
from torch_fuse.rewrite.builder import Builder


class Emitter:
    """Emits the parts of the call, all as [B, H, ...]; `split` holds operands that were so before a reshape."""

    def __init__(
        self, builder: Builder, written: WrittenOut, sizes: tuple[Any, Any], split: Mapping[Node, Node]
    ) -> None:
        self.builder = builder
        self.written = written
        self.sizes = sizes
        self.split = split
        self.dtype = tensor(written.node).dtype  # type: ignore[union-attr]

    def scale(self, factors: Iterable[Factor]) -> tuple[Any, list[Factor]]:
        """The product of all factors that are numbers, and the others."""
        scale: Any = 1.0
        tensors = []
        for factor in factors:
            if factor.divides and factor.number == 0:
                raise Miss("the scores are divided by zero", self.written.node)
            if isinstance(factor.number, Node) and tensor(factor.number) is not None:
                tensors.append(factor)
            elif isinstance(scale, float) and isinstance(factor.number, (int, float)):
                scale = scale / factor.number if factor.divides else scale * factor.number
            else:
                apply = operator.truediv if factor.divides else operator.mul
                scale = self.builder.call(apply, scale, factor.number)
        if isinstance(scale, float) and not 0 < scale < math.inf:
            raise Miss(f"the scores are scaled by {scale}, which SDPA's fused kernels do not take", self.written.node)
        return scale, tensors

    def operand(self, operand: Operand) -> Node:
        """[B, H, S, D]."""
        node = operand.node
        if node in self.split:
            return self.split[node]
        if not operand.as_it_is:
            node = self.builder.call("permute", node, operand.dims)
        if len(operand.dims) == 3:
            node = self._split(node)
        found = tensor(node)
        assert found is not None
        if not same_shape(found.shape[:2], self.sizes):
            node = self.builder.call("expand", node, *self.sizes, -1, -1)
        return node

    def _split(self, node: Node) -> Node:
        """[N, ...] as [B, H, ...]; [1, ...] as [1, 1, ...]."""
        found = tensor(node)
        assert found is not None
        if equal(self.sizes[0], 1) or equal(found.shape[0], 1):
            return self.builder.call("unsqueeze", node, 0)
        return self.builder.call("unflatten", node, 0, self.sizes)

    def scaled_query(self, query: Node, factor: Factor) -> Node:
        """The query times a tensor that scales the scores."""
        found, before = tensor(factor.number), tensor(query)
        assert found is not None and before is not None
        per_head = found.dim() == 0 or (found.dim() in (3, 4) and all(equal(n, 1) for n in found.shape[-2:]))
        if self.dtype.itemsize < 4 or not per_head or (found.dim() == 3 and len(self.written.query.dims) == 3):
            raise Miss(f"the scale is a tensor, by which a query of {self.dtype} would be rounded", factor.number)
        return self.builder.call("div" if factor.divides else "mul", query, factor.number)

    def _spread(self, node: Node, rank: int) -> Node:
        """What is broadcast to scores of `rank` dimensions, broadcast to [B, H, S_q, S_k]."""
        for _ in range(rank - tensor(node).dim()):  # type: ignore[union-attr]
            node = self.builder.call("unsqueeze", node, 0)
        return self._split(node) if rank == 3 else node

    def mask(self, plan: MaskPlan) -> tuple[Node | None, Node | None]:
        """The attn_mask or None, and the rows [.., S_q, 1] in which no key is kept or None."""
        call, lonely, keep, total = self.builder.call, None, None, None
        for fill in plan.fills:
            part = call("logical_not", fill.mask) if fill.inverted else fill.mask
            part = self._spread(part, fill.rank)
            keep = part if keep is None else call("logical_and", keep, part)
        if plan.apart == "fills":
            lonely = call("logical_not", call("any", keep, -1, True))
            keep = call("logical_or", keep, lonely)
        for term in plan.terms:
            part = self._term(term)
            total = part if total is None else call("add", total, part)
            if plan.apart == "term" and term.node is plan.excluding:
                lonely = call("lt", call("amax", part, -1, True), 0)
        if keep is None or total is None:
            return (total if keep is None else keep), lonely
        return call(torch.where, keep, total, -math.inf), lonely

    def without_keys(self, value: Node, lonely: Node, plan: MaskPlan) -> Node:
        """What rows without keys give [B, H, 1, D]: with equal weights, or with weights that are NaN."""
        mean = self.builder.call("mean", value, -2, True)
        if plan.mean:
            return mean
        some = self.builder.call("any", lonely, -2, True)  # elsewhere, the gradient of the values is not NaN
        one = self.builder.call("new_ones", value, ())
        return self.builder.call("mul", mean, self.builder.call("masked_fill", one, some, math.nan))

    def _term(self, term: Term) -> Node:
        node = self._spread(term.node, term.rank)
        if tensor(node).dtype != self.dtype:  # type: ignore[union-attr]
            node = self.builder.call("to", node, self.dtype)
        for factor in term.factors:
            if not isinstance(factor.number, (int, float)):
                raise Miss("the bias is scaled by a tensor", term.node)
            node = self.builder.call("div" if factor.divides else "mul", node, factor.number)
        return node

    def result(self, node: Node) -> Node:
        """[B, H, S_q, D] with the dimensions of the attention's result."""
        product = self.written.product
        if len(product.dims) == 3:
            node = self.builder.call("flatten", node, 0, 1)
        as_it_is = product.dims == tuple(range(len(product.dims)))
        return node if as_it_is else self.builder.call("permute", node, product.dims)
