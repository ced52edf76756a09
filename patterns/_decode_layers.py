"""One decoder layer of a decoding step, found among the ops that replaced its parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import mutated
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import same_shape, static_int, tensor
from torch_fuse.kernels import decode_attention, linear_residual_gemv, norm_linear_gemv
from torch_fuse.patterns._decode_views import MOST_VIEWS, replayed, source_of

_MOST_LEFT_OVER = 64


class Geometry(NamedTuple):
    """What is the same in all layers of a stack: `decode_stack`'s options, in its order."""

    parallel: bool
    norm: str
    eps: float
    weight_offset: float
    activation: str
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    layout: tuple[int, ...]
    rotary_dim: int
    interleaved: bool
    cos_lanes: tuple[int, ...]
    sin_lanes: tuple[int, ...]
    scale: float
    qk_eps: float
    qk_weight_offset: float


@dataclass(frozen=True)
class Layer:
    """A decoder layer for one token.

    Attributes:
        attention: its attention op.
        stream: the residual stream [1, 1, K] in front of it.
        out: the stream behind it.
        geometry: its constants.
        weights: `decode_stack`'s lists, by name: what this layer adds to each.
        head_norms: weights of the norms of query and key, or two times None.
        tables: cos and sin, or two times None.
        caches: of keys and values.
        length: the counter of the tokens in the caches, which the op counts up; None when `positions` are given.
        positions: where the token goes.
        mask: [1, 1, 1, S].
        nodes: all nodes of the layer.
    """

    attention: Node
    stream: Node
    out: Node
    geometry: Geometry
    weights: dict[str, tuple[Node | None, ...]]
    head_norms: tuple[Node | None, Node | None]
    tables: tuple[Node | None, Node | None]
    caches: tuple[Node, Node]
    length: Node | None
    positions: Node | None
    mask: Node
    nodes: frozenset[Node]


class Linear(NamedTuple):
    """What one result of `norm_linear_gemv` is computed of."""

    call: Node
    weights: tuple[Node, ...]
    biases: tuple[Node | None, ...]
    norm: tuple[Node | None, Node | None]
    activation: str


def is_call(node: object, module: ModuleType) -> bool:
    """Whether a node calls a module's op, or its reference."""
    op = getattr(module, module.__name__.rpartition(".")[2])
    return (
        isinstance(node, Node) and node.op == "call_function" and node.target in (op, getattr(module, "reference", op))
    )


def match_layer(attention: Node) -> Layer:
    """The layer around an attention op.

    Raises:
        Miss: with the reason why it is not one that `decode_stack` computes, or Kept when something else reads a value
            inside of it.
    """
    a = _arguments(attention, decode_attention)
    nodes = {attention}
    heads, kv_heads, head_dim = _sizes(a, attention)
    sources = [_projection(x, nodes) for x in (a.q, a.k, a.v)]
    outputs = list(dict.fromkeys(output for output, _ in sources))
    if len(outputs) not in (1, 3):
        raise Miss(f"query, key and value come from {len(outputs)} products; allowed: one or three", attention)
    layout = tuple(n for output, rows in sources for n in (outputs.index(output), *rows))
    ins = [linear_of(output)[1] for output in outputs]
    first = _norm_linear(ins[0].call)
    stream = first.x
    if any(linear.norm != ins[0].norm or linear.activation != "none" or len(linear.weights) > 1 for linear in ins):
        raise Miss("query, key and value differ in their norms, or have an activation", attention)
    residual, attended = _into_residual(attention, nodes)
    r = _arguments(residual, linear_residual_gemv)
    out = [(r.w1, r.b1), (r.w2, r.b2)] if attended is r.x1 else [(r.w2, r.b2), (r.w1, r.b1)]
    parallel = r.x2 is not None
    if r.residual is not stream or (attended is r.x1) == (attended is r.x2):
        raise Miss("the sum behind attention is not with the residual stream in front of its norm", residual)
    if parallel:
        hidden, end, down = r.x2 if attended is r.x1 else r.x1, residual, out[1]
        inner = stream
    else:
        inner, hidden, end = residual, *_sequential(residual, nodes)
        e = _arguments(end, linear_residual_gemv)
        down = (e.w1, e.b1)
    up = linear_of(source_of(hidden, _is_output, nodes))[1]
    second = _norm_linear(up.call)
    for linear, wanted in (*((linear, stream) for linear in ins), (up, inner)):
        call = _norm_linear(linear.call)
        if call.x is not wanted:
            raise Miss(f"{linear.call.name} reads another value than the residual stream", linear.call)
        if (call.norm, call.eps, call.weight_offset) != (first.norm, first.eps, first.weight_offset):
            raise Miss("the norms of a layer differ in kind or epsilon", linear.call)
    nodes |= {linear.call for linear in (*ins, up)} | {residual, end}
    check_unread(nodes, end)
    return Layer(
        attention, stream, end,
        Geometry(
            parallel, first.norm, first.eps, first.weight_offset, up.activation, bool(second.gated), heads, kv_heads,
            head_dim, layout, a.rotary_dim, a.interleaved, tuple(a.cos_lanes), tuple(a.sin_lanes), a.scale,
            a.norm_eps, a.norm_offset,
        ),
        {
            "norm_weights": (ins[0].norm[0], up.norm[0]), "norm_biases": (ins[0].norm[1], up.norm[1]),
            "in_weights": tuple(linear.weights[0] for linear in ins),
            "in_biases": tuple(linear.biases[0] for linear in ins),
            "up_weights": up.weights, "up_biases": up.biases,
            "out_weights": (out[0][0],), "out_biases": (out[0][1],),
            "down_weights": (down[0],), "down_biases": (down[1],),
        },
        (a.q_weight, a.k_weight), (a.cos, a.sin), (a.key_cache, a.value_cache), a.length, a.positions, a.mask, frozenset(nodes),
    )  # fmt: skip


