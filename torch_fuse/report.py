"""What was fused, what was kept, what was missed, and why: one report for each compiled model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["fused", "kept", "missed"]


@dataclass(frozen=True)
class Site:
    """One candidate of one graph and what became of it.

    Attributes:
        pattern: name of the pattern (or of the kind of candidate where no pattern applies).
        status: "fused": replaced; "kept": recognised and left to Inductor on purpose; "missed": not recognised.
        reason: why it was kept or missed; for a fused site, what was proven.
        location: the user's source line, "file:line", or "" when the graph has none.
        op: the registered op that replaced it, or "".
        device: device of the result, such as "cuda:0".
        kind: "attention", "norm_linear", "combine" or "dequant".
        shape: shape of the result, with symbols for dynamic sizes.
        dtype: data type of the result, such as "bfloat16".
        node: name of the anchor node in the graph.
        graph: number of the graph within the report.
    """

    pattern: str
    status: Status
    reason: str
    location: str
    op: str = ""
    device: str = ""
    kind: str = "attention"
    shape: str = ""
    dtype: str = ""
    node: str = ""
    graph: int = 0


@dataclass
class GraphReport:
    """The sites of one graph that Dynamo handed to the backend."""

    sites: list[Site] = field(default_factory=list)
    rewrites: int = 0
    seconds: float = 0.0
    nodes: int = 0
    error: str = ""


class Report:
    """The sites of one or more graphs.

    `to_dict()` is `{"graphs": n, "sites": [{"pattern", "status", "reason", "location", "op", "device", ...}]}`;
    `str(report)` is a table.
    """

    def __init__(self, graphs: Iterable[GraphReport] = ()) -> None:
        self.graphs = list(graphs)

    @property
    def sites(self) -> list[Site]:
        """All sites in graph order, numbered by graph."""
        return [_numbered(site, i) for i, graph in enumerate(self.graphs) for site in graph.sites]

    @property
    def seconds(self) -> float:
        """Seconds spent matching and rewriting."""
        return sum(graph.seconds for graph in self.graphs)

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of sites by pattern and status."""
        table: dict[str, Counter[str]] = {}
        for site in self.sites:
            table.setdefault(site.pattern, Counter())[site.status] += 1
        return {name: dict(sorted(table[name].items())) for name in sorted(table)}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {
            "graphs": len(self.graphs),
            "sites": [asdict(site) for site in self.sites],
            "rewrites": sum(graph.rewrites for graph in self.graphs),
            "seconds": round(self.seconds, 6),
            "errors": [graph.error for graph in self.graphs if graph.error],
        }

    def __str__(self) -> str:
        rows = [("pattern", "status", "sites", "where", "reason")]
        rows += [
            (pattern, status, str(n), location, reason)
            for (pattern, status, location, reason), n in self.grouped().items()
        ]
        head = f"torch_fuse: {len(self.graphs)} graph(s), {sum(g.rewrites for g in self.graphs)} rewrite(s)"
        errors = [f"not rewritten: {graph.error}" for graph in self.graphs if graph.error]
        body = _table(rows) if len(rows) > 1 else "no attention, norm->linear, combine or dequant candidates"
        return "\n".join([head, *errors, body])

    def grouped(self) -> dict[tuple[str, str, str, str], int]:
        """Sites that differ in nothing but their node, counted: (pattern, status, location, reason) -> number."""
        return dict(Counter((s.pattern, s.status, s.location, s.reason) for s in self.sites))

    def __repr__(self) -> str:
        return f"Report(graphs={len(self.graphs)}, counts={self.counts()})"


def _numbered(site: Site, graph: int) -> Site:
    return Site(**{**asdict(site), "graph": graph})


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths) + "  ------")
    return "\n".join(lines)


_lock = threading.Lock()
_graphs: list[GraphReport] = []


def record(graph: GraphReport) -> None:
    """Adds the report of one compiled graph to those that `reports()` returns."""
    with _lock:
        _graphs.append(graph)


def reports() -> Report:
    """The report of every graph compiled with the backend since the start or the last `reset_reports()`."""
    with _lock:
        return Report(_graphs)


def reset_reports() -> None:
    """Forgets all reports."""
    with _lock:
        _graphs.clear()
