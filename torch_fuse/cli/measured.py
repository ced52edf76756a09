"""`torch-fuse measurements`: the times of attention backends that this machine remembers."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torch_fuse import measurements

KIND = "attention"


def run_measurements(clear: bool, json_output: bool, console: Console) -> int:
    """Prints the entries, or deletes them."""
    directory = str(measurements.directory(KIND))
    if clear:
        count = measurements.clear(KIND)
        if json_output:
            sys.stdout.write(json.dumps({"directory": directory, "deleted": count}) + "\n")
        else:
            console.print(f"{count} measurement(s) deleted from {escape(directory)}", highlight=False)
        return 0
    entries = measurements.stored(KIND)
    if json_output:
        sys.stdout.write(json.dumps({"directory": directory, "entries": entries}, indent=1) + "\n")
        return 0
    if entries:
        console.print(_table(entries))
    console.print(f"{len(entries)} measurement(s) in {escape(directory)}", highlight=False)
    return 0


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table("GPU, torch", "query", "key", "attention", "us", box=box.SIMPLE_HEAD)
    for entry in entries:
        key, value = entry["key"], entry["value"]
        kind = ", ".join([str(key.get("dtype")), *(word for word in ("causal", "gradients") if key.get(word))])
        times = ", ".join(f"{name} {us[0]:.1f}" for name, us in _times(value))
        cells = (f"{key.get('gpu')}, {key.get('torch')}", _shape(key, "query"), _shape(key, "key"), kind, times)
        table.add_row(*map(escape, cells))
    return table


def _shape(key: dict[str, Any], name: str) -> str:
    layout = key.get(name)
    return str(layout[0]) if isinstance(layout, list) and layout else "?"


def _times(value: Any) -> list[tuple[str, list[float]]]:
    us = value.get("us") if isinstance(value, dict) else None
    found = us.items() if isinstance(us, dict) else ()
    right = [(name, x) for name, x in found if isinstance(x, list) and x and isinstance(x[0], (int, float))]
    return sorted(right, key=lambda item: item[1][0])
