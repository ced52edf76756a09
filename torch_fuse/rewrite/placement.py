"""Where in the graph a replacement is computed: behind all that it reads, before all that reads its results."""

from __future__ import annotations

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import is_hoistable
from torch_fuse.graph.miss import Miss
from torch_fuse.rewrite.pattern import Match
from torch_fuse.rewrite.view import GraphView


def outdated(view: GraphView, match: Match, stale: set[Node]) -> bool:
    """Whether rewrites since the view was made have touched the match, or the place where it would go."""
    if stale.intersection((*match.region, *match.inputs)):
        return True
    index = view.order.index
    if any(node not in index for node in (*match.region, *match.inputs)):
        return True
    if any(user not in index for node in match.replaced for user in node.users):
        return True
    return view.order.nodes[max(index[node] for node in match.replaced) + 1] in stale


def _earliest_reader(view: GraphView, match: Match) -> int:
    """The position before which the replacement has to be computed."""
    index = view.order.index
    at = max(index[node] for node in match.replaced) + 1
    return min([at, *(index[user] for node in match.replaced for user in node.users if user not in match.region)])


def hoist_views(view: GraphView, match: Match) -> bool:
    """Moves views that the match reads before the first reader of its results, where that changes nothing.

    A slice of the key may stand behind the concatenation that the query goes into.
    """
    at, order = _earliest_reader(view, match), view.order
    late: set[Node] = set()
    pending = list(match.inputs)
    while pending:
        node = pending.pop()
        if order.index[node] < at or node in late:
            continue
        if not is_hoistable(node):
            return False
        late.add(node)
        pending += node.all_input_nodes
    if not late:
        return False
    try:
        # From the node before the reader on: what is written between the reader and the views counts too.
        order.check_movable(
            {*late, order.nodes[at - 1]}, [source for node in late for source in node.all_input_nodes], at
        )
    except Miss:
        return False
    for node in sorted(late, key=order.index.__getitem__):
        order.nodes[at].prepend(node)
    return True


def insertion_point(view: GraphView, match: Match, across_autocast: bool) -> int:
    """The position before which the replacement is computed.

    Raises:
        Miss: when a result is read before everything that the match needs is there, or when reading it there
            instead of where the graph reads it would give other values.
    """
    index = view.order.index
    at = _earliest_reader(view, match)
    late = [node for node in match.inputs if index[node] >= at]
    if late:
        raise Miss(f"{view.order.nodes[at].name} reads a part of the match before {late[0].name} is computed", late[0])
    view.order.check_movable(match.region, match.inputs, at, across_autocast)
    casts = _looked_through(match)
    if casts:
        sources = [source for node in casts for source in node.all_input_nodes]
        view.order.check_movable(casts, sources, at, across_autocast)
    return at


def _looked_through(match: Match) -> set[Node]:
    """Casts that the region reads and others read too: the replacement reads what they were made of, and later."""
    found: set[Node] = set()
    pending = [node for inside in match.region for node in inside.all_input_nodes]
    while pending:
        node = pending.pop()
        call = call_of(node)
        if call is None or call.op != "cast" or node in found or node in match.region or node in match.inputs:
            continue
        found.add(node)
        pending += node.all_input_nodes
    return found
