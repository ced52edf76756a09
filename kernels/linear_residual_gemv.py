"""Linear layers added to a residual stream, for a few rows: both weights of a parallel block in one launch.

    out = residual + x1 @ W1^T + b1 [+ x2 @ W2^T + b2]

Each program streams whole rows of both weights, so nothing is added up across programs. One row (or fp32) is multiplied
with fused multiply-adds, of a weight's row that is asked for at once; more rows of a half type on tensor cores.

- residual [..., N]; x1 [..., K1], x2 [..., K2] or None: 1 to 8 rows; bf16, fp16, fp32.
- w1 [N, K1], w2 [N, K2], contiguous, K a multiple of 16; b1, b2 [N] or None, copied unless contiguous.
- early: the launch may begin before the one before it has ended (programmatic dependent launch). The weights and biases
  must then be written by nothing on the stream since two launches before.
- Returns residual's shape and dtype: fp32 arithmetic, rounded once. No gradient.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> linear_residual_gemv(torch.ones(1, 4), torch.ones(1, 16), torch.ones(4, 16), None, None, None, None)
    tensor([[17., 17., 17., 17.]])
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._calls import Call, Calls
from ._gemv_common import dense, launch_options, no_kernel, read_ahead, span, starts_early, wait_for_inputs
from ._gemv_rows import add_product
from ._ops import INTERPRETED, define_opaque_op, tl, triton
from ._qk_common import acc_dtype, require
from ._qk_tile import pow2
from ._whole_rows import MAX_PIECES, whole_rows_kernel


class Config(NamedTuple):
    """Rows of a program, columns that it takes at once, its warps, tiles on their way to it (0: it asks for whole rows
    at once), and the bytes of each row of a weight that it asks for before its turn.
    """

    block_n: int
    block_k: int
    num_warps: int
    stages: int = 3
    ahead: int = 4096


def config(rows: int, width: int) -> Config:
    """For a weight of `rows` rows of `width` elements; benchmarks/decode.py --sweep tries others."""
    return Config(1, 0, 8 if width > 4096 else 4, 0)


def in_tiles(rows: int, width: int) -> Config:
    """The same for rows that are too long to be asked for at once."""
    return Config(2, 512, 4, 5) if rows > 1024 else Config(1, 1024, 2, 4)


def rows_config(rows: int, width: int) -> Config:
    """For several rows of x; the columns are those of one warp."""
    return Config(16, 128 if rows > 1024 else 64, 4, 4)


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
              b2: Tensor | None, early: bool = False) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments: fp32 until the sum is complete."""
    dtype = acc_dtype(residual)
    out = residual.to(dtype)
    for x, weight, bias in ((x1, w1, b1), (x2, w2, b2)):
        if x is not None and weight is not None:
            out = out + F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.to(residual.dtype)


