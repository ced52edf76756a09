"""Which input elements, with which signs, make up each element of a value's last dimension.

A rotary embedding only moves, negates, multiplies and adds elements along the head dimension. Instead of listing
how libraries spell that (slices and `cat`, `stack` and `flatten`, strided stores, ...), the graph's own operators
are run on small integer tensors that stand for "lane i of that leaf". What comes out says what the subgraph means.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.lane_arithmetic import LaneArithmetic
from torch_fuse.graph.lane_dims import dim_of_lanes, index_of_lanes, static_sizes
from torch_fuse.graph.lane_terms import LEAF, Lanes, Term, broadcast, merged, nothing, stacked
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import keeps_reals, same_shape, tensor, value

_UNWRITTEN = -1


@dataclass
class LaneTrace(LaneArithmetic):
    """Evaluates nodes to sums of terms over leaves.

    Attributes:
        order: positions of the graph's nodes.
        is_leaf: nodes that are not looked into.
        leaves: the leaves met so far; a reference names a leaf by its position here.
        ranks: how many of the last dimensions of each leaf its lanes are.
        nodes: every node looked through.
    """

    order: Order
    is_leaf: Callable[[Node], bool]
    leaves: list[Node] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    nodes: set[Node] = field(default_factory=set)
    _memo: dict[tuple[Node, int, int], Lanes | list[Lanes]] = field(default_factory=dict)

    def trace(self, node: Node, rank: int = 1) -> Lanes:
        """The terms of the last `rank` dimensions of `node`, as read at the end of the graph so far."""
        found = self._trace(node, rank)
        assert not found or isinstance(found[0], Term)
        return found

    def _trace(self, node: Node, rank: int, index: int = -1) -> Any:
        key = (node, rank, index)
        if key not in self._memo:
            call = None if self.is_leaf(node) else call_of(node)
            lanes = self._call(node, call, rank) if call is not None else None
            if lanes is None:
                lanes = self._leaf(node, rank)
            else:
                self.nodes.add(node)
            self._memo[key] = lanes
        return self._memo[key]

    def _leaf(self, node: Node, rank: int) -> Lanes:
        found = tensor(node)
        if found is None or found.dim() < rank or not (found.dtype.is_floating_point or found.is_complex()):
            raise Miss(f"{node.name} is not a floating-point tensor of at least {rank} dimensions", node)
        shape = static_sizes(found.shape[found.dim() - rank :])
        if shape is None:
            raise Miss(f"the head dimension of {node.name} is not static", node)
        if found.is_complex():
            shape = [*shape, 2]
        if node not in self.leaves:
            self.leaves.append(node)
            self.ranks.append(rank)
        if self.ranks[self.leaves.index(node)] != rank:
            raise Miss(f"the last dimensions of {node.name} are read in two ways", node)
        count = torch.Size(shape).numel()
        if count >= LEAF:
            raise Miss(f"the head dimension of {node.name} has {count} elements", node)
        number = torch.arange(count, device="cpu").reshape(shape)
        refs = number + (self.leaves.index(node) + 1) * LEAF
        return [Term(torch.ones_like(refs), refs, torch.zeros_like(refs))]

    # -- operators -------------------------------------------------------------------------------------------

    def _call(self, node: Node, call: Call, rank: int) -> Any:
        """The terms of a node whose operator acts on the last `rank` dimensions alone; None makes it a leaf."""
        op = call.op
        if call.inplace:
            return None
        if (found := tensor(node)) is not None and found.is_complex():
            return self._complex(call, found, rank)
        if op in ("cast", "contiguous", "clone"):
            return self._cast(call["input"], node, rank)
        if op == "neg":
            return [Term(-t.sign, t.a, t.b) for t in self.trace(call["input"], rank)]
        if op in ("add", "sub") and call["alpha"] == 1:
            return self._sum(call, rank, -1 if op == "sub" else 1)
        if op in ("mul", "div"):
            return self._product(call, rank)
        if op == "sum":
            return self._reduced(node, call, rank)
        if op == "addcmul":
            return self._addcmul(call, rank)
        if op in ("empty_like", "zeros_like", "empty", "new_empty", "zeros", "new_zeros"):
            return self._stores(node, rank)
        if op in ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"):
            return self._reshape(call["input"], node, rank)
        if op in ("expand", "expand_as"):
            return self._expand(call["input"], node, rank)
        if op == "view_as_real":
            return self.trace(call["input"], rank - 1) if rank > 1 else None
        if op == "getitem":
            return self._getitem(node, call, rank)
        if op in ("cat", "stack"):
            return self._join(node, call, rank)
        if op in ("narrow", "select", "repeat_interleave", "repeat", "transpose", "unsqueeze"):
            return self._along(node, call, rank)
        return None

    def _cast(self, source: Any, node: Node, rank: int) -> Lanes | None:
        found, result = tensor(source), tensor(node)
        if found is None or result is None or not keeps_reals(found, result):
            return None
        return self.trace(source, rank)

    def _expand(self, source: Any, node: Node, rank: int) -> Lanes | None:
        """Repetition of dimensions of size 1; those before the last `rank` stay aligned from the right."""
        found, result = tensor(source), tensor(node)
        if found is None or result is None or found.is_complex():
            return None
        shape = static_sizes(result.shape[result.dim() - rank :])
        if shape is None:
            return None
        return [t.map(lambda x: x.expand(shape)) for t in broadcast(self.trace(source, min(rank, found.dim())))]

    def _reshape(self, source: Any, node: Node, rank: int) -> Lanes | None:
        found, result = tensor(source), tensor(node)
        if found is None or result is None:
            return None
        outer = result.dim() - rank
        if outer > found.dim() - 1 or not same_shape(found.shape[:outer], result.shape[:outer]):
            return None
        shape = static_sizes(result.shape[outer:])
        if shape is None:
            return None
        return [t.map(lambda x: x.reshape(shape)) for t in broadcast(self.trace(source, found.dim() - outer))]

    def _getitem(self, node: Node, call: Call, rank: int) -> Lanes | None:
        source, index = call["input"], call["index"]
        parts = call_of(source)
        if isinstance(index, int) and parts is not None and not isinstance(value(source), torch.Tensor):
            return self._part(parts, index, node, rank)
        found, result = tensor(source), tensor(node)
        if found is None or result is None:
            return None
        outer = result.dim() - rank
        lane_index = index_of_lanes(index, found.dim(), outer)
        if lane_index is None or outer >= found.dim():
            return None
        return [t.map(lambda x: x[lane_index]) for t in broadcast(self.trace(source, found.dim() - outer))]

    def _part(self, call: Call, index: int, node: Node, rank: int) -> Lanes | None:
        """One result of chunk, split or unbind."""
        if call.op not in ("chunk", "split", "tensor_split", "unbind"):
            return None
        source = call["input"]
        found, result = tensor(source), tensor(node)
        if found is None or result is None:
            return None
        inner = rank + 1 if call.op == "unbind" else rank
        dim = dim_of_lanes(call["dim"], found.dim(), inner)
        if dim is None:
            return None
        terms = broadcast(self.trace(source, inner))
        if call.op == "unbind":
            return [t.map(lambda x: x.unbind(dim)[index]) for t in terms]
        how = next(call.args[name] for name in _PARTS if name in call.args)
        if any(isinstance(size, Node) for size in (how if isinstance(how, (list, tuple)) else (how,))):
            return None
        split = {"chunk": torch.chunk, "split": torch.split, "tensor_split": torch.tensor_split}[call.op]
        return [t.map(lambda x: split(x, how, dim)[index]) for t in terms]

    def _join(self, node: Node, call: Call, rank: int) -> Lanes | None:
        parts = call["tensors"]
        result = tensor(node)
        if result is None or not isinstance(parts, (list, tuple)):
            return None
        dim = dim_of_lanes(call["dim"], result.dim(), rank)
        if dim is None:
            return None
        inner = rank - 1 if call.op == "stack" else rank
        if inner < 1:
            return None
        traced = [broadcast(self.trace(part, inner)) for part in parts]
        if any(not terms for terms in traced):
            return None
        return merged(stacked(traced, dim, torch.cat if call.op == "cat" else torch.stack))

    def _along(self, node: Node, call: Call, rank: int) -> Lanes | None:
        source = call["input"]
        found = tensor(source)
        if found is None:
            return None
        inner = rank + {"select": 1, "unsqueeze": -1}.get(call.op, 0)
        if call.op == "repeat":
            return self._repeat(source, call["repeats"], rank)
        if call.op == "unsqueeze":
            dims = [dim_of_lanes(call["dim"], found.dim() + 1, rank)]
        elif call.op == "transpose":
            dims = [dim_of_lanes(call[name], found.dim(), inner) for name in ("dim0", "dim1")]
        else:
            dims = [None if call["dim"] is None else dim_of_lanes(call["dim"], found.dim(), inner)]
        if any(dim is None for dim in dims) or found.dim() < inner or inner < 1:
            return None
        arguments = {
            "unsqueeze": lambda x: x.unsqueeze(dims[0]),
            "transpose": lambda x: x.transpose(*dims),
            "narrow": lambda x: x.narrow(dims[0], call.args["start"], call.args["length"]),
            "select": lambda x: x.select(dims[0], call.args["index"]),
            "repeat_interleave": lambda x: x.repeat_interleave(call.args["repeats"], dims[0]),
        }
        if call.op == "repeat_interleave" and not isinstance(call["repeats"], int):
            return None
        return [t.map(arguments[call.op]) for t in broadcast(self.trace(source, inner))]

    def _repeat(self, source: Node, repeats: Any, rank: int) -> Lanes | None:
        """Copies one after the other along the last dimensions, and of those alone."""
        found = tensor(source)
        repeats = repeats if isinstance(repeats, (list, tuple)) else (repeats,)
        if found is None or len(repeats) != found.dim() or any(not isinstance(n, int) for n in repeats):
            return None
        outer = len(repeats) - rank
        if outer < 0 or any(n != 1 for n in repeats[:outer]):
            return None
        return [t.map(lambda x: x.repeat(*repeats[outer:])) for t in broadcast(self.trace(source, rank))]

    def _stores(self, node: Node, rank: int) -> Lanes | None:
        """A tensor made empty and filled by stores along its last dimensions."""
        stores = [
            user
            for user in node.users
            if user.op == "call_function" and user.target is operator.setitem and user.args[0] is node
        ]
        if not stores:
            return None
        last = max(self.order.index[store] for store in stores)
        for user in node.users:
            if user not in stores and self.order.index[user] < last:
                raise Miss(f"{node.name} is read before it is filled", user)
        result = tensor(node)
        assert result is not None
        shape = static_sizes(result.shape[result.dim() - rank :])
        if shape is None:
            return None
        blank = torch.full(shape, _UNWRITTEN, device="cpu")
        terms = [Term(blank.clone(), blank.clone(), blank.clone())]
        for store in sorted(stores, key=self.order.index.__getitem__):
            index = index_of_lanes(store.args[1], result.dim(), result.dim() - rank)
            stored = tensor(store.args[2])
            if index is None or stored is None or not isinstance(store.args[2], Node):
                raise Miss(f"{store.name} does not store along the head dimension", store)
            parts = broadcast(self.trace(store.args[2], min(rank, stored.dim())))
            while len(terms) < len(parts):
                terms.append(nothing(terms[0]))
            for k, term in enumerate(terms):
                part = parts[k] if k < len(parts) else nothing(parts[0])
                for name in ("sign", "a", "b"):
                    getattr(term, name)[index] = getattr(part, name)
            self.nodes.add(store)
        if bool((terms[0].sign == _UNWRITTEN).any() & (terms[0].a == _UNWRITTEN).any()):
            raise Miss(f"{node.name} is not filled completely", node)
        return merged(terms)


_PARTS = ("chunks", "split_size_or_sections", "indices_or_sections")
