"""Interleaved timing: each round runs every candidate once, in rotated order: drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each round of one candidate."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile; the extremes below four rounds."""
        if len(self.rounds) < 4:
            return min(self.rounds), max(self.rounds)
        first, _, third = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return first, third

    def differs_from(self, other: Timing) -> bool:
        """Whether the two interquartile ranges are apart: a difference that one run can show."""
        low, high = self.quartiles
        other_low, other_high = other.quartiles
        return high < other_low or other_high < low


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    budget_seconds: float,
    least: int = 5,
) -> dict[str, Timing]:
    """Times every candidate by device events on a GPU, by the clock on a CPU.

    Args:
        calls: the candidates by name.
        device: where they run.
        rounds: the most rounds that are measured.
        warmup: rounds before, not counted.
        budget_seconds: no new round starts after this long, once `least` rounds are done.
        least: the fewest rounds that are measured.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            _once(calls[name], device)
    start = time.perf_counter()
    for done in range(max(rounds, least)):
        if done >= least and time.perf_counter() - start > budget_seconds:
            break
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_once(calls[name], device))
    return {name: Timing(tuple(values)) for name, values in times.items()}
