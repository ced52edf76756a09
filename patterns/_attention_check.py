"""Whether a backend's attention is right: near PyTorch's everywhere, and as near to float64 where that is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._attention_site import Site

ROWS, HEADS = 64, 8  # that are compared with float64
# Norm of a difference relative to PyTorch's: a few roundings of the type. Rows of a result; whole heads of gradients.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}

Index = tuple[int, int]


class Sample:
    """Attention in float64 of some rows of some heads, the first and the last among them.

    Args:
        tensors: query [B, H, S_q, D], key and value [B, H_kv, S_k, D].
        site: what they are of.
    """

    def __init__(self, tensors: Sequence[Tensor], site: Site) -> None:
        q, k, v = (x.detach() for x in tensors)
        batch, heads, queries, _ = q.shape
        self.rows = torch.linspace(0, queries - 1, min(ROWS, queries), device=q.device).round().long()
        self.heads = [divmod(i * (batch * heads - 1) // max(1, HEADS - 1), heads) for i in range(HEADS)]
        self.heads = list(dict.fromkeys(self.heads))
        group = heads // k.shape[1]
        exact = []
        for b, h in self.heads:
            scores = q[b, h, self.rows].double() @ k[b, h // group].double().T * site.scale
            if site.is_causal:
                later = torch.arange(k.shape[2], device=q.device) > self.rows[:, None]
                scores = scores.masked_fill(later, -math.inf)
            exact.append(scores.softmax(-1) @ v[b, h // group].double())
        self.exact = torch.stack(exact)

    def of(self, out: Tensor) -> Tensor:
        """The same rows of a result."""
        return torch.stack([out[b, h, self.rows] for b, h in self.heads])

    def error_beyond_rule(self, baseline: Tensor, found: Tensor) -> str:
        """By how much an error is larger than twice the baseline's and its rounding, or ""."""
        x, y = self.of(baseline), self.of(found)
        noise = (((x + 0.3) - 0.3) - x).double()
        for name, size in (("largest", _largest), ("root mean square", _rms)):
            allowed = 2 * size(x.double() - self.exact) + size(noise)
            error = size(y.double() - self.exact)
            if not error <= allowed:
                return f"wrong: {name} error {error:.3g} against float64, allowed {allowed:.3g}"
        return ""


def difference(baseline: Tensor, found: Tensor) -> str:
    """How a result differs from PyTorch's in more than rounding, in any row, or ""."""
    if (found.shape, found.dtype, found.device) != (baseline.shape, baseline.dtype, baseline.device):
        return f"wrong: {found.dtype}{list(found.shape)}, not {baseline.dtype}{list(baseline.shape)}"
    return _too_far(baseline, found, (-1,), "rows")


def difference_of_gradients(baseline: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """How gradients of query, key and value differ from PyTorch's in more than rounding, in any head, or ""."""
    for name, x, y in zip(("query", "key", "value"), baseline, found, strict=True):
        reason = _too_far(x, y, (-2, -1), f"heads of the gradient of {name}")
        if reason:
            return reason
    return ""


def _too_far(baseline: Tensor, found: Tensor, dims: tuple[int, ...], of: str) -> str:
    distance = torch.linalg.vector_norm(found.float() - baseline.float(), dim=dims)
    allowed = TOLERANCE[baseline.dtype] * torch.linalg.vector_norm(baseline.float(), dim=dims)
    bad = ~(distance <= allowed)  # NaN is bad
    count = int(bad.sum())
    return f"wrong: {count} of {bad.numel()} {of} differ from PyTorch's" if count else ""


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
