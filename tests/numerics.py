"""The numerics rule: a fused result may be at most twice as far from float64 as the unfused one in the same dtype.

    err(fused) <= 2 * err(unfused) + atol,    atol = |(x + 0.3 - 0.3) - x| of the unfused result x

in the largest and in the root mean square error. Shape, dtype, strides and the places of NaN and infinities are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def disagreement(exact: Any, unfused: Any, fused: Any, *, strides: bool = True) -> str:
    """Why `fused` breaks the rule, or "".

    Args:
        exact: the result in float64.
        unfused: the result of the graph as it was.
        fused: the result of the rewritten graph.
        strides: whether strides have to be equal too.
    """
    return difference_of_kind(unfused, fused, strides=strides) or error_beyond_rule(exact, unfused, fused)


def difference_of_kind(unfused: Any, fused: Any, *, strides: bool = True) -> str:
    """How two results differ in anything but rounding, or ""."""
    if not (isinstance(unfused, Tensor) and isinstance(fused, Tensor)):
        return "" if type(unfused) is type(fused) and unfused == fused else f"{named(fused)}, not {named(unfused)}"
    if (fused.shape, fused.dtype, fused.device) != (unfused.shape, unfused.dtype, unfused.device):
        return f"{named(fused)}, not {named(unfused)}"
    if strides and not same_strides(fused, unfused):
        return f"strides {fused.stride()}, not {unfused.stride()}"
    if not unfused.dtype.is_floating_point:
        return "" if torch.equal(unfused, fused) else f"other values of dtype {unfused.dtype}"
    if not torch.equal(unfused.isnan(), fused.isnan()):
        return f"{int(fused.isnan().sum())} NaN, not {int(unfused.isnan().sum())}, or in other places"
    infinite = unfused.isinf()
    if not torch.equal(infinite, fused.isinf()) or not torch.equal(unfused[infinite], fused[infinite]):
        return "infinities in other places"
    return ""


def error_beyond_rule(exact: Any, unfused: Any, fused: Any) -> str:
    """By how much the error of `fused` is larger than the rule allows, or ""; of finite elements only."""
    if not isinstance(unfused, Tensor) or not unfused.dtype.is_floating_point:
        return ""
    finite = unfused.isfinite() & exact.isfinite()
    if not bool(finite.any()):
        return ""
    x = unfused[finite]
    noise = (((x + 0.3) - 0.3) - x).double()
    unfused_error, fused_error = (t[finite].double() - exact[finite].double() for t in (unfused, fused))
    for name, size in (("largest", largest), ("root mean square", rms)):
        allowed = 2 * size(unfused_error) + size(noise)
        if not size(fused_error) <= allowed:
            return (
                f"{name} error {size(fused_error):.3g} of values up to {largest(exact[finite]):.3g}; "
                f"unfused {size(unfused_error):.3g}, allowed {allowed:.3g}"
            )
    return ""


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; dimensions of size 1 do not count."""
    if a.numel() == 0:
        return True
    return all(n == 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def largest(x: Tensor) -> float:
    """Largest absolute value."""
    return float(x.abs().max())


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


def named(x: Any) -> str:
    """What a result is, for messages."""
    return f"{x.dtype}{list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)
