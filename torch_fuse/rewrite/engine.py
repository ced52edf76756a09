"""Applies the registered patterns to a graph and writes down what became of every candidate."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.fx import Graph, GraphModule, Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import is_hoistable, transforms
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import describe_shape, location, tensor, value
from torch_fuse.options import Options
from torch_fuse.report import GraphReport, Site, Status
from torch_fuse.rewrite.builder import Builder, check_same_meta, same_strides
from torch_fuse.rewrite.casts import free_casts
from torch_fuse.rewrite.guards import respell
from torch_fuse.rewrite.pattern import Match, Pattern
from torch_fuse.rewrite.restride import restride
from torch_fuse.rewrite.view import KINDS, GraphView

_log = logging.getLogger(__name__)

# What is said of a candidate that no pattern had anything to do with.
_UNCLAIMED: dict[str, tuple[Status, str]] = {
    "attention": (
        "kept",
        "nothing to fuse around it: no mask, no rotary embedding, no norm of query and key",
    ),
    "norm_linear": (
        "kept",
        "Inductor fuses the norm into one kernel; the product stays with the GEMM library",
    ),
    "combine": ("kept", "Inductor fuses it into one kernel; no registered fusion takes it further"),
    "dequant": ("missed", "no registered fusion for a weight that is dequantised in the graph"),
}
# Child graphs whose bodies are differentiated and compiled like the outer graph.
_OPEN_REGIONS = {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "cond", "invoke_subgraph"}


@dataclass
class Outcome:
    """A rewritten graph module.

    Attributes:
        gm: the graph module that was given, rewritten in place.
        original: a copy of it as it was, or None when nothing was rewritten.
        report: what became of every candidate.
    """

    gm: GraphModule
    original: GraphModule | None
    report: GraphReport


@dataclass
class _Run:
    options: Options
    patterns: dict[str, Pattern]
    report: GraphReport = field(default_factory=GraphReport)
    claimed: set[tuple[str, str]] = field(default_factory=set)
    made: dict[Node, int] = field(default_factory=dict)  # what sites were replaced by, and the sites' positions

    @property
    def out_of_fuel(self) -> bool:
        return self.options.fuel is not None and self.report.rewrites >= self.options.fuel


def rewrite(gm: GraphModule, options: Options, patterns: dict[str, Pattern]) -> Outcome:
    """Rewrites a Dynamo graph and its child graphs in place.

    Args:
        gm: the graph module that Dynamo hands to a backend.
        options: checked options.
        patterns: the patterns to try, by name, in order.

    Raises:
        Exception: whatever a pattern raises besides Miss; the graph is then as it was.
    """
    start = time.perf_counter()
    run = _Run(options, patterns)
    for module, _ in list(_modules(gm)):
        respell(module)
        free_casts(module)
    backups = [(module, _copy(module)) for module, _ in _modules(gm)]
    try:
        for module, refusal in list(_modules(gm)):
            _rewrite_module(module, module is not gm, refusal, run)
    except Exception:
        for module, backup in backups:
            module.graph = backup.graph
            module.recompile()
        raise
    run.report.seconds = time.perf_counter() - start
    run.report.nodes = len(gm.graph.nodes)
    original = _assembled(backups) if run.report.rewrites else None
    return Outcome(gm, original, run.report)


def _copy(module: GraphModule) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, copies, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta = dict(output[1].meta)
    for node, copied in copies.items():
        for name in node.__dict__.keys() - copied.__dict__.keys():  # Dynamo keeps inputs' sources on the nodes
            setattr(copied, name, getattr(node, name))
    backup = GraphModule(module, graph)
    backup.meta = module.meta
    return backup


def _assembled(backups: list[tuple[GraphModule, GraphModule]]) -> GraphModule:
    """The copy of the outer module, with the copies of its child graphs in their places."""
    copies = dict(backups)
    for _, backup in backups:
        for name, child in list(backup.named_modules()):
            if name and child in copies:
                backup.set_submodule(name, copies[child])
    return backups[0][1]


def _modules(gm: GraphModule, refusal: str = "") -> Iterator[tuple[GraphModule, str]]:
    """A graph module and its child graphs, each with the reason why it may not be rewritten, or ""."""
    yield gm, refusal
    transformed = transforms(gm.graph.nodes)
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        child = getattr(gm, str(node.target), None)
        if not isinstance(child, GraphModule):
            continue
        names = {
            user.target.name() if isinstance(user.target, torch._ops.HigherOrderOperator) else "?"
            for user in node.users
        }
        closed = sorted(names - _OPEN_REGIONS)
        own = f"inside {closed[0]}, whose body is fixed" if closed else ""
        inside = next((transformed[user] for user in node.users if user in transformed), "")
        yield from _modules(child, refusal or own or (_inside_transform(inside) if inside else ""))


def _inside_transform(name: str) -> str:
    return f"inside {name}, for which fused ops have no rule"


def _rewrite_module(module: GraphModule, inner: bool, refusal: str, run: _Run) -> None:
    before = run.report.rewrites
    look = partial(GraphView, module, inner=inner, writes={}, options=run.options)
    for pattern in run.patterns.values():
        if pattern.lossy and pattern.lossy not in run.options.lossy:
            continue
        _apply(module, pattern, refusal, run, look)
    view = look()
    for kind in KINDS:
        for node in view.candidates(kind):
            if (kind, node.name) not in run.claimed:
                status, reason = _UNCLAIMED[kind]
                run.report.sites.append(_site(kind, kind, node, status, reason))
    if run.report.rewrites > before:
        module.graph.lint()
        module.recompile()


def _apply(module: GraphModule, pattern: Pattern, refusal: str, run: _Run, look: Callable[[], GraphView]) -> None:
    view = look()
    transformed = transforms(view.nodes)
    stale: set[Node] = set()
    for anchor in list(pattern.anchors(view)):
        if anchor in stale:
            continue
        try:
            match = pattern.match(view, anchor)
            if match is not None and _outdated(view, match, stale):
                view, stale = look(), set()
                match = pattern.match(view, anchor)
            if match is None:
                continue
            if _hoist_views(view, match):
                view, stale = look(), set()
                match = pattern.match(view, anchor)
                assert match is not None
            at = _insertion_point(view, match, pattern.across_autocast)
            inside = transformed.get(anchor)
            kept = _kept(pattern, match, refusal or (_inside_transform(inside) if inside else ""), run)
            if kept is not None:
                _record(run, pattern, anchor, "kept", kept)
                continue
            match = pattern.settle(match, run.options)
        except Miss as miss:
            _record(run, pattern, anchor, miss.status, miss.reason)
            continue
        except Exception as error:  # before anything was rewritten: it costs this site, not the graph's others
            if run.options.on_error == "raise":
                raise
            reason = f"{pattern.name} failed: {type(error).__name__}: {error}"
            _record(run, pattern, anchor, "missed", reason)
            run.report.error = run.report.error or reason
            _log.debug("%s", reason, exc_info=True)
            continue
        try:
            stale |= _replace(module, view, pattern, match, at, run)
        except Miss as miss:
            _record(run, pattern, anchor, miss.status, miss.reason)


def _outdated(view: GraphView, match: Match, stale: set[Node]) -> bool:
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


def _hoist_views(view: GraphView, match: Match) -> bool:
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


def _insertion_point(view: GraphView, match: Match, across_autocast: bool) -> int:
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


def _kept(pattern: Pattern, match: Match, refusal: str, run: _Run) -> str | None:
    options = run.options
    if refusal:
        return refusal
    if pattern.name in options.disable or (options.only and pattern.name not in options.only):
        return "disabled by options"
    if run.out_of_fuel:
        return f"options['fuel'] = {options.fuel} is used up"
    return pattern.check(match, options)


def _replace(module: GraphModule, view: GraphView, pattern: Pattern, match: Match, at: int, run: _Run) -> set[Node]:
    """Emits the replacement, or reports why not; returns the nodes that are no longer what they were."""
    builder = Builder(module, view.order.nodes[at], view.fake_mode, match.anchor, view.order.writers)
    try:
        changed = pattern.rewrite(match, builder, run.options)
        for old, new in changed.items():
            check_same_meta(old, new)
        restride(changed, view.fake_mode, view.order)
    except BaseException as error:
        builder.discard()
        if isinstance(error, Miss):
            _record(run, pattern, match.anchor, "kept", error.reason)
            return set()
        raise
    anchor = changed.get(match.anchor, match.anchor)
    kept_users = {*builder.nodes, *match.region}
    for old, new in changed.items():
        if same_strides(value(old), value(new)):
            new.meta["example_value"] = value(old)  # so that views of the old value are known as aliases
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept_users)
    run.report.rewrites += 1
    _record(run, pattern, anchor, "fused", match.note, match.op or pattern.op)
    _log.debug("%s rewrote %s: %s", pattern.name, match.anchor.name, match.note)
    erased = _erase_dead(module, view, match)
    _take_over(run, changed, erased)
    for node in set(match.replaced) - erased:
        if any(user.target is not operator.setitem for user in node.users):
            raise RuntimeError(f"{pattern.name} replaced {node.name}, but {next(iter(node.users)).name} still reads it")
    return set(match.replaced) | erased


def _erase_dead(module: GraphModule, view: GraphView, match: Match) -> set[Node]:
    erased = set()
    for node in sorted(match.region, key=view.order.index.__getitem__, reverse=True):
        if node.users or node.op not in ("call_function", "call_method"):
            continue
        if node.target is operator.setitem:
            target = node.args[0]
            readers = [user for user in target.users if user.target is not operator.setitem]  # type: ignore[union-attr]
            if readers or target not in match.region:
                continue
        module.graph.erase_node(node)
        erased.add(node)
    return erased


def _take_over(run: _Run, changed: dict[Node, Node], erased: set[Node]) -> None:
    """Reports the sites whose ops are a part of the newest site's as fused by its op."""
    sites = run.report.sites
    newest = sites[-1]
    taken = {run.made.pop(node) for node in erased if node in run.made}
    for i in taken.difference(run.made.values()):
        sites[i] = replace(sites[i], op=newest.op, reason=f"{sites[i].reason}; inside {newest.pattern}")
    if newest.op:
        run.made |= dict.fromkeys(changed.values(), len(sites) - 1)


def _record(run: _Run, pattern: Pattern, anchor: Node, status: Status, reason: str, op: str = "") -> None:
    kind = pattern.kind or "other"
    run.claimed.add((kind, anchor.name))
    run.report.sites.append(_site(pattern.name, kind, anchor, status, reason, op))
    _log.debug("%s at %s (%s): %s. %s", pattern.name, anchor.name, location(anchor), status, reason)


def _site(pattern: str, kind: str, node: Node, status: Status, reason: str, op: str = "") -> Site:
    found = tensor(node)
    return Site(
        pattern, status, reason, location(node), op, "" if found is None else str(found.device), kind,
        describe_shape(node), "" if found is None else str(found.dtype).removeprefix("torch."), node.name,
    )  # fmt: skip
