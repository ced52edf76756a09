"""What the two products of a few rows with a streamed weight share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import HAS_TRITON, INTERPRETED, no_triton, tl, triton
from ._qk_common import DTYPES

if HAS_TRITON:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_ROWS = 8


def no_kernel(x: Tensor, weights: list[Tensor]) -> str | None:
    """Why the kernels cannot multiply the rows of x with weights [N, K] as they lie in memory, or None."""
    if reason := no_triton(x):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype is {x.dtype}; allowed: fp32, bf16, fp16"
    rows = x.numel() // max(x.shape[-1], 1)
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    for weight in weights:
        if weight.dtype != x.dtype:
            return f"the weight is {weight.dtype} and the input {x.dtype}"
        if not weight.is_contiguous() or weight.shape[1] % 16:
            return f"the weight's strides are {weight.stride()}; allowed: rows side by side, of a multiple of 16"
    return None


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as contiguous rows [M, K]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def dense(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Vectors as the kernels read them: a bias may be a column of a table, or one number for all."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def span(width: int, parts: int) -> int:
    """The columns of each part of a row: a multiple of 16."""
    return -(-width // (16 * parts)) * 16


def activated(x: Tensor, activation: str) -> Tensor:
    """x through one of ACTIVATIONS, in plain torch."""
    if activation == "gelu":
        return torch.nn.functional.gelu(x)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return torch.nn.functional.silu(x) if activation == "silu" else x


ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """fp32 x through an activation: these are a few values a program, so no instruction is spared."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505  # a jit function's other branch must not be compiled
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-z))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        return x


def starts_early(x: Tensor, asked: bool) -> bool:
    """Whether a launch may begin before the one before it has ended: where asked, from sm_90 on."""
    return asked and not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch_options(early: bool) -> dict[str, bool]:
    """The compiler's option for such a launch: none otherwise, as not every backend knows it."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """What other launches wrote is there; the next launch may begin, and read what none of these writes.

    Every program has to come here: the next launch takes the end of this one for the end of all before it.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def read_ahead(rows, end, BYTES: tl.constexpr, LINES: tl.constexpr):
    """Asks for the first BYTES bytes at each of the pointers `rows` [R] to be brought to L2, up to `end`.

    LINES is the power of two at or above BYTES / 128: the lines of a row.
    """
    line = tl.arange(0, LINES) * 128
    address = rows.to(tl.int64)[:, None] + line[None, :]
    address = tl.minimum(address, end.to(tl.int64) - 16)
    address = tl.where(line[None, :] < BYTES, address, rows.to(tl.int64)[:, None])
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, False, 1)
