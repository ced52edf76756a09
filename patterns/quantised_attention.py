"""Attention without a mask in 8 bits, where `options={"lossy": ["attention"]}` allows it.

Before: scaled_dot_product_attention(q, k, v, is_causal=...)
After:  torch_fuse.quantised_attention(q, k, v, is_causal, scale)

For video and image models (Wan, FLUX, Stable Diffusion), encoders and prefill, whose attention is bound by its products
or by its exponentials. In bfloat16 and float16, head_dim 64, 80, 96 or 128; repeated key and value heads (grouped-query
attention) are read unrepeated. Gradients are those of exact attention. What it leaves is left to `dense_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from torch_fuse._compat import no_guards
from torch_fuse.graph.attention import unrepeated_heads
from torch_fuse.graph.miss import Kept
from torch_fuse.graph.values import equal, size_hint, static_int, tensor
from torch_fuse.kernels import quantised_attention
from torch_fuse.options import Options
from torch_fuse.patterns.dense_attention import _example, _fits, _masked, _repeat_interleave, _repeated_by_expand, _sdpa
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

DTYPES = (torch.bfloat16, torch.float16)
# From how many queries and keys on it wins over the exact kernels, by head dim and whether it is causal: measured on an
# H200 (benchmarks/results/quantised_attention.jsonl), at 7,800 (594 against 562 us) and 32,760 (8.2 against 10.3 ms).
MIN_LENGTH = {(128, False): 16384}


def _not_faster(q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> str | None:
    """Why 8 bits would gain nothing, by what was measured, or None."""
    if quantised_attention.hopper_config(q) is None:
        return "not in 8 bits: measured on Hopper (compute capability 9.0) only; options['unmeasured'] takes it"
    kind = (int(q.shape[3]), is_causal)
    least = MIN_LENGTH.get(kind)
    spelled = f"head_dim {kind[0]}, {'causal' if is_causal else 'not causal'}"
    if least is None:
        return f"not in 8 bits: the exact kernel is as fast for {spelled}"
    length = min(size_hint(x.shape[2], 0) for x in (q, k))
    if length < least:
        return f"not in 8 bits: the exact kernel is as fast for {spelled} of length {length}; it pays from {least} on"
    return None


@register
class QuantisedAttention(Pattern):
    """Attention over all keys or causal in INT8 and FP8, where that loss is allowed."""

    name = "quantised_attention"
    kind = "attention"
    op = "torch_fuse::quantised_attention"
    stage = "attend"
    lossy = "attention"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if attention.written is not None:
            return None
        if attention.mask is not None:
            raise Kept("not in 8 bits: it reads a mask; allowed: none, or is_causal", anchor)
        if attention.dropout_p != 0 or attention.is_causal not in (True, False):
            raise Kept(f"not in 8 bits: dropout_p is {attention.dropout_p}; allowed: 0", anchor)
        query, key, value = attention.query, attention.key, attention.value
        q, k, v = (tensor(node) for node in (query, key, value))
        if q is None or k is None or v is None or any(x.dim() != 4 for x in (q, k, v)):
            return None
        if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
            raise Kept(f"not in 8 bits: dtype is {q.dtype}; allowed: bfloat16, float16", anchor)
        dim, heads = (static_int(q.shape[i]) for i in (3, 1))
        if dim is None or dim not in quantised_attention.HEAD_DIMS or not equal(v.shape[3], q.shape[3]):
            allowed = ", ".join(map(str, quantised_attention.HEAD_DIMS))
            raise Kept(f"not in 8 bits: head_dim is {dim}; allowed: {allowed}", anchor)
        scale = dim**-0.5 if attention.scale is None else attention.scale
        if heads is None or not isinstance(scale, (int, float)) or not scale > 0:
            raise Kept(f"not in 8 bits: scale is {scale}; allowed: positive numbers", anchor)
        key, value, repetition = unrepeated_heads(key, value)
        if not equal(k.shape[0], q.shape[0]) or not _fits(query, key, value, heads, attention.is_causal):
            raise Kept("not in 8 bits: query, key and value differ in batch, heads or length", anchor)
        arguments = (query, key, value, attention.is_causal, float(scale))
        note = f"lossy: INT8 scores, FP8 weights and values, head_dim {dim}"
        bindings = {"arguments": arguments, "fake_mode": view.fake_mode}
        return Match(anchor, bindings, (anchor,), frozenset({anchor, *repetition}), (query, key, value), note)

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        *nodes, is_causal, scale = match.bindings["arguments"]
        q, k, v = (tensor(node) for node in nodes)
        assert q is not None and k is not None and v is not None
        with no_guards(match.bindings["fake_mode"]):
            reason = quantised_attention.supports(q, k, v, is_causal, scale)
        if reason is not None:
            return f"not in 8 bits: the kernel cannot run: {reason}"
        if options.unmeasured:
            return None
        return _not_faster(q, k, is_causal)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        # The op itself, with its gradient, also where its reference is asked for: it has one implementation of each.
        return {match.anchor: builder.call(quantised_attention.quantised_attention, *match.bindings["arguments"])}

    def spellings(self) -> Iterator[Example]:
        yield Example("causal", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True)))
        yield Example("all_keys", _example(_sdpa, keys=5, dim=64))
        yield Example("own_scale", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True, scale=0.1), dim=96))
        yield Example("enable_gqa", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True, enable_gqa=True), kv=2))
        yield Example("repeated_by_expand", _example(_repeated_by_expand, kv=2))
        yield Example("repeat_interleave", _example(_repeat_interleave, kv=2, dim=128))
        yield Example("gradients", _example(_sdpa, grad=True))

    def near_misses(self) -> Iterator[Example]:
        yield Example("head_dim_without_a_kernel", _example(_sdpa, dim=72), fuses=False)
        yield Example("masked", _example(_masked), fuses=False)
        yield Example("causal_with_fewer_keys", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True), keys=5), False)
