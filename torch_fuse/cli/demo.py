"""`torch-fuse demo`: an unmodified Pythia in eager, under Inductor and under fuse: right, and how fast."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import torch_fuse
from torch_fuse.cli import pythia
from torch_fuse.cli.arguments import parse_device, parse_dtype, read_config
from torch_fuse.cli.compiling import fuse_arguments
from torch_fuse.cli.doctor import compiler_problem
from torch_fuse.cli.numerics import Check, check_all, float64_result
from torch_fuse.cli.progress import Steps
from torch_fuse.cli.tables import print_report
from torch_fuse.cli.timing import Timing, measure
from torch_fuse.report import Report

NAMES = ("eager", "inductor", "fuse")


@dataclass(frozen=True)
class DemoArguments:
    """The command's arguments as given; None and "auto" mean: what fits the machine."""

    model: Path | None
    size: str
    tokens: int | None
    batch: int
    dtype: str
    device: str
    mode: str | None
    kernels: str
    seed: int
    json_file: Path | None


@dataclass(frozen=True)
class Plan:
    """The arguments with every choice made."""

    title: str
    geometry: pythia.Geometry | None
    checkpoint: Path | None
    tokens: int
    vocab_size: int
    dtype: torch.dtype | None
    device: torch.device


def make_plan(args: DemoArguments) -> Plan:
    """Chooses what the arguments leave open; wrong ones are refused here, before anything runs."""
    device = parse_device(args.device)
    tokens = args.tokens or (2048 if device.type == "cuda" else 1024)
    if args.model is not None:
        if args.size != "auto":
            raise typer.BadParameter(f"{args.size!r} with --model; allowed: one of the two", param_hint="--size")
        config = read_config(args.model, "--model")
        limit = config.get("max_position_embeddings", tokens)
        vocab = config.get("vocab_size", pythia.VOCAB_SIZE)
        dtype = None if args.dtype == "auto" else parse_dtype(args.dtype, device)
        title, geometry = f"{config.get('model_type', 'model')} from {args.model}", None
        if args.tokens is None:
            tokens = min(tokens, limit)
    else:
        limit, vocab = pythia.MAX_TOKENS, pythia.VOCAB_SIZE
        dtype = parse_dtype(args.dtype, device)
        rows = tokens * args.batch
        size = args.size if args.size != "auto" else pythia.fitting_size(device, dtype, rows)
        geometry = pythia.SIZES[size]
        title = (
            f"Pythia-{size.upper()} geometry ({geometry.layers} layers, hidden {geometry.hidden_size}, "
            f"{geometry.heads} heads), random weights"
        )
    if tokens > limit:
        raise typer.BadParameter(f"{tokens}; allowed: 1 to {limit}, the model's longest context", param_hint="--tokens")
    return Plan(title, geometry, args.model, tokens, vocab, dtype, device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _logits(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def run_demo(args: DemoArguments, console: Console) -> int:
    """Runs the demo; returns the exit status: 0, or 1 when a result is wrong."""
    plan = make_plan(args)
    problem = compiler_problem() if plan.device.type == "cpu" else None
    if problem is not None:
        console.print(f"[red]The demo cannot run:[/] {escape(problem)}")
        return 1
    console.print(f"[bold]{escape(plan.title)}[/]", highlight=False)
    console.print(
        f"{args.batch} x {plan.tokens} tokens, forward pass, on {_device_name(plan.device)}; "
        f"torch {torch.__version__}, torch_fuse {torch_fuse.__version__}",
        highlight=False,
    )
    steps = Steps(console)
    torch.compiler.reset()
    with torch.no_grad():
        with steps.step("building the model"):
            if plan.checkpoint is not None:
                model = pythia.load(plan.checkpoint, plan.dtype, plan.device)
            else:
                assert plan.geometry is not None and plan.dtype is not None
                model = pythia.build(plan.geometry, plan.dtype, plan.device, args.seed)
        dtype = next(model.parameters()).dtype
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(plan.vocab_size, (args.batch, plan.tokens), generator=generator).to(plan.device)

        with steps.step("the same weights in float64, for the checks"):
            reference = float64_result(model, lambda exact: _logits(exact, ids))
        calls, first_call, results = _first_calls(args, model, ids, steps)
        report = torch_fuse.reports()
        with steps.step("checking the three results against float64"):
            checks = check_all(results, reference, dtype)
        del reference, results
        with steps.step("timing the three in turns"):
            on_gpu = plan.device.type == "cuda"
            timings = measure(
                calls,
                plan.device,
                rounds=30 if on_gpu else 15,
                warmup=5 if on_gpu else 1,
                budget_seconds=30.0,
            )

    console.print()
    print_report(console, report)
    console.print()
    rows = args.batch * plan.tokens
    console.print(_results_table(timings, checks, rows, dtype))
    passed = _print_verdict(console, plan.device, args.kernels, report, timings, checks)
    if args.json_file is not None:
        data = {
            "model": plan.title,
            "machine": {"device": _device_name(plan.device), "platform": platform.platform()},
            "versions": {
                "torch": torch.__version__,
                "torch_fuse": torch_fuse.__version__,
                "python": platform.python_version(),
            },
            "batch": args.batch,
            "tokens": plan.tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "mode": args.mode,
            "kernels": args.kernels,
            "seed": args.seed,
            "passed": passed,
            "runs": {
                name: {
                    "median_ms": timings[name].median,
                    "rounds_ms": list(timings[name].rounds),
                    "tokens_per_second": 1e3 * rows / timings[name].median,
                    "first_call_seconds": first_call.get(name),
                    "error": asdict(checks[name].error),
                    "allowed": asdict(checks[name].allowed),
                    "passed": checks[name].passed,
                }
                for name in NAMES
            },
            "report": report.to_dict(),
        }
        args.json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {escape(str(args.json_file))}", highlight=False)
    return 0 if passed else 1


def _first_calls(
    args: DemoArguments, model: torch.nn.Module, ids: torch.Tensor, steps: Steps
) -> tuple[dict[str, Callable[[], object]], dict[str, float], dict[str, torch.Tensor]]:
    """The three callables, the seconds of the compiled ones' first calls, and the three results."""
    models: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(model, mode=args.mode),
        "fuse": torch.compile(model, backend="fuse", **fuse_arguments(args.mode, args.kernels)),
    }
    labels = {
        "eager": "eager",
        "inductor": "Inductor compiles (a minute or so) and runs",
        "fuse": "fuse rewrites, Inductor compiles (as long at most) and it runs",
    }
    torch_fuse.reset_reports()
    results: dict[str, torch.Tensor] = {}
    for name, candidate in models.items():
        with steps.step(labels[name]):
            # cloned: under CUDA graphs the next call overwrites it
            results[name] = _logits(candidate, ids).clone()

    def caller(candidate: Callable[..., Any]) -> Callable[[], object]:
        def call() -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return _logits(candidate, ids)

        return call

    first_call = {name: steps.seconds[labels[name]] for name in ("inductor", "fuse")}
    return {name: caller(candidate) for name, candidate in models.items()}, first_call, results


def _results_table(
    timings: dict[str, Timing],
    checks: dict[str, Check],
    rows: int,
    dtype: torch.dtype,
) -> Table:
    rounds = len(timings["fuse"].rounds)
    title = f"{str(dtype).removeprefix('torch.')}, median of {rounds} rounds, errors against float64"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "ms", "quartiles", "tokens/s", "speed-up", "max error", "RMS error", "check"):
        table.add_column(column, justify="left" if column in ("", "check") else "right", no_wrap=True)
    for name in NAMES:
        timing, check = timings[name], checks[name]
        low, high = timing.quartiles
        table.add_row(
            name,
            f"{timing.median:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{1e3 * rows / timing.median:,.0f}",
            f"{timings['eager'].median / timing.median:.2f}x",
            f"{check.error.max:.1e}",
            f"{check.error.rms:.1e}",
            "[green]ok[/]" if check.passed else "[red]WRONG[/]",
        )
    return table


