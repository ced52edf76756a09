"""Looks back from attention weights over the softmax to the product of query and key, and records what lies between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.norm import strip_casts
from torch_fuse.graph.product import Product, match_product
from torch_fuse.graph.score_bias import constant
from torch_fuse.graph.score_sinks import drops_last_column, joined_sinks, row_maximum
from torch_fuse.graph.score_steps import Cap, Factor, Fill, Term, Walk
from torch_fuse.graph.values import same_shape, tensor

_LIMIT = 24  # steps between the two products
_VIEWS = ("view", "reshape", "flatten", "unflatten")


# -- from the result to the softmax --------------------------------------------------------------------------------


def weights_of(node: Any, walk: Walk) -> tuple[Walk, Product] | None:
    """Looks through what lies between the softmax and the product with the values."""
    for _ in range(_LIMIT):
        call, found = call_of(node), tensor(node)
        if call is None or found is None or found.dim() < 3:
            return None
        if call.op == "softmax":
            if call["dim"] not in (-1, found.dim() - 1):
                return None
            return _scores(
                node, call["input"], walk.over(node, softmax=node, refusal=walk.refuse(_autocast(node, call)))
            )
        source = call.args.get("input")
        if call.op == "dropout":
            drops = call["training"] is not False and walk.dropout_p == 0
            walk = walk.over(node, dropout_p=call["p"] if drops else walk.dropout_p)
        elif call.op in ("getitem", "narrow") and drops_last_column(node, call) and not walk.drops_sinks:
            walk = walk.over(node, drops_sinks=True)
        elif call.op == "getitem" and (whole := tensor(source)) is not None and found.dim() == whole.dim():
            walk = walk.over(node, refusal=walk.refuse("a part of the attention weights is taken"))
        elif _is_view(call, node):
            walk = walk.over(node, heads=_split(node, walk.heads))
        elif _is_cast(call, node) or call.op in ("contiguous", "clone"):
            walk = walk.over(node)
        else:
            return None
        node = source
    return None


def _autocast(node: Node, call: Call) -> str:
    before, after = tensor(call["input"]), tensor(node)
    asked = any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values()))
    if before is None or after is None or (before.dtype != after.dtype and not asked):
        return "autocast changes the dtype of the softmax"
    return ""


def _is_cast(call: Call, node: Node) -> bool:
    return call.op == "cast" and not call.inplace and strip_casts(node) is not node


def _is_view(call: Call, node: Node) -> bool:
    """Whether a view leaves the last two dimensions alone: it splits or merges those of batch and heads."""
    before, after = tensor(call.args.get("input")), tensor(node)
    return (
        call.op in _VIEWS
        and before is not None
        and after is not None
        and after.dim() >= 3
        and same_shape(before.shape[-2:], after.shape[-2:])
    )


def _split(node: Node, heads: tuple[Any, Any] | None) -> tuple[Any, Any] | None:
    for x in (node, call_of(node)["input"]):  # type: ignore[index]
        found = tensor(x)
        if found is not None and found.dim() == 4:
            return found.shape[0], found.shape[1]
    return heads


# -- from the softmax to the scores --------------------------------------------------------------------------------


def _scores(reader: Node, node: Any, walk: Walk) -> tuple[Walk, Product] | None:
    """Looks through what lies between the product of query and key and the softmax, from what `reader` reads."""
    node = _last_write(node, reader)
    found = tensor(node)
    if found is None or found.dim() < 3 or walk.steps > _LIMIT:
        return None
    product = match_product(node)
    if product is not None:
        scores_like = product.dims == tuple(range(len(product.dims)))
        return (walk.over(node), product) if scores_like else None
    call = call_of(node)
    if call is None:
        return _through_unknown(node, walk, getattr(node.target, "__name__", str(node.target)))
    if _is_view(call, node):
        return _scores(node, call["input"], walk.over(node, heads=_split(node, walk.heads)))
    if _is_cast(call, node) or call.op in ("contiguous", "clone"):
        return _scores(node, call["input"], walk.over(node))
    if call.op == "add":
        return _sum(node, call, found, walk)
    if call.op in ("mul", "div"):
        return _scaled(node, call, found, walk)
    if call.op in ("masked_fill", "where"):
        return _filled(node, call, found, walk)
    if call.op == "cat":
        return _joined(node, call, found, walk)
    if call.op == "tanh":
        second = walk.refuse("the scores go through tanh twice") if walk.cap is not None else walk.refusal
        cap = Cap(walk.factors, len(walk.terms), len(walk.fills))
        return _scores(node, call["input"], walk.over(node, cap=cap, factors=(), refusal=second))
    if call.op == "sub" and call["alpha"] == 1 and (maximum := row_maximum(call["other"], call["input"])):
        late = walk.touched or walk.sinks is not None
        between = "the scores are changed after their maximum is subtracted" if late else ""
        further = walk.over(node, refusal=walk.refuse(between))
        return _scores(node, call["input"], replace(further, nodes=further.nodes | maximum))
    return _through_unknown(node, walk, call.op)


def _last_write(node: Any, reader: Node) -> Any:
    """The call that last wrote to a node before another reads it (`scores.masked_fill_(...)`), or the node itself."""
    if not isinstance(node, Node):
        return node
    calls = [(user, call_of(user)) for user in node.users if user is not reader and user < reader]
    writes = [user for user, call in calls if call is not None and call.inplace and call.args.get("input") is node]
    return max(writes, default=node)


def _through_unknown(node: Node, walk: Walk, name: str) -> tuple[Walk, Product] | None:
    same = [x for x in node.all_input_nodes if tensor(x) is not None and alike(x, node)]
    if len(same) != 1:
        return None
    return _scores(node, same[0], walk.over(node, refusal=walk.refuse(f"the scores go through {name}")))


def _joined(node: Node, call: Call, found: torch.Tensor, walk: Walk) -> tuple[Walk, Product] | None:
    """Over the cat of scores and sinks."""
    joined = joined_sinks(call, found)
    if joined is None:
        reason = "what is joined to the scores is not one number a head"
    elif not walk.drops_sinks or walk.sinks is not None:
        reason = "their column is not dropped"
    elif walk.touched:
        reason = "the scores are changed after they are joined"
    else:
        scores, sinks, between = joined
        return _scores(node, scores, walk.over(node, sinks=sinks, sink_nodes=between))
    further = walk.over(node, drops_sinks=False, refusal=walk.refuse(f"attention sinks: {reason}"))
    parts = call["tensors"] if isinstance(call["tensors"], (list, tuple)) else ()
    return next((seen for part in parts if (seen := _scores(node, part, further)) is not None), None)


def alike(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors known to be of one shape."""
    x, y = tensor(a), tensor(b)
    return x is not None and y is not None and same_shape(x.shape, y.shape)


