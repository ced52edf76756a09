"""Attention with a padding mask, a sliding window or both, by a kernel that never sees the S x S mask.

Before: keep = (k <= q) & (k > q - window) & attention_mask[b, k]               # [B, 1, S, S] booleans
        scaled_dot_product_attention(q, k, v, attn_mask=keep)
After:  torch_fuse.masked_attention(q, k, v, attention_mask.bool(), range of the kept keys, window - 1, 0, scale)

Masks that exclude padded queries as well (mask[b, q] & mask[b, k]) leave zeros there, in both.

For padded batches of every transformers model (left and right), encoders such as BERT, sliding windows (Mistral,
Gemma 3, Qwen2, ModernBERT), and prompts shorter than a static cache; inference and training. The keys' booleans
are computed once for all layers. The proof of what the mask means is `torch_fuse.graph.mask`.
Wins on CUDA where the dense mask costs: SDPA reads it for each layer and computes what it removes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from torch_fuse._compat import no_guards
from torch_fuse.graph.attention import unrepeated_heads
from torch_fuse.graph.index_choices import loads
from torch_fuse.graph.index_views import DIM
from torch_fuse.graph.mask import Mask
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor, value
from torch_fuse.kernels import masked_attention
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Shorter sequences than this, and the dense mask is cheap: with a band, half or more of the work is skipped; padding
# alone saves the reading of the mask.
MIN_LENGTH = {"band": 256, "keys": 128}
_RELATIONS: dict[type, Callable[..., Any]] = {
    sympy.Eq: torch.eq, sympy.Ne: torch.ne, sympy.Gt: torch.gt, sympy.Ge: torch.ge, sympy.Lt: torch.lt,
    sympy.Le: torch.le,
}  # fmt: skip
_JOINS: dict[type, Callable[..., Any]] = {
    sympy.And: torch.logical_and, sympy.Or: torch.logical_or, sympy.Xor: torch.logical_xor,
}  # fmt: skip


@register
class MaskedAttention(Pattern):
    """Attention with padding, sliding windows or both, without the dense mask."""

    name = "masked_attention"
    kind = "attention"
    op = "torch_fuse::masked_attention"
    stage = "attend"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if attention.mask is None or attention.written is not None or attention.is_causal is not False:
            return None
        try:
            mask = view.mask_meaning(attention.mask, anchor)
        except Miss:
            return None  # causal_mask has said why
        q, k = tensor(attention.query), tensor(attention.key)
        assert q is not None and k is not None
        if mask.keeps_all or (mask.is_causal and equal(q.shape[-2], k.shape[-2])):
            return None
        if attention.dropout_p != 0:
            raise Miss("attention weights are dropped out", anchor)
        key, val, repetition = unrepeated_heads(attention.key, attention.value)
        _check_shapes(attention.query, key, val, attention.mask, anchor)
        scale = q.shape[3] ** -0.5 if attention.scale is None else attention.scale
        if not isinstance(value(scale), (int, float, torch.SymFloat)):
            raise Miss("the scale is no number", anchor)
        check_sources(mask)
        sources = list(mask.sources.values())
        view.order.check_unwritten(sources, view.order.index[anchor])
        inputs = [attention.query, key, val, *sources]
        inputs += [scale] if isinstance(scale, Node) else []
        bindings = {"nodes": (attention.query, key, val), "mask": mask, "scale": scale, "fake_mode": view.fake_mode}
        region = frozenset({anchor, *repetition})
        return Match(anchor, bindings, (anchor,), region, tuple(inputs), describe(mask))

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        q, k, v = (tensor(node) for node in match.bindings["nodes"])
        assert q is not None and k is not None and v is not None
        scale = match.bindings["scale"]
        with no_guards(match.bindings["fake_mode"]):
            static = (scale,) if isinstance(scale, (int, float)) else ()
            reason = masked_attention.supports(q, k, v, *static)
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if q.device.type == "cuda":
            capability = torch.cuda.get_device_capability(q.device)
            if torch.version.hip is not None or capability < (8, 0):
                return "the GPU is older than Ampere (compute capability 8.0)"
        mask = match.bindings["mask"]
        least = MIN_LENGTH["keys" if mask.left is None and mask.right is None else "band"]
        length = size_hint(q.shape[2], least)
        return f"{length} queries: the mask is cheap; it pays from {least} on" if length < least else None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        mask, op, keep, ranges = match.bindings["mask"], masked_attention, None, None
        values = KeptKeys(mask, match.bindings["nodes"][0], match.bindings["nodes"][1], builder)
        if mask.keys != sympy.true:
            keep = values.emit(mask.keys)
        target = op.reference if options.kernels == "reference" else op.masked_attention
        if keep is not None and options.kernels != "reference":
            ranges = builder.shared(op.key_range, keep)
        scale = match.bindings["scale"]
        scale = scale if isinstance(scale, Node) else float(scale)
        both = builder.call(target, *match.bindings["nodes"], keep, ranges, mask.left, mask.right, scale)
        out = builder.call(operator.getitem, both, 0)
        if mask.queries != sympy.true:
            kept = builder.shared(operator.getitem, values.emit(mask.queries), (slice(None), None, slice(None), None))
            out = builder.call(torch.where, kept, out, 0.0)
        return {match.anchor: out}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _mask_examples

        return _mask_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _mask_examples

        return _mask_examples.near_misses()


def _check_shapes(query: Node, key: Node, val: Node, mask: Node, anchor: Node) -> None:
    """Raises Miss unless shapes are known to be what the op takes."""
    q, k, v, m = (tensor(node) for node in (query, key, val, mask))
    if q is None or k is None or v is None or m is None or not q.dim() == k.dim() == v.dim() == 4:
        raise Miss("query, key and value do not have four dimensions", anchor)
    heads, kv_heads = static_int(q.shape[1]), static_int(k.shape[1])
    if not heads or not kv_heads or heads % kv_heads or static_int(q.shape[3]) is None:
        raise Miss("the numbers of heads and lanes are not static", anchor)
    same = same_shape(k.shape, v.shape) and equal(k.shape[3], q.shape[3]) and equal(k.shape[0], q.shape[0])
    if not same or not q.dtype == k.dtype == v.dtype:
        raise Miss("key and value differ from the query in batch, head dim or dtype", anchor)
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for size, full in zip(reversed(m.shape), reversed(wanted), strict=False):
        if not (equal(size, full) or equal(size, 1)):
            raise Miss("the mask's shape is not known to be the scores'", anchor)


def check_sources(mask: Mask) -> None:
    """Raises Miss unless values are loaded by batch and key (or query), or without batch, and compared to numbers."""
    by_batch, by_query, by_key = _axes(mask)
    for condition, position, name in ((mask.keys, by_key, "key"), (mask.queries, by_query, "query")):
        for load in loads(condition):
            source = mask.sources[load.func.__name__]
            if [index for index in load.args if not index.is_Integer] not in ([by_batch, position], [position]):
                raise Miss(f"the mask reads {source.name} by other indices than batch and {name}", source)
    for relation in sympy.And(mask.keys, mask.queries).atoms(sympy.core.relational.Relational):
        numbers = [side for side in relation.args if side.is_number]
        types = [tensor(mask.sources[load.func.__name__]).dtype for load in loads(relation)]  # type: ignore[union-attr]
        if not (numbers and all(_holds(dtype, number) for dtype in types for number in numbers)):
            raise Miss(f"the mask compares values: {relation}", next(iter(mask.sources.values())))


def _holds(dtype: torch.dtype, number: sympy.Expr) -> bool:
    """Whether a comparison with a number is one of numbers: small integer types let a larger number wrap."""
    if dtype == torch.bool:
        return number in (0, 1)
    return bool(abs(number) < 2**24 and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max)


def _axes(mask: Mask) -> tuple[sympy.Symbol, sympy.Symbol, sympy.Symbol]:
    """The indices of batch, query and key."""
    return DIM[0] if mask.rank == 4 else sympy.Dummy(), DIM[mask.rank - 2], DIM[mask.rank - 1]


@dataclass(frozen=True)
class KeptKeys:
    """Emits which keys (or queries) are kept, [B, S] or [1, S]; layers that share a mask share this."""

    mask: Mask
    query: Node
    key: Node
    builder: Builder

    def emit(self, condition: Any) -> Node:
        """The sympy condition in PyTorch's operators."""
        shared = self.builder.shared
        join = _JOINS.get(type(condition))
        if join is not None:
            first, *rest = (self.emit(part) for part in sorted(condition.args, key=str))
            for part in rest:
                first = shared(join, first, part)
            return first
        if isinstance(condition, sympy.Not):
            return shared(torch.logical_not, self.emit(condition.args[0]))
        if type(condition) not in _RELATIONS:
            raise Miss(f"the mask keeps keys by {type(condition).__name__}, which is not understood")
        if condition.lhs.is_number:
            condition = condition.reversed
        load, number = condition.lhs, condition.rhs
        values = self._load(load)
        if condition == sympy.Ne(load, 0) and tensor(values).dtype == torch.bool:  # type: ignore[union-attr]
            return values
        return shared(_RELATIONS[condition.func], values, int(number) if number.is_Integer else float(number))

    def _load(self, load: AppliedUndef) -> Node:
        source = self.mask.sources[load.func.__name__]
        found = tensor(source)
        assert found is not None
        index: tuple[Any, ...] = tuple(
            int(at) if at.is_Integer else self._all_or_first(size, at)
            for at, size in zip(load.args, found.shape, strict=True)
        )
        if sum(isinstance(at, slice) for at in index) == 1:
            index = (None, *index)
        values = source if index == (slice(None),) * 2 else self.builder.shared(operator.getitem, source, index)
        device = tensor(self.query).device  # type: ignore[union-attr]
        return values if found.device == device else self.builder.shared("to", values, device)

    def _all_or_first(self, size: Any, axis: sympy.Symbol) -> slice:
        """The part of an axis that the mask reads: as many as there are batches, queries or keys."""
        _, by_query, by_key = _axes(self.mask)
        node, dim = {by_key: (self.key, 2), by_query: (self.query, 2)}.get(axis, (self.query, 0))
        wanted = tensor(node).shape[dim]  # type: ignore[union-attr]
        if equal(size, wanted):
            return slice(None)
        return slice(None, wanted if isinstance(wanted, int) else self.builder.shared("size", node, dim))


def describe(mask: Mask) -> str:
    """What was proven, for the report."""
    parts = []
    if mask.right == 0 and mask.left is not None:
        parts.append(f"a causal window of {mask.left + 1}")
    elif mask.right == 0:
        parts.append("causal")
    elif mask.left is not None or mask.right is not None:
        ends = ("any" if end is None else end for end in (mask.left, mask.right))
        parts.append("a window of {} keys before and {} after".format(*ends))
    if mask.sources:
        parts.append("padding from " + ", ".join(name.removeprefix("l_").strip("_") for name in mask.sources))
    return "the mask is " + " and ".join(parts)
