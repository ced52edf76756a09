"""Recogniser: softmax(q @ k.T * scale + mask) @ v, as `scaled_dot_product_attention` or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.values import equal, same_shape, static_int, tensor
from torch_fuse.graph.written_attention import WrittenOut, match_written_out


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        node: the result [B, num_heads, S_q, head_dim].
        query: [B, num_heads, S_q, head_dim], before any scaling.
        key: [B, num_kv_heads or num_heads, S_k, head_dim].
        value: [B, num_kv_heads or num_heads, S_k, head_dim].
        mask: boolean (True: attend) or additive mask, or None.
        is_causal: queries attend to keys up to their own index.
        scale: factor of the scores, or None for 1 / sqrt(head_dim).
        dropout_p: probability of dropping an attention weight.
        written: how it is spelled with matmul and softmax, or None; then `mask` is one of its masks, and `scale` is
            None.
        nodes: the nodes of the attention itself.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    is_causal: bool = False
    scale: Any = None
    dropout_p: Any = 0.0
    written: WrittenOut | None = None
    nodes: frozenset[Node] = field(default_factory=frozenset)

    @property
    def heads_first(self) -> bool:
        """Whether query and key are [B, num_heads, S, head_dim]; an einsum takes other orders, bmm three dimensions."""
        operands = () if self.written is None else (self.written.query, self.written.key)
        return all(operand.as_it_is and len(operand.dims) == 4 for operand in operands)


def match_attention(node: Node) -> Attention | None:
    """Recognises an attention whose result is `node`; None for anything else."""
    call = call_of(node)
    if call is None or call.op != "scaled_dot_product_attention":
        return _written_out(node)
    query, key, values = call["query"], call["key"], call["value"]
    found = [tensor(x) for x in (query, key, values)]
    if any(x is None or x.dim() < 3 for x in found):
        return None
    return Attention(
        node, query, key, values, call["attn_mask"], call["is_causal"], call["scale"], call["dropout_p"],
        nodes=frozenset({node}),
    )  # fmt: skip


def _written_out(node: Node) -> Attention | None:
    written = match_written_out(node)
    if written is None:
        return None
    masks = [term.node for term in written.terms] + [fill.mask for fill in written.fills]
    return Attention(
        node, written.query.node, written.key.node, written.value.node, masks[0] if masks else None,
        dropout_p=written.dropout_p, written=written, nodes=written.nodes,
    )  # fmt: skip


def expanded_heads(node: Node) -> tuple[Node, set[Node]]:
    """Looks through the repetition of key and value heads for grouped-query attention.

    Returns:
        The unrepeated [B, num_kv_heads, S, head_dim] and the nodes looked through; `node` itself and no nodes when
        heads are not repeated one after the other (repeat_interleave order).
    """
    result = tensor(node)
    call = call_of(node)
    if result is None or result.dim() != 4 or call is None:
        return node, set()
    if call.op == "repeat_interleave" and call["dim"] in (1, -3) and isinstance(call["repeats"], int):
        return call["input"], {node}
    if call.op not in ("reshape", "flatten", "contiguous", "view"):
        return node, set()
    nodes, chain = {node}, call["input"]
    grown = tensor(chain)
    expand = call_of(chain)
    if grown is None or grown.dim() != 5 or expand is None or expand.op not in ("expand", "expand_as"):
        return node, set()
    single = tensor(expand["input"])
    unsqueezed = call_of(expand["input"])
    if single is None or single.dim() != 5 or static_int(single.shape[2]) != 1 or unsqueezed is None:
        return node, set()
    if unsqueezed.op == "getitem":
        index = unsqueezed["index"]
        if not isinstance(index, tuple) or any(part not in (None, Ellipsis, slice(None)) for part in index):
            return node, set()
    elif unsqueezed.op != "unsqueeze":
        return node, set()
    source = unsqueezed["input"]
    found = tensor(source)
    outer = found is not None and found.dim() == 4 and same_shape(found.shape[:2], single.shape[:2])
    if not outer or not same_shape(found.shape[2:], single.shape[3:]):  # type: ignore[union-attr]
        return node, set()
    if not equal(result.shape[1], grown.shape[1] * grown.shape[2]):
        return node, set()
    return source, {*nodes, chain, expand["input"]}


def unrepeated_heads(key: Node, value: Node) -> tuple[Node, Node, set[Node]]:
    """Key and value heads before their repetition, and the nodes looked through.

    As they are, with no nodes, unless both are proven to be repeated equally often, in order.
    """
    (k, k_nodes), (v, v_nodes) = _unrepeated(key), _unrepeated(value)
    x, y = tensor(k), tensor(v)
    if x is None or y is None or not same_shape(x.shape, y.shape):
        return key, value, set()
    return k, v, k_nodes | v_nodes


def _unrepeated(node: Node) -> tuple[Node, set[Node]]:
    source, nodes = expanded_heads(node)
    before, after = tensor(source), tensor(node)
    if not nodes or before is None or after is None or before.dim() != 4:
        return node, set()
    same = equal(before.shape[0], after.shape[0]) and same_shape(before.shape[2:], after.shape[2:])
    return (source, nodes) if same and all(_regular(x) for x in nodes) else (node, set())


def _regular(node: Node) -> bool:
    call = call_of(node)
    if call is None:
        return False
    if call.op == "repeat_interleave":
        return isinstance(call["repeats"], int)
    if call.op == "getitem":
        index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
        return all(i is None or i is Ellipsis or i == slice(None) for i in index)
    return not call.inplace


def attentions(nodes: list[Node]) -> Iterator[Attention]:
    """All attentions of a graph, in order."""
    for node in nodes:
        found = match_attention(node)
        if found is not None:
            yield found
