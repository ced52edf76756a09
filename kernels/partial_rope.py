"""Rotate a few lanes of a projection's result and leave the others where they are: RoPE without moving the heads.

    for each head, each offset o of `offsets` and each rotary pair p in [0, rotary_dim / 2), on its two lanes of o:
        out1 = x1 * cos1 - x2 * sin1
        out2 = x2 * cos2 + x1 * sin2
    every other lane: out = x

RoPE is Su et al. (arXiv:2104.09864); GPT-NeoX rotates 20 of 80 lanes of query and key, StableLM 16 of 64. Pairs are
lanes (p, p + R/2) or (2p, 2p + 1) when interleaved. `cos_lanes` = (mult, first, second) says where the table keeps a
pair's values: cos1 = cos[..., mult * p + first] and cos2 = cos[..., mult * p + second]; so does `sin_lanes`.

The result is a copy of x whose rotating lanes are written by the kernel. Inductor drops the copy where nothing else
reads x, as after a projection: a fifth of the bytes that writing query and key anew would move.

- x [B, S, H, L]: H heads, whose lanes hold query, key and value side by side (`offsets` = (0, L / 3)) or one of them
  (`offsets` = (0,)); any strides; fp32, bf16, fp16; fp64 too.
- cos, sin: [B or 1, S, lanes], any strides and float dtype. They get no gradient.
- transposed: rotate by the transposed matrix, as the gradient is.
- Returns x's shape, dtype and, when x has no gaps, strides: fp32 arithmetic, rounded once.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> qkv = torch.randn(2, 5, 4, 3 * 16)
    >>> cos, sin = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    >>> torch.equal(partial_rope(qkv, cos, sin, (0, 16), 8, False, (1, 0, 4), (1, 0, 4), False), qkv)
    True
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import define_op, no_triton, on_device_of, tl, triton, wrap_triton
from ._qk_common import DTYPES, Spec, acc_dtype, check_tables, join_pairs, require, split_pairs, table_values
from ._qk_tile import pow2, table_strides

# Elements that one program rotates, about, and its warps.
TILE, NUM_WARPS = 1024, 4


def supports(x: Tensor) -> str | None:
    """Why the Triton kernel cannot take x (the op then runs its reference), or None."""
    if reason := no_triton(x):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is not one of fp32, bf16, fp16"
    return None


def _spec(rotary_dim: int, interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int]) -> Spec:
    return Spec("none", 0.0, 0.0, int(rotary_dim), interleaved, cos_lanes, sin_lanes)


def _check(x: Tensor, cos: Tensor, sin: Tensor, offsets: Sequence[int], spec: Spec) -> None:
    require("partial_rope", x.dim() == 4, "x.shape", tuple(x.shape), "four dimensions, [B, S, H, L]")
    require("partial_rope", x.dtype in (*DTYPES, torch.float64), "x.dtype", x.dtype, "fp32, bf16, fp16 or fp64")
    rotary = spec.rotary_dim
    require("partial_rope", rotary > 0 and rotary % 2 == 0, "rotary_dim", rotary, "an even number from 2 on")
    ends = [0, *(offset + rotary for offset in sorted(offsets))]
    apart = all(offset >= end for offset, end in zip(sorted(offsets), ends, strict=False))
    require("partial_rope", apart and ends[-1] <= x.shape[3] and len(offsets) > 0, "offsets", list(offsets),
            f"places for {rotary} lanes each in L = {x.shape[3]}, apart from each other")  # fmt: skip
    check_tables("partial_rope", x, cos, sin, spec)


def reference(x: Tensor, cos: Tensor, sin: Tensor, offsets: Sequence[int], rotary_dim: int, interleaved: bool,
              cos_lanes: Sequence[int], sin_lanes: Sequence[int], transposed: bool = False) -> Tensor:  # fmt: skip
    """The op in plain torch, with its arguments: differentiable, compilable, float64 for float64 inputs."""
    spec = _spec(rotary_dim, interleaved, cos_lanes, sin_lanes)
    dtype = acc_dtype(x)
    c1, c2 = table_values(cos, spec.cos_lanes, spec, dtype)
    s1, s2 = table_values(sin, spec.sin_lanes, spec, dtype)
    if transposed:
        s1, s2 = -s2, -s1
    parts, at = [], 0
    for offset in sorted(offsets):
        y1, y2, _ = split_pairs(x[..., offset : offset + spec.rotary_dim].to(dtype), spec)
        turned = join_pairs(y1 * c1 - y2 * s1, y2 * c2 + y1 * s2, y1[..., :0], spec)
        parts += [x[..., at:offset], turned.to(x.dtype)]
        at = offset + spec.rotary_dim
    out = torch.cat((*parts, x[..., at:]), -1)
    return torch.empty_like(x).copy_(out)  # with x's strides


@triton.jit
def _partial_rope_kernel(x, x_b, x_s, x_h, x_d, n_tokens, length, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
            H: tl.constexpr, OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, TWO: tl.constexpr, R: tl.constexpr,
            P: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr, C0: tl.constexpr,
            C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
            BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Rotates the lanes of BLOCK_T tokens in x itself."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    p = tl.arange(0, P)[None, None, :]
    b, s = (t // length).to(tl.int64), (t % length).to(tl.int64)
    there = (t < n_tokens) & (p < R // 2)
    cos_row, sin_row = cos + (b * cos_b + s * cos_s), sin + (b * sin_b + s * sin_s)
    c1 = tl.load(cos_row + (C0 * p + C1) * cos_d, there, other=0.0).to(tl.float32)
    c2 = c1
    if C2 != C1:
        c2 = tl.load(cos_row + (C0 * p + C2) * cos_d, there, other=0.0).to(tl.float32)
    s1 = tl.load(sin_row + (S0 * p + S1) * sin_d, there, other=0.0).to(tl.float32)
    s2 = s1
    if S2 != S1:
        s2 = tl.load(sin_row + (S0 * p + S2) * sin_d, there, other=0.0).to(tl.float32)
    if TRANSPOSED:
        s1, s2 = -s2, -s1
    if INTERLEAVED:
        first, second = 2 * p * x_d, (2 * p + 1) * x_d
    else:
        first, second = p * x_d, (p + R // 2) * x_d
    for start in tl.static_range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :, None]
        keep = there & (h < H)
        row = x + (b * x_b + s * x_s) + h.to(tl.int64) * x_h
        at1, at2 = row + OFFSET_1 * x_d + first, row + OFFSET_1 * x_d + second
        x1, x2 = tl.load(at1, keep, other=0.0).to(tl.float32), tl.load(at2, keep, other=0.0).to(tl.float32)
        if TWO:
            at3, at4 = row + OFFSET_2 * x_d + first, row + OFFSET_2 * x_d + second
            x3, x4 = tl.load(at3, keep, other=0.0).to(tl.float32), tl.load(at4, keep, other=0.0).to(tl.float32)
            tl.store(at3, (x3 * c1 - x4 * s1).to(x.dtype.element_ty), keep)
            tl.store(at4, (x4 * c2 + x3 * s2).to(x.dtype.element_ty), keep)
        tl.store(at1, (x1 * c1 - x2 * s1).to(x.dtype.element_ty), keep)
        tl.store(at2, (x2 * c2 + x1 * s2).to(x.dtype.element_ty), keep)


def _forward(x: Tensor, cos: Tensor, sin: Tensor, offsets: Sequence[int], rotary_dim: int, interleaved: bool,
             cos_lanes: Sequence[int], sin_lanes: Sequence[int], transposed: bool) -> Tensor:  # fmt: skip
    spec = _spec(rotary_dim, interleaved, cos_lanes, sin_lanes)
    _check(x, cos, sin, offsets, spec)
    if len(offsets) > 2 or supports(x) is not None:
        return reference(x, cos, sin, offsets, rotary_dim, interleaved, cos_lanes, sin_lanes, transposed)
    out = x.clone()
    if x.numel() == 0:
        return out
    heads, pairs, tokens = int(x.shape[2]), pow2(spec.rotary_dim // 2), x.shape[0] * x.shape[1]
    block_h = min(pow2(heads), max(TILE // (pairs * len(offsets)), 1))
    block_t = max(TILE // (pairs * len(offsets) * block_h), 1)
    cos_b, cos_s, cos_d = table_strides(cos)
    sin_b, sin_s, sin_d = table_strides(sin)
    c0, c1, c2 = map(int, cos_lanes)
    s0, s1, s2 = map(int, sin_lanes)
    with on_device_of(x):
        wrap_triton(_partial_rope_kernel)[((tokens + block_t - 1) // block_t,)](
            out, *out.stride(), tokens, x.shape[1], cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
            H=heads, OFFSET_1=int(offsets[0]), OFFSET_2=int(offsets[-1]), TWO=len(offsets) == 2,
            R=spec.rotary_dim, P=pairs, INTERLEAVED=interleaved, TRANSPOSED=transposed,
            C0=c0, C1=c1, C2=c2, S0=s0, S1=s1, S2=s2, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


partial_rope = define_op("torch_fuse::partial_rope", _forward)


@partial_rope.register_fake
def _fake(x: Tensor, cos: Tensor, sin: Tensor, offsets: Sequence[int], rotary_dim: int, interleaved: bool,
          cos_lanes: Sequence[int], sin_lanes: Sequence[int], transposed: bool) -> Tensor:  # fmt: skip
    _check(x, cos, sin, offsets, _spec(rotary_dim, interleaved, cos_lanes, sin_lanes))
    return torch.empty_like(x)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *options, transposed = ctx.options
    return partial_rope(grad, *ctx.saved_tensors, *options, not transposed), *[None] * 8


partial_rope.register_autograd(_backward, setup_context=_save_for_backward)