def tensors_of(layer: Layer) -> Iterator[tuple[str, Node | None]]:
    """All that a layer reads besides the stream, with names for messages."""
    for name, nodes in layer.weights.items():
        for node in nodes:
            yield name, node
    yield from zip(("q_norm_weights", "k_norm_weights"), layer.head_norms, strict=True)
    yield from zip(("cos", "sin"), layer.tables, strict=True)
    yield from zip(("key_caches", "value_caches"), layer.caches, strict=True)
    yield "lengths", layer.length
    yield "positions", layer.positions
    yield "masks", layer.mask


def _sizes(a: SimpleNamespace, attention: Node) -> tuple[int, int, int]:
    """Heads, heads of keys, lanes of a head."""
    query, mask = tensor(a.q), tensor(a.mask)
    assert query is not None and mask is not None
    batch, tokens, heads, head_dim = query.shape
    if batch != 1 or tokens != 1:
        raise Miss(f"a step of {batch} sequence(s) and {tokens} token(s): the stack takes one token of one", attention)
    if not same_shape(mask.shape[:3], (1, 1, 1)):
        raise Miss(f"the mask has shape {list(mask.shape)}: one a head", attention)
    kv_heads = static_int(tensor(a.k).shape[2])  # type: ignore[union-attr]
    assert kv_heads is not None  # decode_attention takes static heads only
    return int(heads), kv_heads, int(head_dim)


def _projection(node: Node, nodes: set[Node]) -> tuple[Node, tuple[int, int]]:
    """The product that query, key or value [1, 1, H, D] is a view of, its first row and the rows from head to head."""
    source, rows = replayed(node, _is_output, nodes)
    count, dim = rows.shape[2:]
    first, step = int(rows[0, 0, 0, 0]), int(rows[0, 0, 1, 0] - rows[0, 0, 0, 0]) if count > 1 else int(dim)
    if not torch.equal(rows[0, 0], first + step * torch.arange(count)[:, None] + torch.arange(dim)):
        raise Miss(f"the heads of {node.name} are not rows side by side of a product", node)
    return source, (first, step)


def _into_residual(node: Node, nodes: set[Node]) -> tuple[Node, Node]:
    """The residual sum that a value goes into, over views that keep its order, and the input of it that it is."""
    end = node
    for _ in range(MOST_VIEWS):
        if len(end.users) != 1:
            raise Kept(f"{end.name} is read {len(end.users)} times inside of a layer", end)
        (user,) = end.users
        if is_call(user, linear_residual_gemv):
            source_of(end, lambda below: below is node, nodes)
            return user, end
        end = user
    raise Miss(f"{node.name} does not go into the product in front of a residual sum", node)


def _sequential(stream: Node, nodes: set[Node]) -> tuple[Node, Node]:
    """The hidden value of the MLP that reads a stream, and the residual sum behind it."""
    calls = [user for user in stream.users if is_call(user, norm_linear_gemv)]
    if len(calls) != 1 or len(calls[0].users) != 1:
        raise Miss(f"{stream.name} goes into {len(calls)} products behind norms; a layer's MLP has one", stream)
    (hidden,) = calls[0].users
    end, found = _into_residual(hidden, nodes)
    e = _arguments(end, linear_residual_gemv)
    if e.residual is not stream or e.x1 is not found or e.x2 is not None:
        raise Miss("the sum behind the MLP is not with the residual stream in front of its norm", end)
    return found, end


def check_unread(nodes: set[Node], out: Node) -> None:
    """Adds what is left over of earlier rewrites, and raises Kept when anything else reads a node besides `out`."""
    for node in list(nodes - {out}):
        for user in node.users:
            if user not in nodes:
                left = _left_over(user, nodes)
                if left is None:
                    raise Kept(f"{user.name} reads {node.name}, which a stack does not return", user)
                nodes |= left


def _left_over(node: Node, nodes: set[Node]) -> set[Node] | None:
    """A node and all that is computed of it, when nothing comes of it; None when something does."""
    found = {node}
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == "output" or node.is_impure() or mutated(node) or len(found) > _MOST_LEFT_OVER:
            return None
        new = [user for user in node.users if user not in found and user not in nodes]
        found.update(new)
        pending += new
    return found


# -- the ops' results ----------------------------------------------------------------------------------------------


@cache
def _signature(module: ModuleType) -> inspect.Signature:
    return inspect.signature(module.reference)


def _arguments(node: Node, module: ModuleType) -> SimpleNamespace:
    bound = _signature(module).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _norm_linear(node: Node) -> SimpleNamespace:
    return _arguments(node, norm_linear_gemv)


def _is_output(node: Node) -> bool:
    call = call_of(node)
    return call is not None and call.op == "getitem" and is_call(call["input"], norm_linear_gemv)


def linear_of(output: Node) -> tuple[SimpleNamespace, Linear]:
    """The arguments of the op that a value is a result of, and what it is computed of."""
    call, index = output.args
    if not isinstance(call, Node) or not isinstance(index, int) or index < 0:
        raise Miss(f"{output.name} is no single result of its op", output)
    a = _norm_linear(call)
    part = slice(0, 2) if a.gated else slice(index, index + 1)
    activation = a.activations.split(",")[part.start]
    if a.gated and a.activations.split(",")[1] != "none":
        raise Miss("both halves of the gated unit have an activation", call)
    return a, Linear(
        call, tuple(a.weights[part]), tuple(a.biases[part]), (a.norm_weights[part.start], a.norm_biases[part.start]),
        activation,
    )  # fmt: skip