def _sum(node: Node, call: Call, found: torch.Tensor, walk: Walk) -> tuple[Walk, Product] | None:
    sides = [(call["input"], call["other"])]
    if call["alpha"] == 1 and not call.inplace:
        sides.append((call["other"], call["input"]))
    for scores, addend in sides:
        if not (isinstance(scores, Node) and alike(scores, node)):
            continue
        if not isinstance(addend, Node) or tensor(addend) is None or call["alpha"] != 1:
            continue
        term = Term(addend, found.dim(), walk.factors)
        further = _scores(node, scores, walk.over(node, terms=(*walk.terms, term)))
        if further is not None:
            return further
    return None


def _scaled(node: Node, call: Call, found: torch.Tensor, walk: Walk) -> tuple[Walk, Product] | None:
    sides = [(call["input"], call["other"])]
    if call.op == "mul" and not call.inplace:
        sides.append((call["other"], call["input"]))
    for scores, number in sides:
        if not (isinstance(scores, Node) and alike(scores, node)) or alike(number, node):
            continue
        factor = Factor(number, call.op == "div")
        further = _scores(node, scores, walk.over(node, factors=(*walk.factors, factor)))
        if further is not None:
            return further
    return None


def _filled(node: Node, call: Call, found: torch.Tensor, walk: Walk) -> tuple[Walk, Product] | None:
    if call.op == "masked_fill":
        options = [(call["input"], call["mask"], True, call["value"])]
    else:
        condition, yes, no = call["condition"], call["input"], call["other"]
        options = [(yes, condition, False, no), (no, condition, True, yes)]
    for scores, mask, inverted, filled in options:
        number = constant(filled)
        if number is None or not (isinstance(scores, Node) and alike(scores, node)):
            continue
        mask_value = tensor(mask)
        if mask_value is None or mask_value.dtype != torch.bool:
            continue
        fill = Fill(mask, inverted, number, filled, found.dim(), len(walk.terms))
        refusal = walk.refuse("the scores are scaled after masking" if walk.factors else "")
        further = _scores(node, scores, walk.over(node, fills=(*walk.fills, fill), refusal=refusal))
        if further is not None:
            return further
    return None
