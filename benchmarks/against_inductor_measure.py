"""What benchmarks/against_inductor.py records of one model, in a process of its own."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from against_inductor_models import MODELS
from common import Log, captured, error, interleaved_rounds_ms
from coverage_measure import main_output
from torch import Tensor, nn
from torch._dynamo.utils import counters

import torch_fuse

CACHES = {
    "inductor": ("fxgraph_cache_miss", "fxgraph_cache_hit", "fxgraph_cache_bypass"),
    "aot_autograd": ("autograd_cache_miss", "autograd_cache_hit", "autograd_cache_bypass"),
}


def measure(name: str, log: Log, dry: bool, eager: bool, reps: int, rounds: int, wait: Callable[[], None]) -> None:
    """Compiles a model both ways, checks the results, times them in turns and writes a row.

    Args:
        name: of the model.
        log: takes the row.
        dry: tiny, on the CPU, with the ops' plain torch implementations.
        eager: without Inductor: the model as it is, next to the rewritten one.
        reps: calls timed in a row.
        rounds: how often the two take turns.
        wait: returns when nothing else runs on the device.
    """
    device, dtype, wide = ("cpu", torch.float32, torch.float64) if dry else ("cuda", torch.bfloat16, torch.float32)
    with torch.device(device):
        model, inputs = MODELS[name].build(dtype, dry)
        ones = torch.ones(8)
    if not eager:
        torch.compile(torch.sin)(ones)  # loads Inductor

    def call(f: Callable[..., Any]) -> Tensor:
        return main_output(f(**inputs))

    row: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch."), "dry": dry}
    with torch.no_grad():
        exact = _exact(model, inputs, wide)
        torch.cuda.empty_cache()  # others need the memory
        row["rms_eager"] = error(call(model), exact)["rms"]
        # What the two have in common is compiled for the first.
        calls = {side: (lambda f=f: call(f)) for side, f in _sides(model, dry, eager).items()}
        for side, run in calls.items():
            result, row[f"compile_cpu_s_{side}"], row[f"caches_{side}"] = _first(run)
            row[f"rms_{side}"] = error(result, exact)["rms"]
        del exact, result
        report = torch_fuse.reports()
        row |= {"match_s": round(report.seconds, 3), "sites": report.counts(), "left": _left(report)}
        replays = _replays(calls, row) if not dry else {}
        wait()
        for kind, timed in (("graph", replays), ("calls", calls)):
            row |= _timed(kind, timed, reps, rounds) if timed else {}
    log.write(what="against_inductor", **row)


def _exact(model: nn.Module, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The result in a wider dtype."""
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return main_output(copy.deepcopy(model).to(dtype)(**given))


def _sides(model: nn.Module, dry: bool, eager: bool) -> dict[str, Callable[..., Any]]:
    if eager:
        from harness import Rewriter

        rewriter = Rewriter()

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            run = rewriter(gm, example_inputs)
            torch_fuse.report.record(rewriter.report.graphs[-1])
            return run

        return {"fuse": torch.compile(model, backend=backend), "inductor": model}
    options = {"kernels": "reference"} if dry else None
    return {"fuse": torch.compile(model, backend="fuse", options=options), "inductor": torch.compile(model)}


def _first(run: Callable[[], Tensor]) -> tuple[Tensor, float, dict[str, int]]:
    """The result of the first call, its seconds of processor time, and what torch's caches of graphs had of it."""
    counters.clear()
    start = _cpu_s()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    caches = {key: counters[group][key] for group, keys in CACHES.items() for key in keys if counters[group][key]}
    return result, round(_cpu_s() - start, 2), caches


def _cpu_s() -> float:
    """Processor time so far, of the assemblers that were started too."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _left(report: torch_fuse.Report) -> dict[str, int]:
    """Why sites were kept or missed, where a pattern had to do with them; counted."""
    sites = (s for s in report.sites if s.status != "fused" and s.pattern not in ("norm_linear", "combine"))
    return dict(Counter(f"{site.pattern}: {site.reason}" for site in sites))


def _replays(calls: dict[str, Callable[[], Any]], row: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The calls as CUDA graphs; none when one cannot be captured, and the row says why."""
    try:
        return {side: captured(run) for side, run in calls.items()}
    except RuntimeError as problem:
        row["no_graph"] = str(problem)[:300]
        return {}


def _timed(kind: str, calls: dict[str, Callable[[], Any]], reps: int, rounds: int) -> dict[str, Any]:
    """Medians, Inductor's over fuse's, and the least and largest such ratio of a round."""
    found = interleaved_rounds_ms(calls, reps, warmup=2, rounds=rounds)
    medians = {side: [statistics.median(times) for times in by_round] for side, by_round in found.items()}
    ratios = sorted(a / b for a, b in zip(medians["inductor"], medians["fuse"], strict=True))
    found_ms = {f"{kind}_ms_{side}": round(statistics.median(each), 4) for side, each in medians.items()}
    least, middle, largest = (round(x, 4) for x in (ratios[0], statistics.median(ratios), ratios[-1]))
    return found_ms | {f"{kind}_ratio": middle, f"{kind}_ratio_range": [least, largest]}


def wait_for_turn() -> None:
    """Says that everything is compiled, and waits until the parent says that the device is free."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if not sys.stdin.readline():
        sys.exit("the parent is gone")
