"""Recogniser: the norms that read a residual sum, with what stands before and behind them.

r = x + sum_i alpha_i * gate_i * y_i;  out_j = modulate(norm_j(r))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.memory import in_memory
from torch_fuse.graph.modulate import Modulation, broadcasts, match_modulation, only_cast
from torch_fuse.graph.norm import Norm, norms_of
from torch_fuse.graph.residual import Weighted, match_residual
from torch_fuse.graph.values import equal, tensor


@dataclass(frozen=True)
class Term:
    """alpha * gate * y."""

    y: Node
    gate: Node | None = None
    alpha: float = 1.0


@dataclass(frozen=True)
class Sum:
    """r = x + terms, as `node` has it; without terms r is x."""

    node: Node
    x: Node
    terms: tuple[Term, ...]
    nodes: frozenset[Node]


@dataclass(frozen=True)
class Result:
    """A norm, its modulation and the casts behind it, up to `node`."""

    node: Node
    norm: Norm
    modulation: Modulation | None
    nodes: frozenset[Node]


def match_results(norm: Norm, total: Sum) -> list[Result]:
    """The norms of the same values as `norm` that one call can compute: one with its modulation, or two.

    Args:
        norm: the first of them.
        total: what it reads, as `match_sum` has it.
    """
    same = [
        found
        for found in norms_of(norm.input)
        if (found.kind, found.eps) == (norm.kind, norm.eps)
        and _stream(found) is _stream(norm)
        and all(v is None or tensor(v).dim() == 1 for v in (found.weight, found.bias))  # type: ignore[union-attr]
    ]
    results = [_result(found, total) for found in same]
    if not results:
        return []
    first = results[0]
    for other in results[1:]:
        alike = other.norm.weight_offset == first.norm.weight_offset and other.modulation is first.modulation is None
        if alike and tensor(other.node).dtype == tensor(first.node).dtype:  # type: ignore[union-attr]
            return [first, other]
    return [result for result in results if result.norm.node is norm.node]


def _result(norm: Norm, total: Sum) -> Result:
    modulation = match_modulation(norm.node)
    if modulation is not None:
        factors = [factor for factor in (modulation.scale, modulation.shift) if factor is not None]
        fits = all(_is_factor(factor, norm.node, lanes=True) for factor in factors)
        # one call cannot compute the sum and read what is computed of it
        if not fits or (total.terms and any(_depends(factor, norm.input) for factor in factors)):
            modulation = None
    node = norm.node if modulation is None else modulation.node
    nodes = set(norm.nodes) | (set() if modulation is None else set(modulation.nodes))
    while (cast := only_cast(node)) is not None and tensor(cast).dtype.itemsize <= tensor(node).dtype.itemsize:  # type: ignore[union-attr]
        node = cast
        nodes.add(cast)
    return Result(node, norm, modulation, frozenset(nodes))


def _depends(node: Node, on: Node) -> bool:
    """Whether a value is computed of another, or is it."""
    pending, seen = [node], set[Node]()
    while pending:
        current = pending.pop()
        if current is on:
            return True
        if current not in seen and on < current:
            seen.add(current)
            pending += current.all_input_nodes
    return False


def _stream(norm: Norm) -> Node:
    """The value that a norm reads as others see it: its input behind the casts that round it."""
    node = norm.input
    while (cast := only_cast(node)) is not None and cast in norm.nodes:
        if tensor(cast).dtype.itemsize > tensor(node).dtype.itemsize:  # type: ignore[union-attr]
            break
        node = cast
    return node


def match_sum(norm: Norm) -> Sum:
    """What a norm reads as a residual sum of one or two terms; else the value itself, without terms."""
    stream = _stream(norm)
    found = match_residual(norm.input)
    if found is None or len(found.terms) > 3:
        return Sum(stream, stream, (), frozenset())
    nodes = set(found.nodes)
    node = stream
    while node is not norm.input:
        nodes.add(node)
        node = call_of(node)["input"]  # type: ignore[index]
    plain = [t for t in found.terms if not t.factors and t.sign == 1]
    if not plain:
        return Sum(stream, stream, (), frozenset())
    # the one that is not a product is the stream; else any of the result's dtype
    plain.sort(key=lambda t: (in_memory(t.tensor), tensor(t.tensor).dtype != tensor(stream).dtype))  # type: ignore[union-attr]
    terms = [_term(t, norm.input) for t in found.terms if t is not plain[0]]
    if any(term is None for term in terms):
        return Sum(stream, stream, (), frozenset())
    return Sum(stream, plain[0].tensor, tuple(t for t in terms if t is not None), frozenset(nodes))


def _term(weighted: Weighted, total: Node) -> Term | None:
    alpha, gates = float(weighted.sign), []
    for factor in weighted.factors:
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            alpha *= factor
        else:
            gates.append(factor)
    if not gates:
        return Term(weighted.tensor, None, alpha)
    if len(gates) > 1 or not isinstance(gates[0], Node) or not _is_factor(gates[0], total, lanes=False):
        return None
    return Term(weighted.tensor, gates[0], alpha)


def _is_factor(factor: Node, to: Node, lanes: bool) -> bool:
    """Whether the op takes a factor: it broadcasts, over the lanes only where `lanes` allows one number a row."""
    if not broadcasts(factor, to):
        return False
    small, large = tensor(factor), tensor(to)
    assert small is not None and large is not None
    return not lanes or (small.dim() > 0 and equal(small.shape[-1], large.shape[-1]))
