"""Query and key, from the projection to attention: norm, RoPE and layout in one kernel.

Before: q = rope(norm(linear(x).view(B, S, H, D)).transpose(1, 2), cos, sin); k likewise
        attention(q, k, v)
After:  q, k = qk_norm_rope(linear(x).view(B, S, H, D), ..., cos, sin)      # one launch
        attention(q.transpose(1, 2), k.transpose(1, 2), v)

For GPT-NeoX, Llama, Qwen3, Phi, GPT-J, Falcon, OLMo2, Cohere, StableLM, Wan and others: any split of the projection,
partial or full RoPE, half or interleaved pairs, cosines and sines or a matrix for each pair (Kandinsky, PRX), norms of
each head, over all heads or none, rotated before or after they are cut into heads (LTX-Video). Query and key
come out in [B, S, H, D] memory order, so attention's result needs no copy before the output projection. Without
gradients and norms, partial embeddings are rotated where the projection left them (`_rope_in_place`).
Wins on CUDA from some tokens on: Inductor's gather-heavy kernel for the same work runs at a third of the bandwidth.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node, map_arg

from torch_fuse.graph.attention import expanded_heads
from torch_fuse.graph.cache import appended
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.head_layout import Axes
from torch_fuse.graph.heads import Heads, match_heads
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.unrotated import joins_samples, not_understood
from torch_fuse.graph.values import equal, size_hint, static_int, tensor
from torch_fuse.kernels import qk_norm_rope
from torch_fuse.options import Options
from torch_fuse.patterns._rope_in_place import emit_in_place, match_in_place
from torch_fuse.patterns._rope_tables import check_table_axes, emit_tables
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Fewer tokens than this, and the launch costs more than the memory traffic that it saves.
MIN_TOKENS = 64


@register
class NormQkvRopeAttention(Pattern):
    """Norm, RoPE and layout of query and key in one kernel between projection and attention."""

    name = "norm_qkv_rope_attention"
    kind = "attention"
    op = "torch_fuse::qk_norm_rope"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if not attention.heads_first:
            return None
        query = match_heads(attention.query, view.order, view.fake_mode)
        known = () if query.rope is None else (query.rope.cos, query.rope.sin)
        unrepeated, _ = expanded_heads(attention.key)
        key = match_heads(appended(unrepeated, view.order, anchor), view.order, view.fake_mode, known)
        if query.rope is None and key.rope is None:
            _check_nothing_missed(attention.query, attention.key)
            aside = query.aside or key.aside
            if query.norm is not None or key.norm is not None or aside:
                reason = "query or key is normalised and not rotated: Inductor does that in one kernel"
                raise Kept(f"{reason}; {aside}" if aside else reason, anchor)
            return None
        check_same_rope(query, key, view)
        if not _same_norm(query, key):
            query, key = query.without_norm(), key.without_norm()
        assert query.rope is not None and key.rope is not None
        weights = [h.norm.weight for h in (query, key) if h.norm is not None and h.norm.weight is not None]
        tables = [table for heads in (query, key) for table in (heads.rope.cos, heads.rope.sin)]  # type: ignore[union-attr]
        sizes = [arg for heads in (query, key) for view_ in heads.views for arg in view_.all_input_nodes]
        inputs = (query.source, key.source, *tables, *weights, *(arg for arg in sizes if tensor(arg) is None))
        if any(tensor(table).requires_grad for table in tables):  # type: ignore[union-attr]
            raise Miss("the tables of cosines and sines need gradients", anchor)
        region = query.nodes | key.nodes | {query.result, key.result}
        replaced = tuple(sorted((query.result, key.result), key=view.order.index.__getitem__))
        if replaced[0] is replaced[1]:
            raise Miss("query and key are the same value", anchor)
        in_place = match_in_place(query, key, attention, view)
        bindings = {"query": query, "key": key, "in_place": in_place}
        note = _describe(query)
        if not in_place:
            return Match(anchor, bindings, replaced, frozenset(region), inputs, note)
        parts = frozenset(part.node for projection in in_place for part in projection.parts)
        region = parts.union(*(projection.nodes for projection in in_place))
        replaced = tuple(sorted(parts, key=view.order.index.__getitem__))
        op = "torch_fuse::partial_rope"
        return Match(anchor, bindings, replaced, region, inputs, f"{note}, where they lie", op)

    def check(self, match: Match, options: Options) -> str | None:
        query, key = match.bindings["query"], match.bindings["key"]
        if options.kernels == "reference":
            return None
        q, k = (_like_heads(heads) for heads in (query, key))
        reason = qk_norm_rope.supports(q, k, _norm_name(query), query.rope.rotary_dim)
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if query.as_one and not options.unmeasured:
            return "the rotation of all heads' lanes at once is not measured to win yet"
        if query.rope.matrices and not options.unmeasured:
            return "the rotation by a matrix for each pair is not measured to win yet"
        tokens = size_hint(q.shape[0], 1) * size_hint(q.shape[1], MIN_TOKENS)
        if tokens < MIN_TOKENS:
            return f"{tokens} tokens: Inductor writes so few along with the cache; it pays from {MIN_TOKENS} on"
        return None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        query, key = match.bindings["query"], match.bindings["key"]
        rope = query.rope
        if match.bindings["in_place"]:
            tables = emit_tables(query, builder, options)
            reference = options.kernels == "reference"
            emitted = [emit_in_place(p, query, tables, reference, builder) for p in match.bindings["in_place"]]
            return {old: new for made in emitted for old, new in made.items()}
        op = qk_norm_rope.reference if options.kernels == "reference" else qk_norm_rope.qk_norm_rope
        norm = query.norm
        tables = emit_tables(query, builder, options)
        both = builder.call(
            op,
            emit_heads(query, builder),
            emit_heads(key, builder),
            emit_weight(query, builder),
            emit_weight(key, builder),
            tables.cos,
            tables.sin,
            _norm_name(query),
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.weight_offset,
            rope.rotary_dim,
            rope.interleaved,
            tables.cos_lanes,
            tables.sin_lanes,
            tensor(query.result).dtype,  # type: ignore[union-attr]
        )
        return {
            heads.result: _emit_result(heads, builder.call(operator.getitem, both, i), builder)
            for i, heads in enumerate((query, key))
        }

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _rope_examples

        return _rope_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _rope_examples

        return _rope_examples.near_misses()


def _check_nothing_missed(*values: Node) -> None:
    """Raises Miss when query or key, in which no rotation was found, may have one that is not understood."""
    for value in values:
        found = not_understood(value)
        if found is not None and joins_samples(value):
            raise Miss("the samples of query or key are computed one by one and joined: they may be rotated", found)
        if found is not None:
            name = getattr(found.target, "__name__", found.target)
            raise Miss(f"query or key is computed with {name}, which is not understood: it may be rotated", found)


def check_same_rope(query: Heads, key: Heads, view: GraphView) -> None:
    q, k = query.rope, key.rope
    if q is None or k is None:
        raise Kept(
            f"only the {'key' if q is None else 'query'} is rotated; the kernel rotates both at once", query.result
        )
    compared = ("head_dim", "rotary_dim", "interleaved", "cos_lanes", "sin_lanes", "cos_rank", "sin_rank", "sin_sign",
                "matrices")  # fmt: skip
    same = all(getattr(q, name) == getattr(k, name) for name in compared)
    if not (same and view.order.same_value(q.cos, k.cos) and view.order.same_value(q.sin, k.sin)):
        raise Miss("query and key are rotated differently", query.result)
    a, b = query.sizes(), key.sizes()
    if not (equal(a[0], b[0]) and equal(a[2], b[2])):
        raise Miss("query and key have other batches or lengths", key.result)
    if static_int(a[1]) is None or static_int(b[1]) is None:
        raise Miss("the number of heads is not static", query.result)
    if tensor(query.result).dtype != tensor(key.result).dtype:  # type: ignore[union-attr]
        raise Miss("query and key have different dtypes", key.result)
    if tensor(query.source).dtype != tensor(key.source).dtype:  # type: ignore[union-attr]
        raise Miss("query and key are projected to different dtypes", key.result)
    if any(_needs_float64(heads) for heads in (query, key)):
        raise Kept("it is computed in float64 from lower precision, which no kernel does", query.result)
    for heads in (query, key):  # one table may be read along other axes: by position, and by head
        check_table_axes(heads)


def _needs_float64(heads: Heads) -> bool:
    """Whether float64 from lower precision shows in the result: not where the rotation alone is, rounded to 16 bits."""
    source, result = tensor(heads.source), tensor(heads.result)
    assert source is not None and result is not None
    if source.dtype == torch.float64 or not _in_float64(heads):
        return False
    normed = () if heads.norm is None else map(tensor, heads.norm.nodes)
    return result.dtype.itemsize > 2 or any(t is not None and t.dtype == torch.float64 for t in normed)


def _in_float64(heads: Heads) -> bool:
    """Whether a step from the source to the result is computed in float64; a table that is rounded first is not."""
    pending, reached = [heads.source], {heads.result}
    while pending:
        for user in pending.pop().users:
            if user not in reached and user < heads.result:
                reached.add(user)
                pending.append(user)
    steps = [tensor(node) for node in (heads.nodes & reached) | {heads.result}]
    return any(step is not None and step.dtype.to_real() == torch.float64 for step in steps)


def _same_norm(query: Heads, key: Heads) -> bool:
    a, b = query.norm, key.norm
    if a is None or b is None:
        return a is None and b is None
    same = (a.kind, a.eps, a.weight_offset, query.scope) == (b.kind, b.eps, b.weight_offset, key.scope)
    return same and tensor(a.input).dtype == tensor(b.input).dtype  # type: ignore[union-attr]


def _norm_name(heads: Heads) -> str:
    return "none" if heads.norm is None else f"{heads.norm.kind}_{heads.scope}"


def _describe(heads: Heads) -> str:
    rope = heads.rope
    assert rope is not None
    pairs = "interleaved" if rope.interleaved else "half"
    norm = {"none": "no norm"}.get(_norm_name(heads), _norm_name(heads) + " norm")
    aside = f"; {heads.aside}" if heads.aside else ""
    return f"{norm}, RoPE on {rope.rotary_dim} of {rope.head_dim} lanes ({pairs}){aside}"


def _like_heads(heads: Heads) -> torch.Tensor:
    """A tensor that stands for what the op is given, to ask whether the kernel takes it."""
    source = tensor(heads.source)
    assert source is not None
    batch, num_heads, sequence, head_dim = heads.sizes()
    return source.new_empty(0).as_strided((batch, sequence, num_heads, head_dim), (0, 0, 0, 0))


# -- emitting ------------------------------------------------------------------------------------------------------


def emit_heads(heads: Heads, builder: Builder) -> Node:
    """The projection's result as [B, S, H, head_dim]."""
    node = heads.source
    for view in heads.views:
        node = _emit_view(view, node, builder)
    if tensor(node).dim() > 4:  # type: ignore[union-attr]
        node = builder.call("flatten", node, 3)
    if heads.as_one:
        node = builder.call("unsqueeze", node, 2)
    lanes = tensor(node).shape[3]  # type: ignore[union-attr]
    if not equal(lanes, heads.head_dim):
        node = builder.call("narrow", node, 3, heads.offset, heads.head_dim)
    return _permuted(node, (heads.axes[0], heads.axes[2], heads.axes[1], heads.axes[3]), builder)


def _emit_view(view: Node, source: Node, builder: Builder) -> Node:
    call = call_of(view)
    assert call is not None
    args, kwargs = map_arg((view.args, view.kwargs), lambda node: source if node is call["input"] else node)
    target = "reshape" if view.target == "view" else view.target
    return builder.call(target, *args, **kwargs)


def emit_weight(heads: Heads, builder: Builder) -> Node | None:
    weight = None if heads.norm is None else heads.norm.weight
    if weight is None or tensor(weight).is_contiguous():  # type: ignore[union-attr]
        return weight
    return builder.call("contiguous", weight)


def _emit_result(heads: Heads, node: Node, builder: Builder) -> Node:
    """[B, S, H, head_dim] in the order of the replaced node's dimensions."""
    if heads.as_one:
        return builder.call("flatten", node, 2)
    position = {axis: i for i, axis in zip((0, 2, 1, 3), heads.result_axes, strict=True)}
    return _permuted(node, (position[0], position[1], position[2], position[3]), builder)


def _permuted(node: Node, dims: Axes, builder: Builder) -> Node:
    return node if dims == (0, 1, 2, 3) else builder.call("permute", node, dims)
