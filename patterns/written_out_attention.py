"""Attention written out with two products and a softmax becomes `scaled_dot_product_attention`.

Before: softmax(q @ k.transpose(-1, -2) * scale + mask, dim=-1) @ v
After:  scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

For every model with eager attention (transformers' attn_implementation="eager", GPT-J, BLOOM, MPT, BERT, nanoGPT, ViT):
matmul, bmm, baddbmm or einsum; scaling of the query, the key or the scores; masks that are added, filled in or chosen
with `where`; biases (ALiBi, relative positions) with their gradients; softmax in float32. It runs before all other
patterns, so that they see what SDPA is given. Inductor's own pass
(fuse_attention.py) takes the plain form; with torch 2.15 it took none of: a causal mask computed in the graph, added
or filled in, a bias, baddbmm with ALiBi, einsum in [B, S, H, D] order; neither forward nor in training.

What holds:
- Scores are not rounded to the query's dtype, nor weights before they are normalised: the error against exact
  attention is the same or smaller.
- A mask in another dtype is converted only where that cannot change it (0 and a number that excludes); a bias never.
- Rows in which every key is excluded keep their meaning, forward and backward: it is proven that there are none
  (causal masks, windows), they are computed apart (the mean of the values, or NaN for -inf), or the site is refused
  (masks that are added and depend on data, where gradients are needed). Integers and parameters, and what layers make
  of data, are taken to be moderate as biases; a floating-point input of the graph may be a mask, and is refused.
- Dropout would draw other random numbers: attention that drops weights stays as it is. So does attention whose weights
  are used elsewhere too. With a soft cap or sinks, it is `softcap_sinks_attention`'s.

Wins on CUDA and CPU from some length on, the more the longer: nothing of size S_q x S_k is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.fold import fold_constant
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.product import Operand
from torch_fuse.graph.score_mask import plan_mask
from torch_fuse.graph.score_steps import Factor
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor
from torch_fuse.graph.written_attention import WrittenOut, batch_sizes
from torch_fuse.options import Options
from torch_fuse.patterns._written_call import Emitter
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Fewer queries than this, and two small products and a softmax that Inductor fuses are not beaten for sure: padding
# masks are 0.86 of its speed at 64 queries, 2.2 times at 128 (benchmarks/results/written_out_attention.jsonl, an H200;
# not measured on CPUs). A bias that is learned is 1.15 times as fast at 256 queries, 0.92 at 512.
MIN_QUERIES = {"cuda": 128, "cpu": 128}
MIN_QUERIES_WITH_GRADIENTS = {"cuda": 256, "cpu": 256}
MAX_QUERIES_OF_LEARNED_BIAS = 256
MAX_HEAD_DIM = 256  # of the flash and memory-efficient kernels


@register
class WrittenOutAttention(Pattern):
    """Attention written out with matmul and softmax becomes scaled_dot_product_attention."""

    name = "written_out_attention"
    kind = "attention"
    stage = "canonicalise"
    needs_kernel = False

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        written = view.attentions[anchor].written
        if written is None:
            return None
        region = written.nodes | written.before
        operands = tuple(operand.node for operand in _operands(written))
        refusal = refusal_of(written)
        if not refusal and (written.cap is not None or written.sinks is not None):
            return None
        bindings: dict[str, Any] = {"written": written, "refusal": refusal}
        if refusal:
            return Match(anchor, bindings, (anchor,), region, operands)
        check_dtypes(written)
        sizes = batch_sizes(written)
        if sizes is None:
            raise Miss("the scores have more than batch, head, query and key, or heads are split unclearly", anchor)
        plan = plan_mask(written, view.order, view.shape_env)
        factors = tuple(folded(factor, view.order, anchor) for factor in written.factors)
        split = {x.node: source for x in _operands(written) if (source := _split_before(x, sizes, view.order, anchor))}
        operands = (*operands, *split.values())
        bindings |= {"sizes": sizes, "plan": plan, "factors": factors, "split": split}
        read = [*(term.node for term in (*written.terms, *plan.terms)), *(fill.mask for fill in plan.fills)]
        read += [factor.number for factor in factors if isinstance(factor.number, Node)]
        return Match(anchor, bindings, (anchor,), region, (*operands, *dict.fromkeys(read)), plan.note)

    def check(self, match: Match, options: Options) -> str | None:
        written = match.bindings["written"]
        if match.bindings["refusal"] or options.kernels == "reference":
            return match.bindings["refusal"] or None
        query, out = tensor(written.query.node), tensor(written.node)
        assert query is not None and out is not None
        kind = query.device.type
        if kind not in MIN_QUERIES:
            return f"not measured on {kind}"
        if query.dtype == torch.float64:
            return "SDPA has no fused kernel for float64"
        for name, operand in zip(("query", "key", "value"), _operands(written), strict=True):
            found = tensor(operand.node)
            assert found is not None
            if not equal(found.stride(operand.dims[-1]), 1):
                return f"the {name} is stored with its head dim strided, which SDPA's fused kernels do not read"
        length, dim = (written.query.sizes()[i] for i in (-2, -1))
        if size_hint(dim, MAX_HEAD_DIM) > MAX_HEAD_DIM:
            return f"SDPA has no fused kernel for head_dim {dim}"
        least = (MIN_QUERIES_WITH_GRADIENTS if out.requires_grad else MIN_QUERIES)[kind]
        queries = size_hint(length, least)
        if queries < least:
            return f"{queries} queries: Inductor's softmax between two products is as fast; SDPA pays from {least} on"
        learned = any(tensor(term.node).requires_grad for term in match.bindings["plan"].terms)  # type: ignore[union-attr]
        if learned and queries > MAX_QUERIES_OF_LEARNED_BIAS and not options.unmeasured:
            return f"{queries} queries and a bias that needs a gradient: Inductor is as fast"
        return None

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        written, plan = match.bindings["written"], match.bindings["plan"]
        emit = Emitter(builder, written, match.bindings["sizes"], match.bindings["split"])
        scale, tensors = emit.scale(match.bindings["factors"])
        query, key, value = (emit.operand(x) for x in _operands(written))
        for factor in tensors:
            query = emit.scaled_query(query, factor)
        mask, lonely = emit.mask(plan)
        new = builder.call(F.scaled_dot_product_attention, query, key, value, attn_mask=mask, scale=scale)
        if lonely is not None:
            new = builder.call(torch.where, lonely, emit.without_keys(value, lonely, plan), new)
        return {match.anchor: emit.result(new)}

    def spellings(self) -> Iterator[Example]:
        from torch_fuse.patterns import _written_examples

        return _written_examples.spellings()

    def near_misses(self) -> Iterator[Example]:
        from torch_fuse.patterns import _written_examples

        return _written_examples.near_misses()


def refusal_of(written: WrittenOut) -> str:
    """Why it stays as it is, or ""."""
    if written.refusal:
        return written.refusal
    if not (isinstance(written.dropout_p, (int, float)) and written.dropout_p == 0):
        return "attention weights are dropped at random; SDPA would draw other random numbers"
    for found in (tensor(factor.number) for factor in written.factors):
        if found is not None and found.dim() > 0 and not equal(found.shape[-1], 1):
            return "the scores are multiplied by a number for each key, which SDPA does not do"
    return ""


def check_dtypes(written: WrittenOut) -> None:
    """Raises Miss unless its parts are of one floating-point dtype, and not computed in float64 on the way."""
    out = tensor(written.node)
    assert out is not None
    if not out.dtype.is_floating_point or out.dtype.itemsize == 1:
        raise Miss(f"the attention has dtype {out.dtype}", written.node)
    scores = tensor(written.scores)
    sources = [tensor(x) for x in written.scores.all_input_nodes]
    if scores is None or any(x is not None and x.dtype != scores.dtype for x in sources):
        raise Miss("autocast changes the dtype of the scores", written.scores)
    for name, operand in zip(("query", "key", "value"), _operands(written), strict=True):
        found = tensor(operand.node)
        assert found is not None
        if found.dtype != out.dtype or found.device != out.device:
            raise Miss(
                f"the {name} is {found.dtype} on {found.device}, the result {out.dtype} on {out.device}", written.node
            )
    wide = {x.dtype for x in map(tensor, written.nodes) if x is not None and x.dtype == torch.float64}
    if wide and out.dtype != torch.float64:
        raise Miss(f"it is computed in float64 and rounded to {out.dtype}", written.node)
    if any(static_int(size) == 0 for operand in (written.query, written.key) for size in operand.sizes()):
        raise Miss("it has no elements", written.node)


def _operands(written: WrittenOut) -> tuple[Operand, Operand, Operand]:
    return written.query, written.key, written.value


def folded(factor: Factor, order: Order, anchor: Node) -> Factor:
    """The factor as a number, when it is a constant tensor with one element."""
    found = tensor(factor.number)
    if found is None or found.dim() > 0:
        return factor
    number = fold_constant(factor.number, order, anchor)
    return factor if number is None else replace(factor, number=number.item())


def _split_before(operand: Operand, sizes: tuple[Any, Any], order: Order, anchor: Node) -> Node | None:
    """[B, H, S, D] that was reshaped to the operand [B * H, S, D], if it is still the same at the anchor."""
    call = call_of(operand.node)
    if not operand.as_it_is or len(operand.dims) != 3 or call is None or call.op not in ("view", "reshape", "flatten"):
        return None
    source = tensor(call["input"])
    if source is None or source.dim() != 4 or not same_shape(source.shape, (*sizes, *operand.sizes()[1:])):
        return None
    try:
        order.check_movable({operand.node, anchor}, [call["input"]], order.index[anchor])
    except Miss:
        return None  # a reshape may have copied what was written to later
    return call["input"]
