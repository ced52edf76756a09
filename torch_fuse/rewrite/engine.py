"""Applies the registered patterns to a graph and writes down what became of every candidate."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch.fx import GraphModule, Node

from torch_fuse.graph.effects import transforms
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import describe_shape, location, tensor, value
from torch_fuse.options import Options
from torch_fuse.report import GraphReport, Site, Status
from torch_fuse.rewrite.builder import Builder, check_same_meta, same_strides
from torch_fuse.rewrite.casts import free_casts
from torch_fuse.rewrite.child_graphs import assembled, copy_of, inside_transform, with_children
from torch_fuse.rewrite.guards import respell
from torch_fuse.rewrite.pattern import Match, Pattern
from torch_fuse.rewrite.placement import hoist_views, insertion_point, outdated
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
    for module, _ in list(with_children(gm)):
        respell(module)
        free_casts(module)
    backups = [(module, copy_of(module)) for module, _ in with_children(gm)]
    try:
        for module, refusal in list(with_children(gm)):
            _rewrite_module(module, module is not gm, refusal, run)
    except Exception:
        for module, backup in backups:
            module.graph = backup.graph
            module.recompile()
        raise
    run.report.seconds = time.perf_counter() - start
    run.report.nodes = len(gm.graph.nodes)
    original = assembled(backups) if run.report.rewrites else None
    return Outcome(gm, original, run.report)


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
            if match is not None and outdated(view, match, stale):
                view, stale = look(), set()
                match = pattern.match(view, anchor)
            if match is None:
                continue
            if hoist_views(view, match):
                view, stale = look(), set()
                match = pattern.match(view, anchor)
                assert match is not None
            at = insertion_point(view, match, pattern.across_autocast)
            inside = transformed.get(anchor)
            kept = _kept(pattern, match, refusal or (inside_transform(inside) if inside else ""), run)
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
