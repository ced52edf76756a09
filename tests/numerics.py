"""The numerics rule: a fused result may be at most twice as far from float64 as the unfused one in the same dtype.

    err(fused) <= 2 * err(unfused) + atol,    atol = |(x + 0.3 - 0.3) - x| of the unfused result x

in the largest and in the root mean square error. Shape, dtype, strides and the places of NaN and infinities are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def disagreement(
    exact: Tensor | None, unfused: Tensor | None, fused: Tensor | None, *, strides: bool = True
) -> str:
    """Why `fused` breaks the rule, or "".

    Args:
        exact: the result in float64.
        unfused: the result of the graph as it was.
        fused: the result of the rewritten graph.
        strides: whether strides have to be equal too.
    """
    if unfused is None or fused is None:
        return "" if unfused is fused else f"{_named(fused)} instead of {_named(unfused)}"
    if not isinstance(unfused, Tensor):
        return "" if unfused == fused else f"{fused!r} instead of {unfused!r}"
    if (fused.shape, fused.dtype, fused.device) != (unfused.shape, unfused.dtype, unfused.device):
        return f"{_named(fused)} instead of {_named(unfused)}"
    if strides and not same_strides(fused, unfused):
        return f"strides {fused.stride()} instead of {unfused.stride()}"
    if not unfused.dtype.is_floating_point:
        return "" if torch.equal(unfused, fused) else f"values of dtype {unfused.dtype} differ"
    if not torch.equal(unfused.isnan(), fused.isnan()):
        return f"{int(fused.isnan().sum())} NaN instead of {int(unfused.isnan().sum())}, or in other places"
    infinite = unfused.isinf()
    if not torch.equal(infinite, fused.isinf()) or not torch.equal(unfused[infinite], fused[infinite]):
        return "infinities in other places"
    finite = unfused.isfinite()
    if not bool(finite.any()):
        return ""
    assert exact is not None
    x = unfused[finite]
    noise = (((x + 0.3) - 0.3) - x).double()
    unfused_error, fused_error = (t[finite].double() - exact[finite].double() for t in (unfused, fused))
    for name, size in (("largest", _largest), ("root mean square", _rms)):
        allowed = 2 * size(unfused_error) + size(noise)
        if not size(fused_error) <= allowed:
            return (
                f"{name} error {size(fused_error):.3g} of values up to {_largest(exact[finite]):.3g}; "
                f"unfused {size(unfused_error):.3g}, allowed {allowed:.3g}"
            )
    return ""


def disagreements(
    exact: Sequence[Tensor | None],
    unfused: Sequence[Tensor | None],
    fused: Sequence[Tensor | None],
    names: Sequence[str],
    *,
    strides: bool = True,
) -> list[str]:
    """`disagreement` of each of several results, prefixed with its name."""
    problems = []
    for name, *values in zip(names, exact, unfused, fused, strict=True):
        problem = disagreement(*values, strides=strides)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; dimensions of size 1 do not count."""
    if a.numel() == 0:
        return True
    return all(n == 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _named(x: Tensor | None) -> str:
    return "nothing" if x is None else f"{x.dtype}{list(x.shape)} on {x.device}"
