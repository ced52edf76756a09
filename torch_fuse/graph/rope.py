"""Recogniser: rotary position embedding along the last dimension, in every spelling.

out[p] = x[p] * cos - x[q] * sin and out[q] = x[q] * cos + x[p] * sin for the pairs (p, q) of the first
`rotary_dim` lanes, the rest passed through (RoFormer, arXiv:2104.09864). Pairs are (i, i + rotary_dim / 2)
("half", GPT-NeoX, Llama) or (2i, 2i + 1) ("interleaved", GPT-J, Wan), or (real, imaginary) of complex numbers
that are multiplied by cos + i sin (Llama 4). A table may hold whole matrices ((a, b), (c, d)), one for each pair: of a
rotation (Flux's first version, PRX, Kandinsky 5), or of anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from torch_fuse.graph.effects import Order
from torch_fuse.graph.lane_terms import Term, leaf_and_lane
from torch_fuse.graph.lanes import LaneTrace
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.values import same_shape, tensor


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        node: its result, [..., head_dim].
        source: what is rotated; lanes [offset, offset + head_dim) of its last dimension.
        offset: first lane.
        head_dim: size of the last dimension of the result.
        rotary_dim: lanes that are rotated, from lane 0 on.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        cos: table of cosines, or complex with the cosines at the even lanes of its `view_as_real`;
            cos_lanes = (step, first, second): pair i uses lanes step * i + first and step * i + second of its
            last dimension for its two elements.
        sin: table of sines, and sin_lanes.
        cos_rank: how many of the last dimensions of the table its lanes are, and sin_rank.
        sin_sign: -1 when it rotates the other way round, by -sin.
        matrices: the table has the sine of a pair's first element negated: out[p] = x[p] * cos + sin_sign * x[q] * sin.
        nodes: all nodes from the source to the result.
    """

    node: Node
    source: Node
    offset: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    cos: Node
    sin: Node
    cos_lanes: tuple[int, int, int]
    sin_lanes: tuple[int, int, int]
    cos_rank: int
    sin_rank: int
    sin_sign: int
    matrices: bool
    nodes: frozenset[Node]


# A product of one lane: sign, lane of the source, (leaf, lane) of the table or None.
_Product = tuple[int, int, "tuple[int, int] | None"]


def match_rope(node: Node, order: Order, is_leaf: Callable[[Node], bool], tables: Collection[Node] = ()) -> Rope | None:
    """Recognises a rotary embedding whose result is `node`; None when nothing is rotated.

    Args:
        node: a tensor [..., head_dim].
        order: positions of the graph's nodes.
        is_leaf: nodes not to look into, such as the result of a norm.
        tables: nodes known to be tables of cosines or sines (from the query, when matching the key).

    Raises:
        Miss: when elements are combined along the last dimension, but not as a rotary embedding does.
    """
    seen: set[Node] = set()
    try:
        return _match(node, order, is_leaf, tables, seen)
    except Kept:
        raise
    except Miss:
        # Something else is computed lane by lane before the rotation, an unusual norm say: stop at a value that the
        # rotation reads more than once.
        shared = [n for n in seen if n is not node and len(n.users) > 1 and not is_leaf(n)]
        for cut in sorted(shared, key=order.index.__getitem__, reverse=True):
            try:
                found = _match(node, order, partial(_is_cut_or_leaf, cut, is_leaf), tables, set())
            except Miss:
                continue
            if found is not None and found.source is cut:
                return found
        raise


def _is_cut_or_leaf(cut: Node, is_leaf: Callable[[Node], bool], node: Node) -> bool:
    return node is cut or is_leaf(node)


