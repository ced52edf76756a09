"""A decoding step of attention on a paged cache: keys and values are read where the block table says.

Before: keys = key_cache[block_table].flatten(1, 2).transpose(1, 2);  values = value_cache[block_table]...
        scaled_dot_product_attention(q, keys, values, attn_mask=mask)
After:  paged_decode_attention(q, key_cache, value_cache, block_table, mask)

For models that write paged attention out (block tables as in vLLM, an index for each key as in transformers' continuous
batching): one to eight query tokens, grouped or multi-query heads, blocks [block, H, D] or [H, block, D]. What is
appended before stays with Inductor, which writes it in place.
Wins on CUDA: the gathered keys and values, written and read again, are three quarters of what the graph moves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from torch_fuse.graph.attention import Attention, expanded_heads
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.paged import Paged, match_paged
from torch_fuse.graph.values import equal, same_shape, static_int, tensor
from torch_fuse.kernels import paged_decode_attention
from torch_fuse.options import Options
from torch_fuse.patterns.decode_attention import MAX_QUERIES, emit_mask, few_queries, with_lanes
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class PagedDecodeAttention(Pattern):
    """Gather by a block table and attention of a few queries, without writing what is gathered."""

    name = "paged_decode_attention"
    kind = "attention"
    op = "torch_fuse::paged_decode_attention"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if attention.written is not None:
            return None
        (key_heads, key_nodes), (value_heads, value_nodes) = map(expanded_heads, (attention.key, attention.value))
        keys, values = match_paged(key_heads), match_paged(value_heads)
        if keys is None or values is None:
            return None
        if not few_queries(attention):
            raise Kept(f"more than {MAX_QUERIES} queries read the paged cache, or a number that is not static", anchor)
        _check(attention, keys, values, key_heads, value_heads, view)
        assert attention.mask is not None
        region = frozenset({anchor, *key_nodes, *value_nodes, *keys.nodes, *values.nodes})
        inputs = (attention.query, keys.cache, values.cache, keys.table, values.table, attention.mask)
        bindings = {"attention": attention, "keys": keys, "values": values}
        page = 1 if keys.page is None else tensor(keys.cache).shape[keys.page]  # type: ignore[union-attr]
        note = f"{tensor(attention.query).shape[2]} token(s), blocks of {page}"  # type: ignore[union-attr]
        return Match(anchor, bindings, (anchor,), region, inputs, note)

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        if not options.unmeasured:
            return "a decoding step on a paged cache is not measured to win yet"
        query = tensor(match.bindings["attention"].query)
        keys = match.bindings["keys"]
        cache = tensor(keys.cache)
        assert query is not None and cache is not None
        heads = 1 if keys.heads is None else cache.shape[keys.heads]
        like = query.new_empty(0).as_strided((1, 1, heads, query.shape[3]), (0, 0, 0, 0))
        reason = paged_decode_attention.supports(query.transpose(1, 2), like)
        return None if reason is None else f"the kernel cannot run: {reason}"

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        attention, keys, values = (match.bindings[name] for name in ("attention", "keys", "values"))
        dim = tensor(attention.query).shape[3]  # type: ignore[union-attr]
        one_sequence = tensor(keys.table).dim() == 1  # type: ignore[union-attr]
        new = builder.call(
            paged_decode_attention.paged_decode_attention,
            with_lanes(builder.call("transpose", attention.query, 1, 2), builder),
            _emit_cache(keys, builder),
            _emit_cache(values, builder),
            builder.shared("unsqueeze", keys.table, 0) if one_sequence else keys.table,
            emit_mask(attention, builder),
            dim**-0.5 if attention.scale is None else float(attention.scale),
            options.early_launch,
        )
        return {match.anchor: builder.call("transpose", new, 1, 2)}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns._paged_examples import SPELLINGS, step

        for name, changes in SPELLINGS.items():
            yield Example(name, step(**changes))

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns._paged_examples import NEAR_MISSES, step

        for name, changes in NEAR_MISSES.items():
            yield Example(name, step(**changes), fuses=False)


def _check(
    attention: Attention, keys: Paged, values: Paged, key_heads: Node, value_heads: Node, view: GraphView
) -> None:
    """Raises Miss unless the op computes this attention."""
    node = attention.node
    query, mask, key, value = (tensor(x) for x in (attention.query, attention.mask, key_heads, value_heads))
    key_cache, value_cache = tensor(keys.cache), tensor(values.cache)
    assert query is not None and key is not None and value is not None
    assert key_cache is not None and value_cache is not None
    if mask is None:
        raise Miss("every key of the gathered blocks is attended to: there is no mask", node)
    if attention.is_causal is not False or attention.dropout_p != 0:
        raise Miss("the attention has a mask and is_causal, or dropout", node)
    if mask.dtype not in (torch.bool, query.dtype):
        raise Miss(f"the mask is {mask.dtype}; allowed: bool, or the query's {query.dtype}", node)
    if mask.dim() > 4 or mask.dim() < 2 or not same_shape(mask.shape[-2:], (query.shape[2], key.shape[2])):
        raise Miss("the mask is not one value for each query and key", node)
    if not (attention.scale is None or isinstance(attention.scale, (int, float))):
        raise Miss("the scale is no constant", node)
    if any(static_int(n) is None for n in (query.shape[1], query.shape[3], key.shape[1])):
        raise Miss("heads or head_dim are not static", node)
    if not (equal(query.shape[0], key.shape[0]) and equal(query.shape[3], key.shape[3])):
        raise Miss("queries and keys have other batches or lanes", node)
    if not same_shape(key.shape, value.shape) or not same_shape(key_cache.shape, value_cache.shape):
        raise Miss("keys and values differ in shape", node)
    if (keys.page, keys.heads) != (values.page, values.heads):
        raise Miss("keys and values lie in their blocks in other orders", node)
    if not view.order.same_value(keys.table, values.table):
        raise Miss("keys and values are gathered by different tables", node)
    if key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        raise Miss("the caches are of another dtype than the query", node)
    if not (equal(key_cache.stride(-1), 1) and equal(value_cache.stride(-1), 1)):
        raise Miss("the lanes of the cache do not lie side by side", node)
    if any(x.requires_grad for x in (query, key, value)) or mask.requires_grad:
        raise Miss("gradients are wanted, and a decoding step has none", node)


def _emit_cache(paged: Paged, builder: Builder) -> Node:
    """The cache as [N, block, H_kv, D], whatever the order of its axes."""
    node, page, heads = paged.cache, paged.page, paged.heads
    if page is None:
        node = builder.call("unsqueeze", node, 1)
        heads, page = None if heads is None else heads + 1, 1
    if heads is None:
        return builder.call("unsqueeze", node, 2)
    return node if (page, heads) == (1, 2) else builder.call("permute", node, (0, page, heads, 3))
