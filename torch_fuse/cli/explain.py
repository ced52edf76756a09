"""`torch-fuse explain MODEL`: what would be fused in a model, what not, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

import torch_fuse
from torch_fuse.cli.arguments import parse_device
from torch_fuse.cli.inputs import example_inputs
from torch_fuse.cli.progress import Steps, make_console
from torch_fuse.cli.small import build_small, load_checkpoint
from torch_fuse.cli.tables import print_report


@dataclass(frozen=True)
class ExplainArguments:
    """The command's arguments as given."""

    model: str
    batch: int
    tokens: int
    layers: int
    device: str
    kernels: str
    json_output: bool


def run_explain(args: ExplainArguments, console: Console) -> int:
    """Builds or loads the model, traces it and prints the report; returns 1 when the trace failed."""
    device = parse_device(args.device)
    # with --json, stdout is the JSON alone
    steps = Steps(make_console(stderr=True) if args.json_output else console)
    directory = Path(args.model)
    with torch.no_grad():
        if directory.is_dir():
            with steps.step(f"loading {args.model}"):
                model = load_checkpoint(directory, device)
        else:
            with steps.step(f"building a small {args.model}"):
                model = build_small(args.model, args.layers, device)
        inputs = example_inputs(model, args.batch, args.tokens)
        try:
            with steps.step("tracing"):
                report = torch_fuse.explain(model, fuse_options={"kernels": args.kernels}, **inputs)
        except Exception as error:
            steps.console.print(
                f"[red]{escape(type(model).__name__)} could not be traced with the inputs made for it:[/] "
                f"{escape(type(error).__name__)}: {escape(str(error).strip())}\n"
                "In Python: torch_fuse.explain(model, *args, **kwargs) with inputs of your own."
            )
            return 1
    status = 1 if any(graph.error for graph in report.graphs) else 0
    if args.json_output:
        sys.stdout.write(json.dumps({"model": args.model, **report.to_dict()}, indent=1) + "\n")
        return status
    size = sum(p.numel() for p in model.parameters()) / 1e6
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    console.print(
        f"[bold]{escape(type(model).__name__)}[/], {size:.1f} M weights, {dtype} on {device}, "
        f"{args.batch} x {args.tokens} tokens",
        highlight=False,
    )
    print_report(console, report)
    return status