def _match(
    node: Node, order: Order, is_leaf: Callable[[Node], bool], tables: Collection[Node], seen: set[Node]
) -> Rope | None:
    """The embedding, with the nodes looked at added to `seen`."""
    trace = LaneTrace(order, is_leaf, nodes=seen)
    terms = trace.trace(node)
    if node in trace.leaves or not any(bool((term.b != 0).any()) for term in terms):
        return None
    _check_one_piece(terms, node)
    if not bool((_count(terms) > 1).any()):
        return None  # every lane is scaled on its own
    source = _source(node, trace, tables, terms)
    lanes = _products(terms, source, node)
    head_dim = len(lanes)
    offset = min(product[1] for lane in lanes for product in lane)
    rotary_dim = sum(len(lane) == 2 for lane in lanes)
    if rotary_dim == 0 or any(len(lane) != 2 for lane in lanes[:rotary_dim]):
        raise Miss("the rotated lanes are not the first of the head dimension", node, 2)
    if rotary_dim % 2:
        raise Miss(f"{rotary_dim} lanes are rotated, an odd number", node, 2)
    for d, lane in enumerate(lanes[rotary_dim:], rotary_dim):
        if lane[0] != (1, offset + d, None):
            raise Miss(f"lane {d} is not passed through unchanged", node, 2)
    half = rotary_dim // 2
    interleaved = half > 1 and any(product[1] == offset + 1 for product in lanes[0])
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    turn = _turn(lanes, pairs[0][1], offset + pairs[0][0])
    first_turn = _turn(lanes, pairs[0][0], offset + pairs[0][1])
    cos: list[tuple[tuple[int, int], tuple[int, int]]] = []
    sin: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for first, second in pairs:
        own_1, cross_1 = _own_and_cross(lanes[first], offset + first, offset + second, first_turn, node)
        own_2, cross_2 = _own_and_cross(lanes[second], offset + second, offset + first, turn, node)
        cos.append((own_1, own_2))
        sin.append((cross_1, cross_2))
    cos_leaf, cos_lanes = _table(cos, node)
    sin_leaf, sin_lanes = _table(sin, node)
    matrices = first_turn == turn
    if matrices and sin_lanes[0] < 1:
        raise Miss("the signs are not those of a rotation, (x1 cos - x2 sin, x2 cos + x1 sin)", node, 2)
    return Rope(
        node, trace.leaves[source], offset, head_dim, rotary_dim, interleaved, trace.leaves[cos_leaf],
        trace.leaves[sin_leaf], cos_lanes, sin_lanes, trace.ranks[cos_leaf], trace.ranks[sin_leaf], turn, matrices,
        frozenset(trace.nodes),
    )  # fmt: skip


def _count(terms: Sequence[Term]) -> torch.Tensor:
    """The number of terms of each lane."""
    return torch.stack([(term.sign != 0).flatten().int() for term in terms]).sum(0)


def _check_one_piece(terms: Sequence[Term], node: Node) -> None:
    """Raises Kept when lanes that are not rotated come first or from another tensor (multi-head latent attention)."""
    count = _count(terms)
    products = torch.stack([(term.b != 0).flatten() for term in terms]).any(0)
    rotated = (count == 2) & products
    passed = (count == 1) & ~products
    if not bool((rotated | passed).all()) or not bool(rotated.any()) or not bool(passed.any()):
        return
    changes = int((rotated[1:] != rotated[:-1]).sum())
    leaves = torch.stack([leaf_and_lane(refs)[0].flatten() for term in terms for refs in (term.a, term.b)])
    others = set(leaves[:, rotated].flatten().tolist())
    if changes == 1 and (bool(passed[0]) or not set(leaves[:, passed].max(0).values.tolist()) <= others):
        first, size = int(rotated.int().argmax()), int(rotated.sum())
        raise Kept(
            f"{size} of {len(rotated)} lanes, from lane {first} on, are rotated and joined with others: "
            "Inductor rotates them in the kernel that joins them", node,
        )  # fmt: skip


def _in_every_product(number: int, terms: Sequence[Term]) -> bool:
    in_a_factor = [(leaf_and_lane(t.a)[0] == number) | (leaf_and_lane(t.b)[0] == number) for t in terms]
    return all(bool((found | (t.sign == 0)).all()) for found, t in zip(in_a_factor, terms, strict=True))


