"""A decoding step of attention on a static cache: RoPE, append and attention to what is there, in one op.

Before: q, k = rope(q, cos, sin), rope(k, cos, sin)
        positions = arange(Q) + length;  length += Q
        keys.index_copy_(2, positions, k);  values.index_copy_(2, positions, v)
        scaled_dot_product_attention(q, keys, values, attn_mask=mask)
After:  decode_attention(q, k, v, cos, sin, keys, values, length, None, mask)          # and an RMSNorm of q and k

For every transformers model with a StaticCache, as `generate(cache_implementation="static")` compiles it: one or a few
new tokens, grouped or multi-query heads, repeated or not, partial or full RoPE. Any boolean mask is right, since the op
reads it; it need not be proven to mean anything.
Wins on CUDA: SDPA with a mask reads the whole cache, the op reads the tokens that are there, and it takes two launches
where Inductor takes six.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from torch_fuse.graph.attention import Attention, expanded_heads
from torch_fuse.graph.cache import Append, appended, match_append, match_counter, readers_before
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import mutated
from torch_fuse.graph.heads import Heads, match_heads
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import equal, same_shape, static_int, storages, tensor, unequal
from torch_fuse.kernels import decode_attention
from torch_fuse.options import Options
from torch_fuse.patterns._once import once
from torch_fuse.patterns._rope_tables import emit_tables
from torch_fuse.patterns.decode_norm_linear import of_subclass, unmeasured
from torch_fuse.patterns.norm_qkv_rope_attention import check_same_rope, emit_heads, emit_weight
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

MAX_QUERIES = decode_attention.MAX_QUERIES


@register
class DecodeAttention(Pattern):
    """RoPE, cache append and attention of a decoding step, for the tokens that are in the cache."""

    name = "decode_attention"
    kind = "attention"
    op = "torch_fuse::decode_attention"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if attention.written is not None or not few_queries(attention):
            return None
        key_heads, key_nodes = expanded_heads(attention.key)
        value_heads, value_nodes = expanded_heads(attention.value)
        if not (_writes_in_place(key_heads) and _writes_in_place(value_heads)):
            _check_no_other_cache(key_heads, view, anchor)
            return None
        keys, values = (match_append(node, view.order, anchor) for node in (key_heads, value_heads))
        _check_attention(attention, keys, values, view)
        query = match_heads(attention.query, view.order, view.fake_mode)
        known = () if query.rope is None else (query.rope.cos, query.rope.sin)
        key = match_heads(keys.source, view.order, view.fake_mode, known)
        measured = view.options.unmeasured or view.options.kernels == "reference"  # the norms have not run on a GPU
        if not measured or not _normed_alike(query, key):
            query, key = query.without_norm(), key.without_norm()
        if query.as_one or key.as_one:
            raise Miss("query and key are rotated before they are cut into heads", anchor)
        if query.rope is None or key.rope is None:
            query, key = _unturned(attention.query, query), _unturned(keys.source, key)
        else:
            check_same_rope(query, key, view)
        counter = match_counter(keys.positions, view.order, anchor)
        region = {anchor, keys.write, values.write, *key_nodes, *value_nodes, *query.nodes, *key.nodes}
        if counter is not None:
            region |= counter.nodes
        _check_cache_unseen(keys, values, region, view, anchor)
        tables = () if query.rope is None else (query.rope.cos, query.rope.sin)
        position = keys.positions if counter is None else counter.length
        inputs = (
            query.source, key.source, values.source, *tables, keys.cache, values.cache, position, attention.mask,
            *(heads.norm.weight for heads in (query, key) if heads.norm is not None),
        )  # fmt: skip
        bindings = {"attention": attention, "query": query, "key": key, "keys": keys, "values": values,
                    "counter": counter}  # fmt: skip
        size = tensor(keys.cache).shape[2]  # type: ignore[union-attr]
        note = f"{tensor(attention.query).shape[2]} new token(s), cache of {size}"  # type: ignore[union-attr]
        return Match(anchor, bindings, (anchor,), frozenset(region), inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        if reason := of_subclass(match.inputs):
            return reason
        if options.kernels == "reference":
            return None
        attention, keys = match.bindings["attention"], match.bindings["keys"]
        query, cache = tensor(attention.query), tensor(keys.cache)
        assert query is not None and cache is not None
        if not options.unmeasured:
            if static_int(query.shape[0]) != 1 or static_int(query.shape[2]) != 1:
                return "a decoding step's attention is measured to win for a single token only"
            if reason := unmeasured(attention.query):
                return reason
        reason = decode_attention.supports(query.transpose(1, 2), cache.transpose(1, 2), cache)
        return None if reason is None else f"the kernel cannot run: {reason}"

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        found = match.bindings
        attention, query, key, counter = (found[name] for name in ("attention", "query", "key", "counter"))
        rope = query.rope
        tables = None if rope is None else emit_tables(query, builder, options)
        dim = tensor(attention.query).shape[3]  # type: ignore[union-attr]
        new = builder.call(
            decode_attention.decode_attention,
            _emit_new(query, builder),
            _emit_new(key, builder),
            with_lanes(builder.call("transpose", found["values"].source, 1, 2), builder),
            None if tables is None else once(tables.cos, builder),
            None if tables is None else once(tables.sin, builder),
            found["keys"].cache,
            found["values"].cache,
            None if counter is None else counter.length,
            found["keys"].positions if counter is None else None,
            emit_mask(attention, builder),
            0 if rope is None else rope.rotary_dim,
            False if rope is None else rope.interleaved,
            [] if tables is None else tables.cos_lanes,
            [] if tables is None else tables.sin_lanes,
            dim**-0.5 if attention.scale is None else float(attention.scale),
            options.early_launch,
            emit_weight(query, builder),
            emit_weight(key, builder),
            0.0 if query.norm is None else query.norm.eps,
            0.0 if query.norm is None else query.norm.weight_offset,
        )
        return {match.anchor: builder.call("transpose", new, 1, 2)}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns._decode_attention_examples import SPELLINGS, step

        for name, changes in SPELLINGS.items():
            yield Example(name, step(**changes))

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns._decode_attention_examples import NEAR_MISSES, step

        for name, changes in NEAR_MISSES.items():
            yield Example(name, step(**changes), fuses=False)


def few_queries(attention: Attention) -> bool:
    query = tensor(attention.query)
    queries = None if query is None or query.dim() != 4 else static_int(query.shape[2])
    return queries is not None and 1 <= queries <= MAX_QUERIES


def _writes_in_place(node: Node) -> bool:
    """Whether a key or value is an input that somebody writes to, or the result of such a write."""
    call = call_of(node)
    if call is not None and call.op == "index_copy":
        return call.inplace
    return node.op in ("placeholder", "get_attr") and any(
        (call := call_of(user)) is not None and (call.inplace or call.op == "setitem") for user in node.users
    )


def _check_no_other_cache(keys: Node, view: GraphView, anchor: Node) -> None:
    """Raises Kept, with the reason, where the keys come from a cache that the op does not append to."""
    if appended(keys, view.order, anchor) is not keys:
        raise Kept(
            "the cache is a new tensor at each step (cat): RoPE is fused up to it; a StaticCache is written in place",
            keys,
        )
    before = [node for node in view.order.writers if view.order.index[node] < view.order.index[anchor]]
    write = next((node for node in before if any(storages(x) & storages(keys) for x in mutated(node))), None)
    if keys.op in ("placeholder", "get_attr") and write is not None:
        raise Kept(f"the cache is written whole by {write.name}: a full sliding window moves all of its keys", write)


def _check_attention(attention: Attention, keys: Append, values: Append, view: GraphView) -> None:
    """Raises Miss unless the op computes this attention."""
    node = attention.node
    query, key, value, mask = (tensor(x) for x in (attention.query, keys.cache, values.cache, attention.mask))
    assert query is not None and key is not None and value is not None
    if mask is None:
        raise Miss("the whole cache is attended to: there is no mask", node)
    if attention.is_causal is not False or attention.dropout_p != 0:
        raise Miss("the attention has a mask and is_causal, or dropout", node)
    if mask.dtype != torch.bool:
        raise Miss(f"the mask is {mask.dtype}, not boolean", node)
    if unequal(mask.shape[-1], key.shape[2]):
        raise Miss("the mask has one value for all keys", node)
    if not (attention.scale is None or isinstance(attention.scale, (int, float))):
        raise Miss("the scale is no constant", node)
    if static_int(query.shape[1]) is None or static_int(query.shape[3]) is None or static_int(key.shape[1]) is None:
        raise Miss("heads or head_dim are not static", node)
    others = all(equal(key.shape[i], value.shape[i]) for i in (0, 1, 3))
    if not others or unequal(key.shape[2], value.shape[2]) or key.dtype != query.dtype or value.dtype != query.dtype:
        raise Miss("key cache, value cache and query differ in shape or dtype", node)
    if key.stride(3) != 1 or value.stride(3) != 1:
        raise Miss("the lanes of the cache do not lie side by side", node)
    new = tensor(keys.source)
    assert new is not None
    expected = (query.shape[0], key.shape[1], query.shape[2], query.shape[3])
    if not (same_shape(new.shape, expected) and same_shape(tensor(values.source).shape, expected)):  # type: ignore[union-attr]
        raise Miss("other tokens are appended than those that attend", keys.write)
    if not view.order.same_value(keys.positions, values.positions):
        raise Miss("keys and values are appended at different positions", values.write)
    if storages(keys.cache) & storages(values.cache):
        raise Miss("keys and values share a cache", values.write)
    if any(x.requires_grad for x in (query, new)):
        raise Miss("gradients are wanted, and a decoding step has none", node)


def _check_cache_unseen(keys: Append, values: Append, region: set[Node], view: GraphView, anchor: Node) -> None:
    """Raises Miss when anything but the attention sees the cache before it.

    What is read before the write counts too: Inductor may compute it after the op, from the new cache.
    """
    found = storages(keys.cache) | storages(values.cache)
    seen = [node for append in (keys, values) for node in append.write.users]
    for node in (*seen, *readers_before(found, view.order, anchor)):
        if node not in region:
            raise Miss(f"{node.name} reads the cache before the attention does", node)


def _normed_alike(query: Heads, key: Heads) -> bool:
    """Whether the op can do the norms of query and key: an RMSNorm of each rotated head with one weight for all."""
    a, b = query.norm, key.norm
    if a is None or b is None or query.rope is None or key.rope is None:
        return False
    weights = [None if norm.weight is None else tensor(norm.weight) for norm in (a, b)]
    plain = all(w is not None and w.dim() == 1 and equal(w.shape[0], query.head_dim) for w in weights)
    own = all(tensor(norm.input).dtype == tensor(h.result).dtype for norm, h in ((a, query), (b, key)))  # type: ignore[union-attr]
    same = (a.kind, query.scope, a.eps, a.weight_offset) == (b.kind, key.scope, b.eps, b.weight_offset)
    return plain and own and same and (a.kind, query.scope) == ("rms", "head") and a.eps is not None


def _unturned(node: Node, heads: Heads) -> Heads:
    """A query or key as it is, with all that is computed of it left outside."""
    return Heads(node, (0, 1, 2, 3), node, (), (0, 1, 2, 3), 0, heads.head_dim, None, None, "head", frozenset())


def _emit_new(heads: Heads, builder: Builder) -> Node:
    return with_lanes(emit_heads(heads, builder), builder)


def with_lanes(node: Node, builder: Builder) -> Node:
    """A value whose lanes lie side by side."""
    return node if equal(tensor(node).stride(3), 1) else builder.call("contiguous", node)  # type: ignore[union-attr]


def emit_mask(attention: Attention, builder: Builder) -> Node:
    """The mask [B or 1, H or 1, Q, S]; all queries may share a row of it."""
    node, query = attention.mask, tensor(attention.query)
    assert node is not None and query is not None
    for _ in range(4 - tensor(node).dim()):  # type: ignore[union-attr]
        node = builder.shared("unsqueeze", node, 0)
    node = once(node, builder)
    if equal(tensor(node).shape[2], query.shape[2]):  # type: ignore[union-attr]
        return node
    return builder.shared("expand", node, -1, -1, static_int(query.shape[2]), -1)
