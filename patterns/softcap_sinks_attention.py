"""Attention written out with a soft cap of the scores, or with sinks, by a kernel that stores no S x S scores.

Before: scores = tanh(q @ k.transpose(-1, -2) * scale / cap) * cap + mask                       # Gemma 2
        softmax(scores, dim=-1) @ v
  or:   scores = cat([q @ k.transpose(-1, -2) * scale + mask, sinks.expand(B, H, S, 1)], -1)    # gpt-oss
        softmax(scores - scores.max(-1, keepdim=True).values, -1)[..., :-1] @ v
After:  torch_fuse.masked_attention(q, k, v, attention_mask.bool(), range of the kept keys, window - 1, 0, scale, cap,
        sinks)

For Gemma 2, VaultGemma and T5Gemma, which transformers runs eagerly for the cap, and gpt-oss and its kin; inference and
training. `scaled_dot_product_attention` has neither. The factors of tanh need not agree: b * tanh(a * x) has the cap b
and the scale a * b.

What holds, besides `written_out_attention`'s:
- The mask is proven to be causal, a window, padding or all of them (`torch_fuse.graph.mask`), after the cap and before
  the sinks. A mask of other data stays.
- A query without a key: with sinks, they take its whole weight, here as there. With a cap alone, it gets what the graph
  gives it (the mean of the values, or NaN); where gradients are needed and the mask is added, they would be others, and
  the site is refused.
- What is subtracted from a whole row, its maximum, changes nothing, and is left out.

Measured on an H200 (benchmarks/results/softcap_sinks.jsonl), ms written out and fused: 64 heads of 64 lanes with sinks
at 4,096 tokens 9.0 and 0.59, with gradients 18.4 and 2.4; with a window of 128 7.6 and 0.20, 18.0 and 1.1. 8 heads of
256 lanes with a cap: 0.77 and 0.40 at 4,096 tokens, but 1.8 and 2.4 with gradients; 6.5 and 5.5 with gradients at
8,192 with a window of 4,096; 0.23 and 0.25 at 4 x 256. Hence the least numbers of queries; those between are estimates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from torch_fuse._compat import no_guards
from torch_fuse.graph.attention import unrepeated_heads
from torch_fuse.graph.mask import Mask, match_kept_keys
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.product import Operand
from torch_fuse.graph.score_bias import EXCLUDING, excluded_value, is_moderate, read_by_proofs
from torch_fuse.graph.score_mask import check_low
from torch_fuse.graph.score_steps import Factor
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor, value
from torch_fuse.graph.written_attention import WrittenOut
from torch_fuse.kernels import masked_attention
from torch_fuse.options import Options
from torch_fuse.patterns.masked_attention import KeptKeys, check_sources, describe
from torch_fuse.patterns.written_out_attention import (
    check_dtypes,
    folded,
    refusal_of,
)
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@dataclass(frozen=True)
class _Site:
    """What the op is given.

    Attributes:
        operands: query, key and value, key and value with as few heads as they have.
        mask: what it keeps.
        scale: of the scores, a number or, without a cap, a node of one.
        softcap: 0 for none.
        sinks: [H], or None.
        lonely: what queries without a key attend with: weights that are equal ("mean") or NaN ("nan"); "" when there
            are none, or when they get zeros as the op gives them.
        dims: where the dimensions of the result are.
    """

    operands: tuple[Operand, Operand, Operand]
    mask: Mask
    scale: Any
    softcap: float
    sinks: Node | None
    lonely: str
    dims: tuple[int, ...]


# See above: for inference, and with gradients for up to 64 lanes and for more, whose backward pass is slower.
MIN_QUERIES, MIN_TRAINED, MIN_TRAINED_WIDE = 512, 1024, 8192


@register
class SoftcapSinksAttention(Pattern):
    """Attention written out with a soft cap or sinks, without the scores in memory."""

    name = "softcap_sinks_attention"
    kind = "attention"
    op = "torch_fuse::masked_attention"
    stage = "attend"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        written = view.attentions[anchor].written
        if written is None or refusal_of(written) or (written.cap is None and written.sinks is None):
            return None
        check_dtypes(written)
        operands, repetition = _operands(written)
        scale, softcap = _scale_and_cap(written, view)
        mask, source, lonely = _mask(written, view)
        sinks = written.sinks
        site = _Site(operands, mask, scale, softcap, sinks, lonely, written.product.dims)
        given = [*(x.node for x in operands), *mask.sources.values(), *([] if sinks is None else [sinks])]
        given += [x for x in (source, scale) if isinstance(x, Node)]
        region = written.nodes | written.before | written.sink_nodes | repetition
        bindings = {"site": site, "fake_mode": view.fake_mode}
        return Match(anchor, bindings, (anchor,), region, tuple(dict.fromkeys(given)), _note(site, source))

    def check(self, match: Match, options: Options) -> str | None:
        if options.kernels == "reference":
            return None
        site, out = match.bindings["site"], tensor(match.anchor)
        q, k, v = (tensor(x.node) for x in site.operands)
        assert q is not None and k is not None and v is not None and out is not None
        with no_guards(match.bindings["fake_mode"]):
            q, k, v = (x.permute(o.dims) for x, o in zip((q, k, v), site.operands, strict=True))
            scale = 1.0 if isinstance(site.scale, Node) else site.scale
            reason = masked_attention.supports(q, k, v, scale, site.softcap)
        if reason is not None:
            return f"the kernel cannot run: {reason}"
        if q.device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(q.device) < (8, 0)):
            return "the GPU is older than Ampere (compute capability 8.0)"
        if options.unmeasured:
            return None
        trained = MIN_TRAINED if (static_int(q.shape[3]) or 256) <= 64 else MIN_TRAINED_WIDE
        least, suffix = (trained, " with gradients") if out.requires_grad else (MIN_QUERIES, "")
        queries = size_hint(q.shape[2], least)
        few = f"{queries} queries{suffix}: the scores are few; it pays from {least} on"
        return few if queries < least else None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        site, op, keep, ranges = match.bindings["site"], masked_attention, None, None
        q, k, v = (_permuted(builder, x.node, x.dims) for x in site.operands)
        if site.mask.keys != sympy.true:
            keep = KeptKeys(site.mask, q, k, builder).emit(site.mask.keys)
        target = op.reference if options.kernels == "reference" else op.masked_attention
        if keep is not None and options.kernels != "reference":
            ranges = builder.shared(op.key_range, keep)
        both = builder.call(
            target, q, k, v, keep, ranges, site.mask.left, site.mask.right, site.scale, site.softcap, site.sinks
        )
        out = builder.call(operator.getitem, both, 0)
        if site.lonely:
            out = _with_lonely_rows(builder, out, builder.call(operator.getitem, both, 1), v, site.lonely)
        return {match.anchor: _permuted(builder, out, site.dims)}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _softcap_sinks_examples

        return _softcap_sinks_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _softcap_sinks_examples

        return _softcap_sinks_examples.near_misses()


def _operands(written: WrittenOut) -> tuple[tuple[Operand, Operand, Operand], frozenset[Node]]:
    """Query, key and value as the op takes them, and the nodes that repeat the heads of the last two.

    Raises:
        Miss: when their shapes are not known to be what the op takes.
    """
    q, k, v = written.query, written.key, written.value
    repetition: set[Node] = set()
    if not all(len(x.dims) == 4 for x in (q, k, v, written.product)):
        raise Miss("query, key and value do not have four dimensions", written.node)
    if k.as_it_is and v.as_it_is:
        key, val, repetition = unrepeated_heads(k.node, v.node)
        k, v = Operand(key, k.dims), Operand(val, v.dims)
    (batch, heads, _, dim), keys, values = q.sizes(), k.sizes(), v.sizes()
    heads, kv_heads = static_int(heads), static_int(keys[1])
    if not heads or not kv_heads or heads % kv_heads or static_int(dim) is None:
        raise Miss("the numbers of heads and lanes are not static", written.node)
    if not (same_shape(keys, values) and equal(keys[3], dim) and equal(keys[0], batch)):
        raise Miss("key and value differ from the query in batch or head dim", written.node)
    return (q, k, v), frozenset(repetition)


def _scale_and_cap(written: WrittenOut, view: GraphView) -> tuple[Any, float]:
    given = written.factors[0] if len(written.factors) == 1 and written.cap is None else None
    if given is not None and not given.divides and isinstance(value(given.number), torch.SymFloat):
        return given.number, 0.0  # dynamic=True makes inputs of numbers; a cap is compiled into the kernel
    outer = 0.0 if written.cap is None else _product(written.cap.factors, "soft cap", written, view)
    inner = _product(written.factors, "scale", written, view)
    if written.cap is None:
        return inner, 0.0
    if not 0 < inner * outer < math.inf:
        raise Miss(f"the scores are scaled by {inner * outer}", written.node)
    return inner * outer, outer


def _product(factors: Iterable[Factor], what: str, written: WrittenOut, view: GraphView) -> float:
    product = 1.0
    for factor in factors:
        number = folded(factor, view.order, written.node).number
        if not isinstance(number, (int, float)):
            raise Miss(f"the {what} is no number", number if isinstance(number, Node) else written.node)
        if factor.divides and number == 0:
            raise Miss("the scores are divided by zero", written.node)
        product = product / number if factor.divides else product * number
    if not 0 < product < math.inf:
        raise Miss(f"the {what} is {product}", written.node)
    return product


def _mask(written: WrittenOut, view: GraphView) -> tuple[Mask, Node | None, str]:
    """What the mask keeps, the mask, and `_Site.lonely`.

    Raises:
        Miss: when there are several, or one that is not proven to be what the op does.
    """
    terms, fills, anchor = written.terms, written.fills, written.node
    if not terms and not fills:
        return Mask(), None, ""
    if len(terms) + len(fills) > 1:
        raise Miss("several masks or biases are added to the scores or fill them", anchor)
    inverted, low = False, None
    if fills:
        (fill,) = fills
        check_low(fill, written)
        node, inverted, low, read, rank = fill.mask, fill.inverted, fill.value, [fill.number], fill.rank
    else:
        (term,) = terms
        node, low, read, rank = term.node, excluded_value(term.node), [term.node], term.rank
        if term.factors:
            raise Miss("the mask is scaled after it is added", node)
    _check_broadcast(node, rank, written)
    for looked_at in read:
        view.order.check_unwritten(read_by_proofs(looked_at), view.order.index[anchor])
    mask = view.mask_meaning(node, anchor, inverted=inverted, any_row=True)
    if mask != Mask(left=mask.left, right=mask.right, keys=mask.keys, sources=mask.sources, rank=mask.rank):
        raise Miss("the mask says more than which keys a query sees", node)
    check_sources(mask)
    view.order.check_unwritten(list(mask.sources.values()), view.order.index[anchor])
    return mask, node, _lonely(written, view, node, low, inverted)


def _check_broadcast(mask: Node, rank: int, written: WrittenOut) -> None:
    """Raises Miss unless each dimension of the mask is known to be the scores', or 1."""
    found = tensor(mask)
    wanted = (*written.query.sizes()[:3], written.key.sizes()[2])
    sizes = () if found is None else zip(reversed(found.shape), reversed(wanted), strict=False)
    if found is None or rank != 4 or not all(equal(size, full) or equal(size, 1) for size, full in sizes):
        raise Miss("the mask's shape is not known to be the scores'", mask)