@triton.jit
def _columns(weight, n, k, N, K: tl.constexpr, EVEN: tl.constexpr):
    at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, (n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    return tile.to(tl.float32)


@triton.jit
def _product(acc, x, weight, n, N, row, K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             STAGES: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """Adds x times the rows n of a weight; STAGES tiles are on their way. acc: [BLOCK_N, BLOCK_K], several rows: MP."""
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        wide = _columns(weight, n, k, N, K, ALL and K % BLOCK_K == 0)
        if M == 1:  # added up over the columns once, at the end
            acc += wide * tl.load(x + k, k < K, other=0.0).to(tl.float32)[None, :]
        else:
            for m in tl.static_range(M):
                found = tl.sum(wide * tl.load(x + m * K + k, k < K, other=0.0).to(tl.float32)[None, :], 1)
                acc += tl.where(row == m, found[:, None], 0.0)
    return acc


@triton.jit
def _finish(acc, residual, b1, b2, out, n, row, N, M: tl.constexpr, BIASED1: tl.constexpr,
            BIASED2: tl.constexpr):  # fmt: skip
    there = (n < N)[:, None] & (row < M)
    at = row * N + n[:, None]
    acc += tl.load(residual + at, there, other=0.0).to(tl.float32)
    if BIASED1:
        acc += tl.load(b1 + n, n < N, other=0.0).to(tl.float32)[:, None]
    if BIASED2:
        acc += tl.load(b2 + n, n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), there)


@triton.jit
def _row_kernel(residual, x1, w1, b1, x2, w2, b2, out, N, M: tl.constexpr, MP: tl.constexpr, K1: tl.constexpr,
                K2: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALL: tl.constexpr, AHEAD1: tl.constexpr,
                LINES1: tl.constexpr, AHEAD2: tl.constexpr, LINES2: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """BLOCK_N columns of the result; acc is [BLOCK_N, BLOCK_K] for one row of x, [BLOCK_N, MP] for more."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, MP)[None, :]
    if EARLY:
        last = N.to(tl.int64)
        if K2 > 0:
            read_ahead(w2 + n.to(tl.int64) * K2, w2 + last * K2, AHEAD2, LINES2)
        read_ahead(w1 + n.to(tl.int64) * K1, w1 + last * K1, AHEAD1, LINES1)
    wait_for_inputs(EARLY)
    if M == 1:  # noqa: SIM108
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, MP], tl.float32)
    if K2 > 0:
        acc = _product(acc, x2, w2, n, N, row, K2, M, BLOCK_N, BLOCK_K, STAGES, ALL)
    acc = _product(acc, x1, w1, n, N, row, K1, M, BLOCK_N, BLOCK_K, STAGES, ALL)
    if M == 1:
        acc = tl.sum(acc, 1)[:, None]
    _finish(acc, residual, b1, b2, out, n, row, N, M, BIASED1, BIASED2)


@triton.jit
def _rows_kernel(residual, x1, w1, b1, x2, w2, b2, out, N, M: tl.constexpr, MP: tl.constexpr, K1: tl.constexpr,
                 K2: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, SPAN1: tl.constexpr,
                 SPAN2: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    n, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, MP)[None, :]
    acc = tl.zeros([PARTS, BLOCK_N, MP], tl.float32)
    if K2 > 0:
        acc = add_product(acc, x2, w2, n, N, K2, M, MP, BLOCK_K, PARTS, SPAN2, STAGES, WIDE)
    acc = add_product(acc, x1, w1, n, N, K1, M, MP, BLOCK_K, PARTS, SPAN1, STAGES, WIDE)
    _finish(tl.sum(acc, 0), residual, b1, b2, out, n, row, N, M, BIASED1, BIASED2)


_calls = Calls()


def _forward(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
             b2: Tensor | None, early: bool = False) -> Tensor:  # fmt: skip
    given = (residual, x1, w1, b1, x2, w2, b2)
    return _calls.make(given, (early, config, rows_config, in_tiles), _first, *given, early)


def _first(call: Call, residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None,
           w2: Tensor | None, b2: Tensor | None, early: bool) -> Tensor:  # fmt: skip
    """The first call of its kind."""
    _check(residual, x1, w1, b1, x2, w2, b2)
    if supports(residual, x1, w1, x2, w2) is not None:
        return reference(residual, x1, w1, b1, x2, w2, b2)
    base, first = residual.contiguous(), x1.contiguous()
    b1, b2 = dense((b1, b2))
    second = first if x2 is None else x2.contiguous()
    width = int(residual.shape[-1])
    count = residual.numel() // width
    k1, k2 = int(w1.shape[1]), 0 if w2 is None else int(w2.shape[1])
    out = call.empty(residual.shape, residual.dtype)
    arguments = [
        base, first, w1, w1 if b1 is None else b1, second, w1 if w2 is None else w2, w1 if b2 is None else b2, out,
        width,
    ]  # fmt: skip
    common: dict[str, Any] = {"K1": k1, "K2": k2, "BIASED1": b1 is not None, "BIASED2": b2 is not None}
    if count == 1 or residual.dtype == torch.float32:
        chosen = config(width, k1 + k2)
        early = starts_early(residual, early)
        columns = chosen.num_warps * 32 * 16 // w1.element_size()  # 16 bytes for each thread
        if chosen.stages == 0 and (count > 1 or max(k1, k2) >= MAX_PIECES * columns):
            chosen = in_tiles(width, k1 + k2)
        programs = triton.cdiv(width, chosen.block_n)
        common |= {"EARLY": early, "num_warps": chosen.num_warps, **launch_options(early)}
        if chosen.stages == 0:
            call.launch(whole_rows_kernel, programs, arguments, {**common, "BLOCK_N": chosen.block_n, "C": columns})
            return out
        ahead = {f"AHEAD{i}": min(chosen.ahead, max(k, 16) * w1.element_size()) for i, k in ((1, k1), (2, k2))}
        call.launch(_row_kernel, programs, arguments, {
            **common, "M": count, "MP": pow2(count), "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k,
            "STAGES": chosen.stages, "ALL": width % chosen.block_n == 0, **ahead,
            **{f"LINES{i}": pow2(-(-ahead[f"AHEAD{i}"] // 128)) for i in (1, 2)},
        })  # fmt: skip
    else:
        chosen = rows_config(width, k1 + k2)
        call.launch(_rows_kernel, triton.cdiv(width, chosen.block_n), arguments, {
            **common, "M": count, "MP": max(pow2(count), 8), "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k,
            "STAGES": chosen.stages, "PARTS": chosen.num_warps, "SPAN1": span(k1, chosen.num_warps),
            "SPAN2": span(k2, chosen.num_warps), "WIDE": INTERPRETED, "num_warps": chosen.num_warps,
        })  # fmt: skip
    return out


def _fake(residual: Tensor, x1: Tensor, w1: Tensor, b1: Tensor | None, x2: Tensor | None, w2: Tensor | None,
          b2: Tensor | None, early: bool = False) -> Tensor:  # fmt: skip
    _check(residual, x1, w1, b1, x2, w2, b2)
    return residual.new_empty(residual.shape)


linear_residual_gemv = define_opaque_op("torch_fuse::linear_residual_gemv", _forward, _fake)
