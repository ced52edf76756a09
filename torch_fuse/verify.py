"""`options={"verify": "first_call"}`: runs the fused and the unfused graph once on the real inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

_log = logging.getLogger(__name__)

# Largest root mean square of a difference, relative to that of the unfused result: a few roundings of the type.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-9}


def verified(
    fused: GraphModule,
    unfused: GraphModule,
    compiled_fused: Callable[..., Any],
    compiled_unfused: Callable[..., Any],
) -> Callable[..., Any]:
    """A compiled function that checks itself on its first call.

    The check runs both graphs on copies of the inputs, without gradients and with the same random numbers. When
    an output or a mutated input differs, the unfused graph is used from then on.

    Args:
        fused: the rewritten graph.
        unfused: the graph as it was.
        compiled_fused, compiled_unfused: what the two were compiled to.
    """
    chosen: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:
        if not chosen:
            difference = _difference(fused, unfused, inputs)
            if difference:
                _log.warning("the fused graph disagrees with the unfused one and is not used: %s", difference)
            else:
                _log.info("the fused graph agrees with the unfused one on its first inputs")
            chosen.append(compiled_unfused if difference else compiled_fused)
        return chosen[0](*inputs)

    return run


def _difference(fused: GraphModule, unfused: GraphModule, inputs: tuple[Any, ...]) -> str:
    results = []
    devices = sorted({x.device.index for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda})
    for graph in (unfused, fused):
        copies = tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, inputs)
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(0)
            outputs = graph(*copies)
        results.append((tree_leaves(outputs), list(copies)))
    for name, expected, found in (
        ("output", results[0][0], results[1][0]),
        ("input", results[0][1], results[1][1]),
    ):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            problem = compare(a, b)
            if problem:
                return f"{name} {i}: {problem}"
    return ""


def compare(expected: Any, found: Any) -> str:
    """Why two results are not the same up to rounding, or ""."""
    if not isinstance(expected, torch.Tensor):
        return "" if expected is found or expected == found else f"{found!r} instead of {expected!r}"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if expected.stride() != found.stride():
        return f"strides {found.stride()} instead of {expected.stride()}"
    if not expected.dtype.is_floating_point:
        return "" if torch.equal(expected, found) else "integers differ"
    a, b = expected.double(), found.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return "NaN or infinity in other places"
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return ""
    error, size = float((a - b).square().mean().sqrt()), float(a.square().mean().sqrt())
    allowed = _TOLERANCE.get(expected.dtype, 1e-1) * max(size, 1e-6)
    return "" if error <= allowed else f"root mean square difference {error:.3g} of {size:.3g}"
