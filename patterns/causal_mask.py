"""An attention mask that is proven to be causal, or to keep everything, becomes `is_causal` or no mask.

Before: scaled_dot_product_attention(q, k, v, attn_mask=arange(S) <= arange(S)[:, None])
After:  scaled_dot_product_attention(q, k, v, is_causal=True)

For every transformers model under torch.compile: it builds the mask in the graph (or packed-sequence checks that
come out as all true) and passes it to SDPA, which then reads S x S booleans and computes the masked half too.
Wins wherever it applies: flash kernels skip half of the work. The proof is `torch_fuse.graph.mask`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.fx import Node

from torch_fuse.graph.mask_source import bias_source, learned_source
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import equal, tensor
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView


@register
class CausalMask(Pattern):
    """Attention masks proven causal or all-true become `is_causal` or no mask."""

    name = "causal_mask"
    kind = "attention"
    needs_kernel = False

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        if attention.mask is None or attention.written is not None:  # `written_out_attention` says why it still is
            return None
        if attention.is_causal is not False:
            raise Miss("the attention has both a mask and is_causal", anchor)
        try:
            mask = view.mask_meaning(attention.mask, anchor)
        except Kept:
            raise
        except Miss as miss:
            learned = learned_source(attention.mask)
            if learned is not None:
                reason = f"the mask comes from weights or activations ({learned}), not from positions"
                raise Kept(reason, anchor) from miss
            bias = bias_source(attention.mask, view.order, anchor)
            if bias is not None:
                raise Kept(
                    f"the mask adds a bias, {bias.name}, which SDPA reads for each query and key", anchor
                ) from miss
            raise
        if not (mask.is_causal or mask.keeps_all):
            return None  # padding and windows are masked_attention's
        query, key = tensor(attention.query), tensor(attention.key)
        assert query is not None and key is not None
        if mask.is_causal and not equal(query.shape[-2], key.shape[-2]):
            return None  # causal from the top left, with more or fewer keys than queries: SDPA has no word for it
        note = "the mask is causal" if mask.is_causal else "the mask keeps everything"
        inputs = (attention.query, attention.key, attention.value)
        bindings = {"attention": attention, "is_causal": mask.is_causal}
        return Match(anchor, bindings, (anchor,), frozenset({anchor}), inputs, note)

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        attention = match.bindings["attention"]
        kwargs = {} if attention.scale is None else {"scale": attention.scale}
        if _enables_gqa(match.anchor):
            kwargs["enable_gqa"] = True
        new = builder.call(
            F.scaled_dot_product_attention,
            attention.query,
            attention.key,
            attention.value,
            dropout_p=attention.dropout_p,
            is_causal=match.bindings["is_causal"],
            **kwargs,
        )
        return {match.anchor: new}

    def spellings(self) -> Iterator[Example]:
        for name, mask in _CAUSAL.items():
            yield Example(name, _attention(mask))
        yield Example("all_true", _attention(lambda s, d: torch.ones(s, s, dtype=torch.bool, device=d)))
        yield Example("window_wider_than_sequence", _attention(lambda s, d: _window(s, s + 3, d)))

    def near_misses(self) -> Iterator[Example]:
        for name, mask in _NOT_CAUSAL.items():
            yield Example(name, _attention(mask), fuses=False)
        yield Example("learned", _learned, fuses=False)


def _enables_gqa(node: Node) -> bool:
    return node.kwargs.get("enable_gqa", False) is True


def _attention(mask):
    def make(dtype: torch.dtype):
        def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[-2], q.device), scale=0.3)

        inputs = tuple(torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        return model, inputs

    return make


def _learned(dtype: torch.dtype):
    """A mask computed from the query."""

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = (q @ k.transpose(-1, -2)).detach() > -1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | torch.eye(9, dtype=torch.bool))

    return model, tuple(torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3))


def _grid(s: int, d: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(s, device=d)[:, None], torch.arange(s, device=d)[None, :]


def _window(s: int, width: int, d: torch.device) -> torch.Tensor:
    i, j = _grid(s, d)
    return (j <= i) & (j > i - width)


def _additive(keep: torch.Tensor, low: float) -> torch.Tensor:
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, low)


_CAUSAL = {
    "le": lambda s, d: _grid(s, d)[1] <= _grid(s, d)[0],
    "ge": lambda s, d: _grid(s, d)[0] >= _grid(s, d)[1],
    "not_gt": lambda s, d: ~(_grid(s, d)[1] > _grid(s, d)[0]),
    "lt_plus_one": lambda s, d: _grid(s, d)[1] < _grid(s, d)[0] + 1,
    "tril": lambda s, d: torch.ones(s, s, dtype=torch.bool, device=d).tril(),
    "not_triu": lambda s, d: ~torch.triu(torch.ones(s, s, dtype=torch.bool, device=d), diagonal=1),
    "tril_equals_one": lambda s, d: torch.tril(torch.ones(s, s, device=d)) == 1,
    "four_dims": lambda s, d: (_grid(s, d)[1] <= _grid(s, d)[0])[None, None].expand(2, 3, s, s),
    "and_all_true": lambda s, d: (_grid(s, d)[1] <= _grid(s, d)[0]) & (_grid(s, d)[1] >= 0),
    "additive_inf": lambda s, d: _additive(_grid(s, d)[1] <= _grid(s, d)[0], float("-inf")),
    "additive_where": lambda s, d: torch.where(_grid(s, d)[1] <= _grid(s, d)[0], 0.0, float("-inf")),
    "additive_triu": lambda s, d: torch.triu(torch.full((s, s), float("-inf"), device=d), diagonal=1),
}
_NOT_CAUSAL = {
    "one_more": lambda s, d: _grid(s, d)[1] <= _grid(s, d)[0] + 1,
    "diagonal_and_lower_without": lambda s, d: (_grid(s, d)[1] < _grid(s, d)[0]) | (_grid(s, d)[1] == 0),
    "upper": lambda s, d: _grid(s, d)[1] >= _grid(s, d)[0],
    "window": lambda s, d: _window(s, 4, d),
    "tril_off_by_one": lambda s, d: torch.ones(s, s, dtype=torch.bool, device=d).tril(diagonal=1),
    "finite": lambda s, d: _additive(_grid(s, d)[1] <= _grid(s, d)[0], -10.0),
    "every_other": lambda s, d: (_grid(s, d)[1] <= _grid(s, d)[0]) & (_grid(s, d)[1] % 2 == 0) | (_grid(s, d)[1] == 0),
    "sign": lambda s, d: _additive(_grid(s, d)[1] <= _grid(s, d)[0], float("-inf")) + 1,
}
