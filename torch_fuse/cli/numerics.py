"""The rule a fused result has to keep: at most twice the error of the unfused one against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Error:
    """Largest and root-mean-square distance to the float64 result."""

    max: float
    rms: float


@dataclass(frozen=True)
class Check:
    """The error of one result, the most that it may be, and whether it is."""

    error: Error
    allowed: Error

    @property
    def passed(self) -> bool:
        # written so that a NaN fails
        return self.error.max <= self.allowed.max and self.error.rms <= self.allowed.rms


def distance(result: torch.Tensor, reference: torch.Tensor) -> Error:
    """The distance of `result` to the float64 `reference` of the same shape, in pieces to save memory."""
    if result.shape != reference.shape:
        return Error(math.inf, math.inf)
    largest, squares = 0.0, 0.0
    pairs = zip(result.flatten().split(_CHUNK), reference.flatten().split(_CHUNK), strict=True)
    for piece, expected in pairs:
        gap = (piece.double() - expected).abs()
        worst = gap.max().item()
        largest = worst if math.isnan(worst) else max(largest, worst)
        squares += gap.square().sum().item()
        if math.isnan(squares):
            return Error(math.nan, math.nan)
    return Error(largest, math.sqrt(squares / max(reference.numel(), 1)))


def rounding(reference: torch.Tensor, dtype: torch.dtype) -> Error:
    """Twice what adding and subtracting 0.3 in `dtype` costs: the tolerance of FlashAttention's tests."""
    largest, squares = 0.0, 0.0
    for piece in reference.flatten().split(_CHUNK):
        low = piece.to(dtype)
        gap = (low + 0.3 - 0.3 - low).double().abs()
        largest = max(largest, gap.max().item())
        squares += gap.square().sum().item()
    return Error(2 * largest, 2 * math.sqrt(squares / max(reference.numel(), 1)))


def check_all(results: Mapping[str, torch.Tensor], reference: torch.Tensor, dtype: torch.dtype) -> dict[str, Check]:
    """Judges "eager", "inductor" and "fuse": Inductor by eager's error, fuse by the larger of the two.

    An Inductor result that breaks the rule is no yardstick for ours: then eager alone is.
    """
    slack = rounding(reference, dtype)
    errors = {name: distance(result, reference) for name, result in results.items()}

    def allowed(*yardsticks: Error) -> Error:
        return Error(2 * max(e.max for e in yardsticks) + slack.max, 2 * max(e.rms for e in yardsticks) + slack.rms)

    base = Check(errors["eager"], allowed(errors["eager"]))
    plain = Check(errors["inductor"], base.allowed)
    yardsticks = [base.error, plain.error] if plain.passed else [base.error]
    return {"eager": base, "inductor": plain, "fuse": Check(errors["fuse"], allowed(*yardsticks))}


def float64_result(model: torch.nn.Module, run: Callable[[torch.nn.Module], torch.Tensor]) -> torch.Tensor:
    """`run` on a float64 copy of `model`: the same weights, exactly."""
    return run(copy.deepcopy(model).double())
