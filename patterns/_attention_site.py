"""What decides how fast an attention is: sizes, strides, dtype, device, whether gradients are needed."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_fuse._compat import sdpa_settings
from torch_fuse.graph.values import static_int
from torch_fuse.kernels import _ops, fa4_attention

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Sizes and strides of a tensor, and whether it starts at a multiple of 16 bytes."""

    shape: Ints
    strides: Ints
    aligned: bool

    @classmethod
    def of(cls, x: Tensor) -> Layout | None:
        """The layout of a tensor, or None when a size is not known yet."""
        sizes = [static_int(n) for n in (*x.shape, *x.stride(), x.storage_offset())]
        if any(n is None for n in sizes):
            return None
        known: Ints = tuple(n for n in sizes if n is not None)
        dims = x.dim()
        return cls(known[:dims], known[dims : 2 * dims], known[-1] * x.element_size() % 16 == 0)

    def random(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A tensor laid out like this, of normal random numbers."""
        first = 0 if self.aligned else 1
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        memory = torch.empty(first + last + 1, dtype=dtype, device=generator.device).normal_(generator=generator)
        return memory.as_strided(self.shape, self.strides, first)


@dataclass(frozen=True)
class Site:
    """An attention over all keys or causal.

    Attributes:
        device, dtype: of query, key and value.
        query: [B, H, S_q, D].
        key, value: [B, H_kv, S_k, D], before a repetition of heads.
        repetition: how often the graph repeats key and value heads before its attention; 1 if it does not.
        is_causal, scale: of the attention.
        gradients: whether query, key or value needs a gradient.
    """

    device: torch.device
    dtype: torch.dtype
    query: Layout
    key: Layout
    value: Layout
    repetition: int
    is_causal: bool
    scale: float
    gradients: bool

    @property
    def gqa(self) -> bool:
        """Whether the graph's attention itself takes several query heads for a key head."""
        return self.query.shape[1] != self.key.shape[1] * self.repetition

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value; the device's own generator stays as it is."""
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (x.random(self.dtype, generator) for x in (self.query, self.key, self.value))
        return tuple(x.detach().requires_grad_(self.gradients) for x in (q, k, v))  # type: ignore[return-value]

    def identity(self) -> dict[str, Any]:
        """All that a measurement depends on, as plain data."""
        layouts = {name: getattr(self, name) for name in ("query", "key", "value")}
        return {
            **platform_of(self.device),
            "sdpa": sdpa_settings(),
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: [list(x.shape), list(x.strides), x.aligned] for name, x in layouts.items()},
            "repetition": self.repetition,
            "causal": self.is_causal,
            "scale": self.scale,
            "gradients": self.gradients,
        }


def platform_of(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a measurement holds for."""
    gpu, capability = str(device), ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {
        "gpu": gpu,
        "capability": capability,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": getattr(_ops.triton, "__version__", None),
        "flash-attn-4": fa4_attention.installed(),
        "kernels": kernels_hash(),
    }


@functools.cache
def kernels_hash() -> str:
    """A hash of the sources of this package's ops."""
    digest = hashlib.sha256()
    for file in sorted(Path(_ops.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
