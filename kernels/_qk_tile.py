"""What qk_norm_rope's two kernels share: how heads are cut into tiles, read, normalised and stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import no_triton, tl, triton
from ._qk_common import DTYPES, Spec

MAX_TILE = 1 << 14  # elements of one program's tile: 64 fp32 registers a thread at 8 warps


def pow2(n: int) -> int:
    """The smallest power of two that is at least `n`, which is at least 1."""
    return 1 << (int(n) - 1).bit_length()


def no_kernel(x: Tensor, dtype: torch.dtype, heads: int, norm: str, rotary_dim: int) -> str | None:
    """Why the kernels cannot take inputs of `dtype` on `x`'s device, with up to `heads` heads, or None."""
    if reason := no_triton(x):
        return reason
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of fp32, bf16, fp16"
    dim = int(x.shape[3])
    if heads == 0 or dim == 0:
        return "there are no heads or no lanes"
    # rotating and other lanes are padded to powers of two apart from each other
    lanes = 2 * pow2(rotary_dim // 2) if rotary_dim else 0
    lanes += pow2(dim - rotary_dim) if rotary_dim < dim else 0
    held = lanes * (pow2(heads) if norm == "rms_full" else 1)
    if held > MAX_TILE:
        return f"norm {norm!r} over {heads} heads of {dim} lanes needs {held} > {MAX_TILE} elements a program"
    return None


class Plan(NamedTuple):
    """How the heads of q (or k) are cut into tiles of BLOCK_H heads by BLOCK_T tokens."""

    block_h: int
    block_t: int
    head_tiles: int

    def tiles(self, tokens: int) -> int:
        """The number of tiles in `tokens` tokens (a SymInt stays one)."""
        return self.head_tiles * ((tokens + self.block_t - 1) // self.block_t)


def plan(heads: int, dim: int, norm: str, tile: int) -> Plan:
    """Tiles of about `tile` elements: whole tokens where the norm spans them, else heads to fill a block."""
    rows = max(tile // pow2(dim), 1)
    block_h = pow2(heads)
    if norm != "rms_full":
        block_h = min(block_h, rows)
        while block_h > 4 and -(-heads // block_h) * block_h > 1.2 * heads:  # 12 heads: 3 tiles of 4, not 16
            block_h //= 2
    return Plan(block_h, max(rows // block_h, 1), -(-heads // block_h))


def table_strides(table: Tensor | None) -> tuple[int, int, int]:
    """Element strides over (batch, position, lane); one table for all batches has batch stride 0."""
    if table is None:
        return 0, 0, 0
    return (0 if table.shape[0] == 1 else table.stride(0)), table.stride(1), table.stride(2)


def tile_arguments(cos: Tensor | None, sin: Tensor | None, dim: int, spec: Spec) -> dict[str, Any]:
    """The kernels' arguments for the tables, the options and the padded lanes."""
    rotary, rest = spec.rotary_dim, dim - spec.rotary_dim
    cos_b, cos_s, cos_d = table_strides(cos)
    sin_b, sin_s, sin_d = table_strides(sin)
    c0, c1, c2 = (int(lane) for lane in spec.cos_lanes) if rotary else (0, 0, 0)
    s0, s1, s2 = (int(lane) for lane in spec.sin_lanes) if rotary else (0, 0, 0)
    return {
        "cos": cos, "cos_b": cos_b, "cos_s": cos_s, "cos_d": cos_d,
        "sin": sin, "sin_b": sin_b, "sin_s": sin_s, "sin_d": sin_d,
        "D": dim, "R": rotary, "P": pow2(rotary // 2) if rotary else 1, "T": pow2(rest) if rest else 1,
        "NORM": spec.norm, "EPS": spec.eps, "OFFSET": spec.weight_offset, "INTERLEAVED": spec.interleaved,
        "C0": c0, "C1": c1, "C2": c2, "S0": s0, "S1": s1, "S2": s2,
    }  # fmt: skip


def weight_kind(weight: Tensor | None, dim: int) -> str:
    """How the heads use the weight: "none", "shared" or "per_head"."""
    if weight is None:
        return "none"
    return "shared" if weight.numel() == dim else "per_head"


# Tiles are [heads, tokens, lanes]: Triton lays threads over the last axes first, so a thread holds one
# token's lanes for several heads and keeps its cos and sin in registers.


@triton.jit
def tile_rows(tile, n_tokens, length, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr):
    """Heads [BLOCK_H, 1, 1], batches and positions [1, BLOCK_T, 1] of a tile (int64: a row's offset may pass
    2^31 elements), which of its tokens exist [1, BLOCK_T, 1] and which of its rows [BLOCK_H, BLOCK_T, 1]."""
    HEAD_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    h = (tile % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
    t = (tile // HEAD_TILES).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :, None]
    token_exists = t < n_tokens
    row_exists = token_exists & (h < H)
    return h.to(tl.int64), t // length, t % length, token_exists, row_exists


@triton.jit
def load_pairs(ptr, stride, keep, R: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """fp32 values of the rotary pairs' first and second lanes, [.., P] each, of the rows at `ptr`."""
    if INTERLEAVED:  # one wide load, then a split in registers: strided loads would be scalar
        lane = tl.arange(0, 2 * P)[None, None, :]
        x = tl.load(ptr + lane.to(tl.int64) * stride, mask=keep & (lane < R), other=0.0)
        x1, x2 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], P, 2)))
    else:
        pair = tl.arange(0, P)[None, None, :]
        mask = keep & (pair < R // 2)
        x1 = tl.load(ptr + pair.to(tl.int64) * stride, mask=mask, other=0.0)
        x2 = tl.load(ptr + (pair + R // 2).to(tl.int64) * stride, mask=mask, other=0.0)
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def store_pairs(ptr, y1, y2, keep, R: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The reverse of load_pairs, for rows whose lanes are contiguous; rounds once."""
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        lane = tl.arange(0, 2 * P)[None, None, :]
        y = tl.reshape(tl.join(y1.to(dtype), y2.to(dtype)), (y1.shape[0], y1.shape[1], 2 * P))
        tl.store(ptr + lane, y, mask=keep & (lane < R))
    else:
        pair = tl.arange(0, P)[None, None, :]
        mask = keep & (pair < R // 2)
        tl.store(ptr + pair, y1.to(dtype), mask=mask)
        tl.store(ptr + pair + R // 2, y2.to(dtype), mask=mask)


@triton.jit
def load_rest(ptr, stride, keep, R: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """fp32 values of the lanes that do not rotate, [.., T]."""
    lane = R + tl.arange(0, T)[None, None, :]
    return tl.load(ptr + lane.to(tl.int64) * stride, mask=keep & (lane < D), other=0.0).to(tl.float32)


@triton.jit
def store_rest(ptr, y, keep, R: tl.constexpr, D: tl.constexpr, T: tl.constexpr):
    """The reverse of load_rest, for rows whose lanes are contiguous."""
    lane = R + tl.arange(0, T)[None, None, :]
    tl.store(ptr + lane, y.to(ptr.dtype.element_ty), mask=keep & (lane < D))


@triton.jit
def load_table(ptr, stride, keep, R: tl.constexpr, P: tl.constexpr, MULT: tl.constexpr, FIRST: tl.constexpr,
               SECOND: tl.constexpr):  # fmt: skip
    """cos (or sin) of the first and of the second lanes of the rotary pairs, fp32 [1, BLOCK_T, P] each."""
    if MULT == 2 and FIRST < 2 and SECOND < 2:  # one wide load and a split; no lane past the last one in use
        lane = tl.arange(0, 2 * P)[None, None, :]
        last: tl.constexpr = R - 2 + (FIRST if FIRST > SECOND else SECOND)
        both = tl.load(ptr + lane.to(tl.int64) * stride, mask=keep & (lane <= last), other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(both, (1, both.shape[1], P, 2)))
        first = odd if FIRST else even
        second = odd if SECOND else even
    else:
        pair = tl.arange(0, P)[None, None, :]
        mask = keep & (pair < R // 2)
        lane = pair.to(tl.int64) * MULT
        first = tl.load(ptr + (lane + FIRST) * stride, mask=mask, other=0.0).to(tl.float32)
        if FIRST == SECOND:
            second = first
        else:
            second = tl.load(ptr + (lane + SECOND) * stride, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def row_mean(x1, x2, xr, R: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, FULL: tl.constexpr):
    """Sum over the lanes of pairs x1, x2 and of the rest xr (and over the heads if FULL), over COUNT."""
    if R == 0:
        total = tl.sum(xr, axis=2, keep_dims=True)
    else:
        total = tl.sum(x1 + x2, axis=2, keep_dims=True)
        if R < D:
            total += tl.sum(xr, axis=2, keep_dims=True)
    if FULL:
        total = tl.sum(total, axis=0, keep_dims=True)
    return total * (1.0 / COUNT)


@triton.jit
def normalise_tile(x1, x2, xr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                   T: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """x * rstd (of x - mean for layer_head) and rstd. x1, x2 are unused when R is 0, xr when R is D."""
    FULL: tl.constexpr = NORM == "rms_full"
    COUNT: tl.constexpr = H * D if FULL else D
    if NORM == "layer_head":
        mean = row_mean(x1, x2, xr, R, D, COUNT, FULL)
        if R:  # lanes of padding stay zero, for the sum of squares
            real = tl.arange(0, P)[None, None, :] < R // 2
            x1 = tl.where(real, x1 - mean, 0.0)
            x2 = tl.where(real, x2 - mean, 0.0)
        if R < D:
            xr = tl.where(tl.arange(0, T)[None, None, :] < D - R, xr - mean, 0.0)
    if R == 0:
        square = row_mean(xr, xr, xr * xr, R, D, COUNT, FULL)
    else:
        square = row_mean(x1 * x1, x2 * x2, xr * xr, R, D, COUNT, FULL)
    rstd = tl.rsqrt(square + EPS)
    return x1 * rstd, x2 * rstd, xr * rstd, rstd


@triton.jit
def load_weight(ptr, h, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
                PER_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """weight + OFFSET on the lanes of pairs and of the rest, [BLOCK_H or 1, 1, ..]."""
    if PER_HEAD:
        keep = h < H
        row = ptr + h * D
    else:
        keep = tl.full((1, 1, 1), True, tl.int1)
        row = ptr + tl.zeros((1, 1, 1), tl.int64)
    if R:
        w1, w2 = load_pairs(row, 1, keep, R, P, INTERLEAVED)
    if R < D:
        wr = load_rest(row, 1, keep, R, D, T)
    if R == 0:
        w1, w2 = wr, wr
    if R == D:
        wr = w1
    return w1 + OFFSET, w2 + OFFSET, wr + OFFSET
