"""How this package defines an op: Inductor sees through it on a GPU; Triton's interpreter runs it opaque."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows, CPU builds of torch: modules still import, ops run their references

    class _NoTriton:
        """Lets `@triton.jit def kernel(..., BLOCK: tl.constexpr)` be read; nothing calls such a kernel."""

        constexpr = object

        @staticmethod
        def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
            return fn

    triton = tl = _NoTriton()
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON and not INTERPRETED:
    from torch.library import wrap_triton
else:

    def wrap_triton(kernel: Any) -> Any:
        """The kernel itself: there is no compiled kernel for torch to see."""
        return kernel


def define_op(name: str, fn: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Registers `fn`, which writes to the arguments named in `mutates`, as the op `name`.

    Call `register_fake` and `register_autograd` on the result.

    `fn` must pick kernel or reference by the tensors' device *inside its body*: torch decomposes a
    `triton_op` into `fn`'s body wherever it functionalises, also for CPU tensors, so `register_kernel("cpu")`
    alone would not keep a compiled CPU graph away from the launch. Interpreted kernels cannot be traced: they
    are launched from an opaque `custom_op`.

    What is written to is not copied, also when it is an input of the graph. But Inductor may compute what the graph
    makes of the old value after the op, from the new one: let nothing else read the argument before the op does.
    """
    if HAS_TRITON and not INTERPRETED:
        return torch.library.triton_op(name, fn, mutates_args=mutates)
    return torch.library.custom_op(name, fn, mutates_args=mutates)


def define_opaque_op(name: str, fn: Callable[..., Any]) -> Any:
    """Registers `fn` as the functional op `name` that Inductor only calls; it does not see through it."""
    return torch.library.custom_op(name, fn, mutates_args=())


def no_triton(x: Tensor) -> str | None:
    """Why Triton cannot compute on `x`'s device, or None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED or x.device.type == "cuda":
        return None
    return f"Triton has no backend for device {x.device.type!r}"


def on_device_of(x: Tensor) -> Any:
    """Context in which a launch goes to `x`'s GPU: Triton launches on the *current* device."""
    return torch.cuda.device_of(x)
