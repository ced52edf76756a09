"""Device time of short calls: CUDA graphs of several calls each, replayed in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

GRAPH_US = 300.0  # of work in one graph: its launch and the events are a few microseconds
MOST_CALLS = 32
ROUNDS, LEAST_ROUNDS, BUDGET_S = 10, 5, 0.2
HOPELESS = 1.5  # times the fastest after two rounds


@dataclass(frozen=True)
class Times:
    """Of one call, in microseconds: on the device (median), and of the processor until the call returns."""

    device_us: float
    host_us: float


def graph_times(calls: dict[str, Callable[[], Any]], device: torch.device) -> tuple[dict[str, Times], dict[str, str]]:
    """Times calls against each other.

    Args:
        calls: what to time, by name; each works on tensors that stay in place, and has run before. The first is the
            baseline, which is always timed to the end.
        device: the CUDA device they run on.

    Returns:
        The times, and for each call that cannot be captured in a CUDA graph, or that is out of the race after two
        rounds, the reason why it has none.
    """
    failed: dict[str, str] = {}
    with torch.cuda.device(device):
        graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
        host: dict[str, float] = {}
        for name, call in calls.items():
            try:
                estimate, host[name] = _rough_us(call)
                inner = max(1, min(MOST_CALLS, math.ceil(GRAPH_US / estimate)))
                graphs[name] = _captured(call, inner), inner
            except Exception as error:
                failed[name] = f"cannot be captured in a CUDA graph: {_first_line(error)}"
        rounds = race({name: partial(_replay_us, *captured) for name, captured in graphs.items()}, failed)
        times = {name: Times(statistics.median(us), host[name]) for name, us in rounds.items()}
        torch.cuda.synchronize()
    return times, failed


def race(replays: dict[str, Callable[[], float]], failed: dict[str, str]) -> dict[str, list[float]]:
    """The microseconds of each round; those out of the race go to `failed`. Every replay returns its own time."""
    names = list(replays)
    us: dict[str, list[float]] = {name: [] for name in names}
    baseline = next(iter(names), "")
    for replay in replays.values():
        replay()
    start = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > BUDGET_S:
            break
        shift = done % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            us[name].append(replays[name]())
        if done == 1:
            best = min(min(us[name]) for name in names) if names else 0.0
            for name in [name for name in names if name != baseline and min(us[name]) > HOPELESS * best]:
                names.remove(name)
                failed[name] = f"about {min(us.pop(name)):.1f} us"
    return us


def _rough_us(call: Callable[[], Any]) -> tuple[float, float]:
    """Device time of a call with its launch, and processor time of it: the least of a few."""
    device, host = [], []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        call()
        host.append(1e6 * (time.perf_counter() - start))
        end.record()
        end.synchronize()
        device.append(1e3 * begin.elapsed_time(end))
    return max(min(device), 1.0), min(host)


def _captured(call: Callable[[], Any], inner: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves the generator's state unusable: it gets a copy.
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(inner):
                call()
    finally:
        generator.graphsafe_set_state(state)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Microseconds of one of the calls."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
