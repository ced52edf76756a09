"""Shared by the benchmarks: interleaved timing with device events, kernel lists, JSON lines."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton


class Log:
    """Writes one JSON line a result, each with the GPU and the versions."""

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path else None
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self._context = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}

    def write(self, **fields: Any) -> None:
        """Prints a result and appends it to the file."""
        line = json.dumps({**fields, **self._context}, default=str)
        sys.stdout.write(line[:1500] + "\n")
        sys.stdout.flush()
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


def interleaved_ms(
    calls: dict[str, Callable[[], Any]], reps: int = 8, warmup: int = 3, rounds: int = 3, rest_s: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of each call, by device events (the clock, without a GPU).

    The calls take turns, `rounds` times: the device rests for `rest_s`, then a call is warmed up and timed `reps`
    times in a row. Without a rest, a GPU at its power limit runs at lower clocks.
    """
    found = interleaved_rounds_ms(calls, reps, warmup, rounds, rest_s)
    return {name: statistics.median(itertools.chain(*times)) for name, times in found.items()}


def interleaved_rounds_ms(
    calls: dict[str, Callable[[], Any]], reps: int = 8, warmup: int = 3, rounds: int = 3, rest_s: float = 0.0
) -> dict[str, list[list[float]]]:
    """The milliseconds that `interleaved_ms` has the median of: of each call, a list for each round."""
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(rest_s)
            for _ in range(warmup):
                call()
            times[name].append([_once_ms(call) for _ in range(reps)])
    return times


def _once_ms(call: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = torch.cuda.Event(True), torch.cuda.Event(True)
    torch.cuda.synchronize()
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event)


def captured(call: Callable[[], Any], inner: int = 1) -> Callable[[], Any]:
    """Replays a CUDA graph of `inner` calls: launch overhead is out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return graph.replay


def kernels(call: Callable[[], Any], top: int = 16) -> dict[str, Any]:
    """Device kernels of one call: how many, microseconds in total, and the longest."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.device_time_total > 0]
    events.sort(key=lambda event: -event.device_time_total)
    return {
        "count": sum(event.count for event in events),
        "us": round(sum(event.device_time_total for event in events), 1),
        "top": [[event.key[:70], event.count, round(event.device_time_total, 1)] for event in events[:top]],
    }


def error(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Largest and root mean square error against an exact result."""
    difference = (found.double() - exact.double()).abs()
    return {"max": float(difference.max()), "rms": float(difference.square().mean().sqrt())}