def _lonely(written: WrittenOut, view: GraphView, mask: Node, low: float | None, inverted: bool) -> str:
    anchor = written.node
    if match_kept_keys(mask, view.order, anchor, view.shape_env, inverted=inverted):
        return ""
    row = "a row of the mask may exclude every key"
    if low is None or (written.terms and low > EXCLUDING):
        raise Miss(f"{row}: what it adds is not known", mask)
    if written.sinks is not None:
        view.order.check_unwritten(read_by_proofs(written.sinks), view.order.index[anchor])
        if not is_moderate(written.sinks, view.order, anchor):
            raise Miss(f"{row}, and whether the sinks are finite is not known", written.sinks)
        return ""
    if written.terms and tensor(anchor).requires_grad:  # type: ignore[union-attr]
        raise Miss(f"{row}: its gradients are others then", mask)
    return "nan" if low == -math.inf else "mean"


def _permuted(builder: Builder, node: Node, dims: tuple[int, ...]) -> Node:
    return node if dims == tuple(range(len(dims))) else builder.call("permute", node, dims)


def _with_lonely_rows(builder: Builder, out: Node, lse: Node, value: Node, weights: str) -> Node:
    """The result with the mean of the values, or NaN, for queries without a key, which the op gives zeros."""
    call = builder.call
    lonely = call("unsqueeze", call("eq", lse, math.inf), -1)
    mean = call("mean", value, -2, True)
    heads, kv_heads = (int(tensor(x).shape[1]) for x in (out, value))  # type: ignore[union-attr]
    if heads != kv_heads:
        mean = call("repeat_interleave", mean, heads // kv_heads, 1)
    if weights == "nan":  # as their product, so that the gradient of the values is NaN where the graph's is
        some = call("any", lonely, -2, True)
        mean = call("mul", mean, call("masked_fill", call("new_ones", mean, ()), some, math.nan))
    return call(torch.where, lonely, mean, out)


def _note(site: _Site, mask: Node | None) -> str:
    parts = [f"a soft cap of {site.softcap:g}"] if site.softcap else []
    parts += ["sinks"] if site.sinks is not None else []
    note = f"written out with {' and '.join(parts)}"
    if mask is not None and not site.mask.keeps_all:
        note = f"{note}; {describe(site.mask)}"
    return f"{note}; rows without keys computed apart" if site.lonely else note
