"""Recogniser: a batched product of matrices, as `matmul`, `bmm`, `baddbmm` or a two-operand `einsum`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.values import equal, tensor


@dataclass(frozen=True)
class Operand:
    """A factor of a product: `node`, whose dimensions `dims` are [*batch, rows, columns]."""

    node: Node
    dims: tuple[int, ...]

    @property
    def as_it_is(self) -> bool:
        """Whether no dimension changes its place."""
        return self.dims == tuple(range(len(self.dims)))

    def transposed(self) -> Operand:
        """The operand with rows and columns exchanged."""
        return Operand(self.node, (*self.dims[:-2], self.dims[-1], self.dims[-2]))

    def sizes(self) -> list[Any]:
        """Sizes of [*batch, rows, columns]."""
        found = tensor(self.node)
        assert found is not None
        return [found.shape[d] for d in self.dims]


@dataclass(frozen=True)
class Product:
    """addend * beta + alpha * left @ right.

    Attributes:
        node: the result.
        left: [*batch, M, K].
        right: [*batch, K, N].
        dims: the permutation of [*batch, M, N] that gives the result's dimensions.
        alpha: factor of the product.
        addend: what `baddbmm` adds, or None.
        beta: factor of the addend.
    """

    node: Node
    left: Operand
    right: Operand
    dims: tuple[int, ...]
    alpha: Any = 1
    addend: Node | None = None
    beta: Any = 1


def match_product(node: Any) -> Product | None:
    """Recognises a batched product whose result is `node`; None for anything else, and for plain matrices."""
    if not isinstance(node, Node) or tensor(node) is None:
        return None
    if node.op == "call_function" and node.target in (torch.einsum, torch.functional.einsum):
        return _einsum(node)
    call = call_of(node)
    if call is None or call.inplace:
        return None
    if call.op == "matmul":
        return _checked(node, call["input"], call["other"])
    if call.op == "baddbmm":
        found = _checked(node, call["batch1"], call["batch2"])
        if found is None or not isinstance(call["input"], Node):
            return None
        addend = None if call["beta"] == 0 else call["input"]
        return Product(node, found.left, found.right, found.dims, call["alpha"], addend, call["beta"])
    return None


def _checked(node: Node, left: Any, right: Any) -> Product | None:
    found = [tensor(x) for x in (node, left, right)]
    if any(x is None for x in found):
        return None
    rank = found[0].dim()  # type: ignore[union-attr]
    if rank < 3 or any(x.dim() != rank for x in found):  # type: ignore[union-attr]
        return None
    dims = tuple(range(rank))
    return Product(node, Operand(left, dims), Operand(right, dims), dims)


def _einsum(node: Node) -> Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    if inputs.count(",") != 1:
        return None
    a, b = inputs.split(",")
    left, right = operands
    if not (isinstance(left, Node) and isinstance(right, Node)) or any(len(set(x)) != len(x) for x in (a, b, out)):
        return None
    if out and out[-1] in a and out[-1] not in b:
        a, b, left, right = b, a, right, left  # the last dimension of the result is the right operand's
    batch = [x for x in a if x in b and x in out]
    rows, columns, inner = set(a) - set(b), set(b) - set(a), (set(a) & set(b)) - set(out)
    if not (len(rows) == len(columns) == len(inner) == 1) or set(out) != {*batch, *rows, *columns} or not batch:
        return None
    (m,), (n,), (k,) = rows, columns, inner
    x, y = tensor(left), tensor(right)
    if x is None or y is None or not equal(x.shape[a.index(k)], y.shape[b.index(k)]):
        return None
    whole = [*batch, m, n]
    return Product(
        node,
        Operand(left, tuple(a.index(i) for i in (*batch, m, k))),
        Operand(right, tuple(b.index(i) for i in (*batch, k, n))),
        tuple(whole.index(i) for i in out),
    )
