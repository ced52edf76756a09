"""Linear layers added to a residual stream, for a few rows: both weights of a parallel block in one launch.

    out = residual + x1 @ W1^T + b1 [+ x2 @ W2^T + b2]

Each program streams whole rows of both weights, so nothing is added up across programs.

- residual [..., N]; x1 [..., K1], x2 [..., K2] or None: 1 to 8 rows; bf16, fp16, fp32.
- w1 [N, K1], w2 [N, K2], contiguous, K a multiple of 16; b1, b2 [N] or None.
- Returns residual's shape and dtype: fp32 arithmetic, rounded once. No gradient.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> linear_residual_gemv(torch.ones(1, 4), torch.ones(1, 16), torch.ones(4, 16), None, None, None, None)
    tensor([[17., 17., 17., 17.]])
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ._gemv_common import no_kernel, rows_of
from ._ops import define_op, on_device_of, tl, triton, wrap_triton
from ._qk_common import acc_dtype, require
from ._qk_tile import pow2


class Config(NamedTuple):
    """Rows of a program, columns that it takes at once, its warps."""

    block_n: int
    block_k: int
    num_warps: int


def config(rows: int, width: int) -> Config:
    """For a weight of `rows` rows of `width` elements; benchmarks/decode.py --sweep tries others."""
    return Config(2, 1024, 4) if rows > 1024 else Config(1, 1024, 2)


def supports(residual: Tensor, x1: Tensor, w1: Tensor, x2: Tensor | None, w2: Tensor | None) -> str | None:
    """Why the Triton kernel cannot take the inputs (the op then runs its reference), or None."""
    if residual.dtype != x1.dtype or (x2 is not None and x2.dtype != x1.dtype):
        return f"the residual is {residual.dtype} and the input {x1.dtype}"
    return no_kernel(x1, [w1] if w2 is None else [w1, w2])


def _check(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
           b2: Tensor | None) -> None:  # fmt: skip
    def need(ok: bool, argument: str, value: object, allowed: str) -> None:
        require("linear_residual_gemv", ok, argument, value, allowed)

    width = residual.shape[-1]
    need((x2 is None) == (w2 is None) and (x2 is not None or b2 is None), "x2", "given" if x2 is not None else None,
         "given together with w2")  # fmt: skip
    for name, x, weight, bias in (("1", x1, w1, b1), ("2", x2, w2, b2)):
        if x is None or weight is None:
            continue
        need(x.shape[:-1] == residual.shape[:-1], f"x{name}.shape", tuple(x.shape), f"{tuple(residual.shape[:-1])} + K")
        need(weight.dim() == 2 and weight.shape == (width, x.shape[-1]), f"w{name}.shape", tuple(weight.shape),
             f"[{width}, {x.shape[-1]}]")  # fmt: skip
        need(bias is None or bias.shape == (width,), f"b{name}", "another shape", f"[{width}]")


def reference(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
              b2: Tensor | None) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments: fp32 until the sum is complete."""
    dtype = acc_dtype(residual)
    out = residual.to(dtype)
    for x, weight, bias in ((x1, w1, b1), (x2, w2, b2)):
        if x is not None and weight is not None:
            out = out + F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(residual.dtype)


@triton.jit
def _tile(weight, n, start, N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], other=0.0,
                   eviction_policy="evict_first")  # fmt: skip


@triton.jit
def _product(acc, tile, x, weight, n, N, row, K: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Adds x times the rows n of a weight, whose first tile is given; the next one is read ahead."""
    for start in range(0, K, BLOCK_K):
        following = _tile(weight, n, start + BLOCK_K, N, K, BLOCK_K)
        k, wide = start + tl.arange(0, BLOCK_K), tile.to(tl.float32)
        if M == 1:  # added up over the columns once, at the end
            acc += wide * tl.load(x + k, k < K, other=0.0).to(tl.float32)[None, :]
        else:
            for m in tl.static_range(M):
                found = tl.sum(wide * tl.load(x + m * K + k, k < K, other=0.0).to(tl.float32)[None, :], 1)
                acc += tl.where(row == m, found[:, None], 0.0)
        tile = following
    return acc


@triton.jit
def _kernel(residual, x1, w1, b1, x2, w2, b2, out, N, M: tl.constexpr, MP: tl.constexpr, K1: tl.constexpr,
            K2: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    """BLOCK_N columns of the result; acc is [BLOCK_N, BLOCK_K] for one row of x, [BLOCK_N, MP] for more."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, MP)[None, :]
    tile1 = _tile(w1, n, 0, N, K1, BLOCK_K)
    if M == 1:  # noqa: SIM108
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, MP], tl.float32)
    if K2 > 0:
        acc = _product(acc, _tile(w2, n, 0, N, K2, BLOCK_K), x2, w2, n, N, row, K2, M, BLOCK_K)
    acc = _product(acc, tile1, x1, w1, n, N, row, K1, M, BLOCK_K)
    if M == 1:
        acc = tl.sum(acc, 1)[:, None]
    there = (n < N)[:, None] & (row < M)
    at = row * N + n[:, None]
    acc += tl.load(residual + at, there, other=0.0).to(tl.float32)
    if BIASED1:
        acc += tl.load(b1 + n, n < N, other=0.0).to(tl.float32)[:, None]
    if BIASED2:
        acc += tl.load(b2 + n, n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), there)


def _forward(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
             b2: Tensor | None) -> Tensor:  # fmt: skip
    _check(residual, x1, w1, b1, x2, w2, b2)
    if supports(residual, x1, w1, x2, w2) is not None:
        return reference(residual, x1, w1, b1, x2, w2, b2)
    base, first = rows_of(residual), rows_of(x1)
    second = first if x2 is None else rows_of(x2)
    count, width = int(base.shape[0]), base.shape[1]
    inner = 0 if w2 is None else int(w2.shape[1])
    chosen = config(int(width), int(w1.shape[1]) + inner)
    out = residual.new_empty(residual.shape)
    with on_device_of(residual):
        wrap_triton(_kernel)[(triton.cdiv(width, chosen.block_n),)](
            base, first, w1, w1 if b1 is None else b1, second, w1 if w2 is None else w2, w1 if b2 is None else b2, out,
            width, M=count, MP=pow2(count), K1=int(w1.shape[1]), K2=inner, BIASED1=b1 is not None,
            BIASED2=b2 is not None, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, num_warps=chosen.num_warps,
        )  # fmt: skip
    return out


linear_residual_gemv = define_op("torch_fuse::linear_residual_gemv", _forward)


@linear_residual_gemv.register_fake
def _fake(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
          b2: Tensor | None) -> Tensor:  # fmt: skip
    _check(residual, x1, w1, b1, x2, w2, b2)
    return residual.new_empty(residual.shape)


def _no_gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError("linear_residual_gemv has no gradient; use torch.nn.functional.linear for training")


linear_residual_gemv.register_autograd(_no_gradient)