def _print_verdict(
    console: Console,
    device: torch.device,
    kernels: str,
    report: Report,
    timings: dict[str, Timing],
    checks: dict[str, Check],
) -> bool:
    """What the figures say, in sentences; returns whether every result is right."""
    fuse, inductor, eager = timings["fuse"], timings["inductor"], timings["eager"]
    console.print(
        f"fuse runs at {inductor.median / fuse.median:.2f}x the speed of Inductor and "
        f"{eager.median / fuse.median:.2f}x the speed of eager.",
        style="bold",
        highlight=False,
    )
    if not fuse.differs_from(inductor):
        console.print("The quartiles of fuse and Inductor overlap: this run shows no difference between them.")
    if kernels == "reference":
        console.print("The fused ops ran as plain PyTorch (--kernels reference): this shows the rewrite, not speed.")
    elif device.type == "cpu":
        console.print(
            "The fused kernels are GPU kernels and do not run on a CPU: such sites stay with Inductor (kept "
            "in the table). A mask that is proven to be causal is dropped on a CPU too. "
            "--kernels reference rewrites everything."
        )
    if any(graph.error for graph in report.graphs):
        console.print("[red]A graph could not be rewritten and ran as under Inductor; see above.[/]")
    for name in NAMES:
        check = checks[name]
        if not check.passed:
            console.print(
                f"[red]{name} is wrong:[/] error against float64 max {check.error.max:.3e}, "
                f"RMS {check.error.rms:.3e}; "
                f"allowed max {check.allowed.max:.3e}, RMS {check.allowed.rms:.3e}",
                highlight=False,
            )
    return all(check.passed for check in checks.values())