def _source(node: Node, trace: LaneTrace, tables: Collection[Node], terms: Sequence[Term]) -> int:
    """The number of the leaf that is rotated: the one that has the result's leading dimensions."""
    result = tensor(node)
    assert result is not None
    candidates = []
    for number, leaf in enumerate(trace.leaves):
        found = tensor(leaf)
        if leaf in tables or found is None or found.is_complex() or found.dim() < result.dim():
            continue
        if same_shape(found.shape[: result.dim() - 1], result.shape[:-1]):
            candidates.append(number)
    if len(candidates) > 1:  # cosines and sines go into half of the products each
        candidates = [number for number in candidates if _in_every_product(number, terms)]
    if len(candidates) != 1:
        raise Miss(f"{len(candidates)} of {len(trace.leaves)} inputs could be what is rotated", node, 1)
    return candidates[0]


def _products(terms: Sequence[Term], source: int, node: Node) -> list[list[_Product]]:
    """For each lane of the result, the products that are summed."""
    columns = []
    for term in terms:
        (leaf_a, lane_a), (leaf_b, lane_b) = leaf_and_lane(term.a), leaf_and_lane(term.b)
        columns.append([x.flatten().tolist() for x in (term.sign, leaf_a, lane_a, leaf_b, lane_b)])
    lanes: list[list[_Product]] = []
    for d in range(len(columns[0][0])):
        products: list[_Product] = []
        for sign, *factors in ([column[d] for column in term] for term in columns):
            if sign == 0:
                continue
            found = [(factors[i], factors[i + 1]) for i in (0, 2) if factors[i] >= 0]
            data = [lane for leaf, lane in found if leaf == source]
            other = [factor for factor in found if factor[0] != source]
            if len(data) != 1 or len(other) > 1:
                raise Miss(f"lane {d} is not a sum of elements times table entries", node, 1)
            products.append((sign, data[0], other[0] if other else None))
        if len(products) not in (1, 2) or (len(products) == 2 and any(p[2] is None for p in products)):
            raise Miss(f"lane {d} is a sum of {len(products)} terms that is no rotation", node, 1)
        lanes.append(products)
    return lanes


def _turn(lanes: list[list[_Product]], own: int, cross: int) -> int:
    """The sign with which lane `cross` of the source goes into lane `own`."""
    return next((sign for sign, lane, _ in lanes[own] if lane == cross), 1)


def _own_and_cross(
    lane: Sequence[_Product], own: int, cross: int, sign: int, node: Node
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The table entries of x[own] (the cosine) and of sign * x[cross] (the sine)."""
    by_source = {product[1]: product for product in lane}
    if set(by_source) != {own, cross}:
        raise Miss("lanes are paired neither (i, i + rotary_dim / 2) nor (2i, 2i + 1)", node, 2)
    (own_sign, _, cos), (cross_sign, _, sin) = by_source[own], by_source[cross]
    if (own_sign, cross_sign) != (1, sign):
        raise Miss("the signs are not those of a rotation, (x1 cos - x2 sin, x2 cos + x1 sin)", node, 2)
    assert cos is not None and sin is not None
    return cos, sin


def _table(entries: Sequence[tuple[tuple[int, int], tuple[int, int]]], node: Node) -> tuple[int, tuple[int, int, int]]:
    """The number of the leaf and the (step, first, second) lanes that the entries of all pairs come from."""
    leaf = entries[0][0][0]
    first, second = entries[0][0][1], entries[0][1][1]
    step = entries[1][0][1] - first if len(entries) > 1 else 1
    for i, (one, two) in enumerate(entries):
        if one != (leaf, first + i * step) or two != (leaf, second + i * step):
            raise Miss("the cosines or sines of the pairs are not evenly spaced in one table", node, 2)
    return leaf, (step, first, second)
