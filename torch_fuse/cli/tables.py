"""A `Report` as a rich table."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torch_fuse.report import Report

_STYLES = {"fused": "green", "kept": "yellow", "missed": "red"}


def short_location(location: str) -> str:
    """The file's name and line; the report as data has the whole path."""
    return PurePath(location).name if location else ""


def report_table(report: Report) -> Table:
    """One row for each group of sites that differ in nothing but their node."""
    groups = Counter(
        (site.pattern, site.status, site.op.removeprefix("torch_fuse::"), short_location(site.location), site.reason)
        for site in report.sites
    )
    table = Table(title="What was fused, what was not, and why", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("pattern", "status", "sites", "op", "where", "reason"):
        table.add_column(
            column, justify="right" if column == "sites" else "left", overflow="fold", no_wrap=column == "op"
        )
    for (pattern, status, op, where, reason), n in groups.items():
        style = _STYLES.get(status, "")
        cells = (pattern, f"[{style}]{status}[/]" if style else status, str(n), op or "-", where, reason)
        table.add_row(*(cell if i == 1 else escape(cell) for i, cell in enumerate(cells)))
    return table


def print_report(console: Console, report: Report) -> None:
    """The table, the totals (0 sites when there is nothing to fuse), and the graphs that failed."""
    rewrites = sum(graph.rewrites for graph in report.graphs)
    counts: Counter[str] = Counter(site.status for site in report.sites)
    states = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    if report.sites:
        console.print(report_table(report))
    console.print(
        f"{len(report.sites)} site(s){': ' + states if states else ''}; {rewrites} rewrite(s) in "
        f"{len(report.graphs)} graph(s), matched in {1e3 * report.seconds:.0f} ms",
        highlight=False,
    )
    for graph in report.graphs:
        if graph.error:
            console.print(f"[red]not rewritten:[/] {escape(graph.error)}")
