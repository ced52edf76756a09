"""Sums, products and complex numbers of values whose lanes are sums of terms over leaves."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call
from torch_fuse.graph.lane_dims import dim_of_lanes
from torch_fuse.graph.lane_terms import MAX_TERMS, Lanes, Term, broadcast, merged, stacked, times
from torch_fuse.graph.values import static_int, tensor


class LaneArithmetic:
    """The part of a trace that computes; None from a method makes the value a leaf."""

    def trace(self, node: Node, rank: int = 1) -> Lanes:
        raise NotImplementedError

    def _rank_of(self, node: Any, rank: int) -> int:
        found = tensor(node)
        return rank if found is None else min(rank, found.dim())

    def _sum(self, call: Call, rank: int, sign: int) -> Lanes | None:
        left, right = call["input"], call["other"]
        if tensor(left) is None or tensor(right) is None:
            return None
        second = [Term(sign * t.sign, t.a, t.b) for t in self.trace(right, self._rank_of(right, rank))]
        terms = [*self.trace(left, self._rank_of(left, rank)), *second]
        return merged(broadcast(terms))

    def _reduced(self, node: Node, call: Call, rank: int) -> Lanes | None:
        """The sum over a short dimension among the last ones: of a matrix's rows times a pair, say."""
        found, result = tensor(call["input"]), tensor(node)
        dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
        if found is None or result is None or call["keepdim"] or len(dims) != 1 or result.dtype != found.dtype:
            return None
        dim = dim_of_lanes(dims[0], found.dim(), rank + 1)
        count = None if dim is None else static_int(found.shape[dims[0]])
        if dim is None or count is None or count > MAX_TERMS:
            return None
        terms = broadcast(self.trace(call["input"], rank + 1))
        return merged([t.map(partial(torch.select, dim=dim, index=i)) for i in range(count) for t in terms])

    def _product(self, call: Call, rank: int) -> Lanes | None:
        left, right = call["input"], call["other"]
        for side, sign in ((left, right), (right, left)):
            if isinstance(sign, (int, float)) and sign in (1, -1) and (call.op == "mul" or sign is right):
                return [Term(int(sign) * t.sign, t.a, t.b) for t in self.trace(side, rank)]
        if call.op == "div" or tensor(left) is None or tensor(right) is None:
            return None
        first, second = (self.trace(side, self._rank_of(side, rank)) for side in (left, right))
        terms = times(first, second)
        return None if terms is None else merged(broadcast(terms))

    def _addcmul(self, call: Call, rank: int) -> Lanes | None:
        """input + value * tensor1 * tensor2"""
        parts = [call[name] for name in ("input", "tensor1", "tensor2")]
        if call["value"] not in (1, -1) or any(tensor(part) is None for part in parts):
            return None
        added, first, second = (self.trace(part, self._rank_of(part, rank)) for part in parts)
        product = times(first, second)
        if product is None:
            return None
        return merged(broadcast([*added, *(Term(int(call["value"]) * t.sign, t.a, t.b) for t in product)]))

    def _complex(self, call: Call, result: torch.Tensor, rank: int) -> Lanes | None:
        """The terms of a complex value, which have a last dimension (real, imaginary) more."""
        if call.op == "view_as_complex":
            return self.trace(call["input"], rank + 1)
        if call.op in ("cast", "contiguous", "clone"):
            source = tensor(call["input"])
            same = source is not None and (source.dtype, source.device) == (result.dtype, result.device)
            return self.trace(call["input"], rank) if same else None
        if call.op == "complex":
            parts = [self.trace(call[name], rank) for name in ("real", "imag")]
            return merged(stacked(parts, -1)) if all(parts) else None
        sides = [tensor(call.args.get(name)) for name in ("input", "other")]
        if call.op != "mul" or any(side is None or not side.is_complex() for side in sides):
            return None
        x, y = (self.trace(call[name], self._rank_of(call[name], rank)) for name in ("input", "other"))
        (a, b), (c, d) = ([_component(z, i) for i in (0, 1)] for z in (x, y))
        products = [times(*pair) for pair in ((a, c), (b, d), (a, d), (b, c))]
        if any(product is None for product in products):
            return None
        ac, bd, ad, bc = (product or [] for product in products)
        real = merged(broadcast([*ac, *(Term(-t.sign, t.a, t.b) for t in bd)]))
        return merged(stacked([real, merged(broadcast([*ad, *bc]))], -1))


def _component(terms: Lanes, index: int) -> Lanes:
    """The real (0) or imaginary (1) part of a complex value."""
    return [t.map(lambda x: x[..., index]) for t in terms]
