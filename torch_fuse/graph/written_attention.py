"""Recogniser: softmax(q @ k.T * scale + mask) @ v written out, traced back from its result.

Casts, views, dropout, scaling, masking and biases between the two products are looked through and recorded. What is
an attention but neither `scaled_dot_product_attention` nor one with a soft cap or sinks (weights that are returned,
scores that are squared) has a `refusal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.linear import transposed_source
from torch_fuse.graph.product import Operand, Product, match_product
from torch_fuse.graph.score_steps import Cap, Factor, Fill, Term, Walk
from torch_fuse.graph.score_walk import alike, weights_of
from torch_fuse.graph.values import equal, same_shape, tensor, value


@dataclass(frozen=True)
class WrittenOut:
    """An attention written out.

    Attributes:
        node: the result; `product.dims` tells where its dimensions are.
        product: weights @ v.
        query: [*batch, S_q, head_dim], before any scaling.
        key: [*batch, S_k, head_dim], before any scaling.
        value: [*batch, S_k, value_dim].
        factors: what the product of query and key is multiplied by.
        terms: what is added to the scores, last first.
        fills: masks that replace scores, last first.
        softmax: the weights before dropout and casts.
        scores: the product of query and key.
        dropout_p: probability of dropping a weight.
        heads: (batch, heads) when a view between the products, or the products themselves, tell them apart.
        nodes: all nodes from the scores to the result.
        before: nodes that scale, cast or transpose query and key.
        refusal: why it is no attention that can be computed otherwise, or "".
        cap: the soft cap of the scores, between `factors` and all `terms` and `fills`, or None.
        sinks: [H], a score of each head that joins the softmax and whose weight is dropped, or None.
        sink_nodes: nodes that repeat the sinks.
    """

    node: Node
    product: Product
    query: Operand
    key: Operand
    value: Operand
    factors: tuple[Factor, ...]
    terms: tuple[Term, ...]
    fills: tuple[Fill, ...]
    softmax: Node
    scores: Node
    dropout_p: Any
    heads: tuple[Any, Any] | None
    nodes: frozenset[Node]
    before: frozenset[Node]
    refusal: str
    cap: Cap | None = None
    sinks: Node | None = None
    sink_nodes: frozenset[Node] = frozenset()


def match_written_out(node: Node) -> WrittenOut | None:
    """Recognises an attention written out whose result is `node`; None for anything else."""
    product = match_product(node)
    if product is None or product.addend is not None or product.alpha != 1 or not product.left.as_it_is:
        return None
    found = weights_of(product.left.node, Walk(frozenset({node})))
    if found is None:
        return None
    walk, scores = found
    dtype = tensor(node).dtype  # type: ignore[union-attr]
    factors = list(walk.factors)
    if scores.alpha != 1:
        factors.append(Factor(scores.alpha))
    terms = walk.terms
    refusal = walk.refusal
    if scores.addend is not None:
        if scores.beta != 1:
            refusal = refusal or "the bias is scaled by beta"
        terms = (*terms, Term(scores.addend, len(scores.dims), walk.factors))
    if walk.drops_sinks and walk.sinks is None:
        refusal = refusal or "the last column of the weights is dropped"
    if walk.cap is not None and (len(terms), len(walk.fills)) != (walk.cap.terms, walk.cap.fills):
        refusal = refusal or "the scores go through tanh after a mask or bias"
    before: set[Node] = set()
    query = _unscaled(scores.left, factors, dtype, before)
    key = _unscaled(_transposed(scores.right), factors, dtype, before)
    written = WrittenOut(
        node, product, query, key, product.right, tuple(factors), terms, walk.fills, walk.softmax,  # type: ignore[arg-type]
        scores.node, walk.dropout_p, _heads(walk.heads, scores, product), walk.nodes, frozenset(before), refusal,
        walk.cap, walk.sinks, walk.sink_nodes,
    )  # fmt: skip
    return replace(written, refusal=refusal or _escape(written))


def _heads(seen: tuple[Any, Any] | None, *products: Product) -> tuple[Any, Any] | None:
    for product in products:
        sizes = product.left.sizes()
        if len(sizes) == 4:
            return sizes[0], sizes[1]
    return seen


def _escape(written: WrittenOut) -> str:
    for node in written.nodes - {written.node}:
        for user in node.users:
            if user in written.nodes or (user.op != "output" and not _carries_tensor(user)) or _reads_kind(user, node):
                continue
            if _before_softmax(node, written):
                return "the scores before the softmax are used elsewhere too"
            return "the attention weights are used elsewhere too (output_attentions)"
    return ""


def _reads_kind(user: Node, node: Node) -> bool:
    """Whether a node reads the shape or the dtype of another only: `mask.expand_as(scores)`."""
    call = call_of(user)
    like = call is not None and call.op in ("cast", "expand_as", "view_as", "reshape_as")
    return like and call["input"] is not node  # type: ignore[index]


def _before_softmax(node: Node, written: WrittenOut) -> bool:
    frontier, seen = [written.softmax], set()
    while frontier:
        current = frontier.pop()
        for source in current.all_input_nodes:
            if source in written.nodes and source not in seen:
                seen.add(source)
                frontier.append(source)
    return node in seen


def _carries_tensor(node: Node) -> bool:
    found = value(node)
    return found is None or isinstance(found, (torch.Tensor, tuple, list))


# -- from the scores to query and key ------------------------------------------------------------------------------


def _transposed(operand: Operand) -> Operand:
    """[*batch, S_k, head_dim] of a factor [*batch, head_dim, S_k], without a transpose in the graph if possible."""
    if operand.as_it_is:
        source = transposed_source(operand.node)
        if source is not None:
            return Operand(source, operand.dims)
    return operand.transposed()


def _unscaled(operand: Operand, factors: list[Factor], dtype: torch.dtype, nodes: set[Node]) -> Operand:
    """Query or key before it is scaled by a number and cast up from `dtype`; `factors` and `nodes` are extended."""
    for _ in range(6):
        node = operand.node
        call, found = call_of(node), tensor(node)
        if call is None or found is None or call.inplace:
            break
        if call.op == "cast":
            source = tensor(call["input"])
            if source is None or source.dtype not in (dtype, found.dtype) or source.device != found.device:
                break
            if source.dtype != found.dtype and source.dtype.itemsize >= found.dtype.itemsize:
                break
            source_node = call["input"]
        elif call.op in ("mul", "div") and (scaled := _number_operand(call, node)) is not None:
            source_node, number = scaled
            factors.append(Factor(number, call.op == "div"))
        elif operand.transposed().as_it_is and (source_node := transposed_source(node)) is not None:
            operand = operand.transposed()
        else:
            break
        nodes.add(node)
        operand = Operand(source_node, operand.dims)
    return operand


def _number_operand(call: Call, node: Node) -> tuple[Node, Any] | None:
    sides = [(call["input"], call["other"])] + ([(call["other"], call["input"])] if call.op == "mul" else [])
    for source, number in sides:
        plain = isinstance(number, (int, float)) or (isinstance(number, Node) and tensor(number) is None)
        if not (plain and isinstance(source, Node) and alike(source, node)):
            continue
        if tensor(source).dtype == tensor(node).dtype:  # type: ignore[union-attr]
            return source, number
    return None


def batch_sizes(written: WrittenOut) -> tuple[Any, Any] | None:
    """(batch, heads): as the graph tells them apart, (1, N) for N matrices, None when it does not tell clearly."""
    products = (written.query, written.key, written.value)
    shapes: list[Sequence[Any]] = [operand.sizes()[:-2] for operand in products]
    shapes += [x.shape[:-2] for x in map(tensor, written.nodes - {written.node}) if x is not None]
    if any(len(shape) > 2 for shape in shapes):
        return None
    if written.heads is None:
        count = written.query.sizes()[0]
        known = all(equal(shape[0], count) or equal(shape[0], 1) for shape in shapes[: len(products)])
        return (1, count) if known else None
    merged = (written.heads[0] * written.heads[1],)
    for shape in shapes[len(products) :]:
        if not same_shape(shape, written.heads if len(shape) == 2 else merged):
            return None
    return written.heads
