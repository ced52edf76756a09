"""`nn.MultiheadAttention` whose weights nobody reads uses `scaled_dot_product_attention` inside.

Before: multi_head_attention_forward(x, x, x, ..., need_weights=True)[0]
After:  multi_head_attention_forward(x, x, x, ..., need_weights=False)[0]

For models that call `self.attention(x, x, x)[0]` or `out, _ = self.attention(x, x, x)`: need_weights is True unless
said otherwise, and then PyTorch writes the attention out and averages its weights over the heads. Dynamo traces the
call as one node. Without masks only: rows in which every key is excluded would give zeros instead of NaN.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import size_hint, tensor
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

# Fewer queries than this, and what is saved is no more than a launch.
MIN_QUERIES = 128
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@register
class UnreadAttentionWeights(Pattern):
    """nn.MultiheadAttention whose weights nobody reads does not compute them."""

    name = "unread_attention_weights"
    kind = "attention"
    stage = "canonicalise"
    needs_kernel = False

    def anchors(self, view: GraphView) -> Iterable[Node]:
        return [user for node in view.nodes if _is_call(node) for user in node.users if _takes(user, 0)]

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        node = anchor.args[0]
        assert isinstance(node, Node)
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given["need_weights"] is not True:
            return None
        reason = ""
        if any(user is not anchor and (user.users or not _takes(user, 1)) for user in node.users):
            reason = "the attention weights are used elsewhere too"
        elif given["training"] and given["dropout_p"] != 0:
            reason = "attention weights are dropped at random; SDPA would draw other random numbers"
        elif given["attn_mask"] is not None or given["key_padding_mask"] is not None:
            raise Miss("a row of the mask may exclude every key", anchor)
        bindings = {"arguments": dict(given), "reason": reason}
        inputs = tuple(node.all_input_nodes)
        return Match(anchor, bindings, (anchor,), frozenset({node, anchor}), inputs, "nobody reads the weights")

    def check(self, match: Match, options: Options) -> str | None:
        query = tensor(match.bindings["arguments"]["query"])
        if match.bindings["reason"] or options.kernels == "reference" or query is None:
            return match.bindings["reason"] or None
        if query.device.type not in ("cuda", "cpu") or query.dtype == torch.float64:
            return f"SDPA has no fused kernel for {query.dtype} on {query.device.type}"
        queries = size_hint(query.shape[0], MIN_QUERIES)
        return None if queries >= MIN_QUERIES else f"{queries} queries: it pays from {MIN_QUERIES} on"

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        arguments = {**match.bindings["arguments"], "need_weights": False}
        new = builder.call(F.multi_head_attention_forward, **arguments)
        return {match.anchor: builder.call(operator.getitem, new, 0)}

    def spellings(self) -> Iterator[Example]:
        yield Example("first_of_two", _example(lambda attend, x: attend(x, x, x)[0]))
        yield Example("unpacked", _example(lambda attend, x: _first(*attend(x, x, x))))
        yield Example("cross_attention", _example(lambda attend, x: attend(x, x[:, :4], x[:, :4])[0]))

    def near_misses(self) -> Iterator[Example]:
        yield Example("weights_read", _example(lambda attend, x: attend(x, x, x)), False)
        yield Example("weights_not_wanted", _example(lambda attend, x: attend(x, x, x, need_weights=False)[0]), False)
        yield Example("masked", _example(lambda attend, x: attend(x, x, x, attn_mask=_later(x))[0]), False)
        yield Example("dropout", _example(lambda attend, x: attend(x, x, x)[0], dropout=0.5), False)


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and node.target is F.multi_head_attention_forward


def _takes(node: Node, index: int) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and bool(node.args[1] == index)


# -- examples ------------------------------------------------------------------------------------------------------


class _Attend(nn.Module):
    def __init__(self, call: Callable[..., Any], dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.attention, x)


def _example(call: Callable[..., Any], dropout: float = 0.0) -> Callable[[torch.dtype], tuple[nn.Module, tuple[Any]]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any]]:
        return _Attend(call, dropout).to(dtype), (torch.randn(2, 6, 16, dtype=dtype, requires_grad=True),)

    return make


def _first(out: Tensor, _: Tensor) -> Tensor:
    return out


def _later(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
