"""Normalise q and k and rotate them: from the QKV projection's result to attention layout in one launch.

    x_hat = x * rstd                      rms_head, rms_full: rstd = 1 / sqrt(mean(x^2) + eps)
    x_hat = (x - mean(x)) * rstd          layer_head:         rstd = 1 / sqrt(var(x) + eps)
    y     = x_hat * (weight + weight_offset)
    for each rotary pair p in [0, rotary_dim / 2), on its two lanes:
        out1 = y1 * cos1 - y2 * sin1
        out2 = y2 * cos2 + y1 * sin2

RMSNorm is Zhang & Sennrich (arXiv:1910.07467), RoPE Su et al. (2104.09864). Pairs are lanes (p, p + R/2)
or (2p, 2p + 1) when interleaved; lanes from rotary_dim on are normalised and passed through. `cos_lanes` =
(mult, first, second) says where the table keeps a pair's values: cos1 = cos[..., mult * p + first] and
cos2 = cos[..., mult * p + second]; so does `sin_lanes`.

- q [B, S, Hq, D], k [B, S, Hk, D]: any strides (views into the projection); fp32, bf16, fp16; fp64 too.
- norm: "none", "rms_head" or "layer_head" over D of each head, "rms_full" over all H * D of a token.
- q_weight, k_weight: D values shared by the heads, or H * D laid out [H, D]; None for no weight. Contiguous.
- cos, sin: [B or 1, S, lanes], any strides and float dtype; None when rotary_dim is 0. They get no gradient.
- Returns q and k, [B, S, H, D] contiguous, in out_dtype or q's dtype: fp32 arithmetic, rounded once.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> q, k, v = torch.randn(2, 5, 3, 4, 16).unbind(2)
    >>> cos, sin = torch.ones(1, 5, 16), torch.zeros(1, 5, 16)
    >>> half = (1, 0, 8)
    >>> q2, k2 = qk_norm_rope(q, k, None, None, cos, sin, "none", 0.0, 0.0, 16, False, half, half, None)
    >>> torch.equal(q, q2)
    True
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import define_op, on_device_of, tl, triton, wrap_triton
from ._qk_common import Spec, acc_dtype, check, join_pairs, normalise, scale, split_pairs, table_values
from ._qk_flat import FLAT_ARGUMENTS, FLAT_ROWS, FLAT_WARPS, flat_kernel, flat_lanes, flat_tiles, prefers_flat
from ._qk_tile import (
    load_pairs,
    load_rest,
    load_table,
    load_weight,
    no_kernel,
    normalise_tile,
    plan,
    store_pairs,
    store_rest,
    tile_arguments,
    tile_rows,
    weight_kind,
)
from .qk_norm_rope_backward import qk_norm_rope_backward

# Elements of one program's tile, and its warps; benchmarks/bench_qk_norm_rope.py --sweep tries others.
TILE, NUM_WARPS = 4096, 4


def supports(q: Tensor, k: Tensor, norm: str, rotary_dim: int) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    if min(q.shape[2], k.shape[2]) == 0:
        return "there are no heads"
    return no_kernel(q, q.dtype, max(int(q.shape[2]), int(k.shape[2])), norm, rotary_dim)


def _reference_one(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, spec: Spec,
                   dtype: torch.dtype) -> Tensor:  # fmt: skip
    y = x.to(acc_dtype(x))
    if spec.norm != "none":
        y, _ = normalise(y, spec)
    if weight is not None:
        y = y * scale(weight, y, spec)
    if cos is not None and sin is not None:
        y1, y2, rest = split_pairs(y, spec)
        c1, c2 = table_values(cos, spec.cos_lanes, spec, y.dtype)
        s1, s2 = table_values(sin, spec.sin_lanes, spec, y.dtype)
        y = join_pairs(y1 * c1 - y2 * s1, y2 * c2 + y1 * s2, rest, spec)
    return y.to(dtype).clone(memory_format=torch.contiguous_format)  # an op's result must not alias its input


def reference(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
              sin: Tensor | None, norm: str, eps: float, weight_offset: float, rotary_dim: int,
              interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
              out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in plain torch, with its arguments: differentiable, compilable, float64 for float64 inputs."""
    spec = Spec(norm, eps, weight_offset, rotary_dim, interleaved, cos_lanes, sin_lanes)
    rest = (cos, sin, spec, out_dtype or q.dtype)
    return _reference_one(q, q_weight, *rest), _reference_one(k, k_weight, *rest)


@triton.jit
def _forward_tile(tile, n_tokens, length, x, x_b, x_s, x_h, x_d, weight, out, cos, cos_b, cos_s, cos_d, sin,
                  sin_b, sin_s, sin_d, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                  T: tl.constexpr, WEIGHT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
                  OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
                  C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
                  BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    h, b, s, exists, keep = tile_rows(tile, n_tokens, length, H, BLOCK_H, BLOCK_T)
    x_row = x + (b * x_b + s * x_s + h * x_h)
    out_row = out + ((b * length + s) * H + h) * D
    if R:
        x1, x2 = load_pairs(x_row, x_d, keep, R, P, INTERLEAVED)
        c1, c2 = load_table(cos + (b * cos_b + s * cos_s), cos_d, exists, R, P, C0, C1, C2)
        s1, s2 = load_table(sin + (b * sin_b + s * sin_s), sin_d, exists, R, P, S0, S1, S2)
    if R < D:
        xr = load_rest(x_row, x_d, keep, R, D, T)
    if R == 0:  # names for lanes that there are not, so that one spelling serves below
        x1, x2 = xr, xr
    if R == D:
        xr = x1
    if NORM != "none":
        x1, x2, xr, _ = normalise_tile(x1, x2, xr, H, D, R, P, T, NORM, EPS)
    if WEIGHT != "none":
        w1, w2, wr = load_weight(weight, h, H, D, R, P, T, WEIGHT == "per_head", INTERLEAVED, OFFSET)
        x1, x2, xr = x1 * w1, x2 * w2, xr * wr
    if R:
        store_pairs(out_row, x1 * c1 - x2 * s1, x2 * c2 + x1 * s2, keep, R, P, INTERLEAVED)
    if R < D:
        store_rest(out_row, xr, keep, R, D, T)


@triton.jit
def _forward_kernel(q, q_b, q_s, q_h, q_d, q_weight, q_out, k, k_b, k_s, k_h, k_d, k_weight, k_out,
                    n_tokens, length, q_tiles, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
                    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                    T: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, NORM: tl.constexpr,
                    EPS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr,
                    C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
                    S2: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_TQ: tl.constexpr,
                    BLOCK_HK: tl.constexpr, BLOCK_TK: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    if HQ == HK:  # q and k of the same tokens side by side, so that the second finds cos and sin in L2
        is_q = tile % 2 == 0
        tile = tile // 2
    else:
        is_q = tile < q_tiles
        tile = tl.where(is_q, tile, tile - q_tiles)
    if is_q:
        _forward_tile(tile, n_tokens, length, q, q_b, q_s, q_h, q_d, q_weight, q_out, cos, cos_b, cos_s,
                      cos_d, sin, sin_b, sin_s, sin_d, HQ, D, R, P, T, Q_WEIGHT, NORM, EPS, OFFSET,
                      INTERLEAVED, C0, C1, C2, S0, S1, S2, BLOCK_HQ, BLOCK_TQ)  # fmt: skip
    else:
        _forward_tile(tile, n_tokens, length, k, k_b, k_s, k_h, k_d, k_weight, k_out, cos, cos_b, cos_s,
                      cos_d, sin, sin_b, sin_s, sin_d, HK, D, R, P, T, K_WEIGHT, NORM, EPS, OFFSET,
                      INTERLEAVED, C0, C1, C2, S0, S1, S2, BLOCK_HK, BLOCK_TK)  # fmt: skip


def _outputs(q: Tensor, k: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dtype = out_dtype or q.dtype
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)


def _forward(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
             sin: Tensor | None, norm: str, eps: float, weight_offset: float, rotary_dim: int,
             interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
             out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    spec = Spec(norm, eps, weight_offset, int(rotary_dim), interleaved, cos_lanes, sin_lanes)
    check(q, k, q_weight, k_weight, cos, sin, spec)
    if supports(q, k, norm, spec.rotary_dim) is not None:
        return reference(q, k, q_weight, k_weight, cos, sin, *spec, out_dtype)
    q_out, k_out = _outputs(q, k, out_dtype)
    tokens, length, dim = q.shape[0] * q.shape[1], q.shape[1], int(q.shape[3])
    if tokens == 0:
        return q_out, k_out
    if prefers_flat(q, k, norm, spec.rotary_dim, interleaved):
        arguments = tile_arguments(cos, sin, dim, spec)
        with on_device_of(q):
            wrap_triton(flat_kernel)[(flat_tiles(q) + flat_tiles(k),)](
                q, *q.stride(), q_out, k, *k.stride(), k_out, tokens, length, flat_tiles(q),
                **{name: arguments[name] for name in FLAT_ARGUMENTS}, **flat_lanes(dim, spec.rotary_dim),
                HQ=int(q.shape[2]), HK=int(k.shape[2]), ROWS=FLAT_ROWS, num_warps=FLAT_WARPS,
            )  # fmt: skip
        return q_out, k_out
    q_plan, k_plan = (plan(int(x.shape[2]), dim, norm, TILE) for x in (q, k))
    with on_device_of(q):
        wrap_triton(_forward_kernel)[(q_plan.tiles(tokens) + k_plan.tiles(tokens),)](
            q, *q.stride(), q_weight, q_out, k, *k.stride(), k_weight, k_out,
            tokens, length, q_plan.tiles(tokens), **tile_arguments(cos, sin, dim, spec),
            HQ=int(q.shape[2]), HK=int(k.shape[2]),
            Q_WEIGHT=weight_kind(q_weight, dim), K_WEIGHT=weight_kind(k_weight, dim),
            BLOCK_HQ=q_plan.block_h, BLOCK_TQ=q_plan.block_t,
            BLOCK_HK=k_plan.block_h, BLOCK_TK=k_plan.block_t, num_warps=NUM_WARPS,
        )  # fmt: skip
    return q_out, k_out


qk_norm_rope = define_op("torch_fuse::qk_norm_rope", _forward)


@qk_norm_rope.register_fake
def _fake(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
          sin: Tensor | None, norm: str, eps: float, weight_offset: float, rotary_dim: int,
          interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int],
          out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    spec = Spec(norm, eps, weight_offset, rotary_dim, interleaved, cos_lanes, sin_lanes)
    check(q, k, q_weight, k_weight, cos, sin, spec)
    return _outputs(q, k, out_dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, q_weight, k_weight, cos, sin, *options, _out_dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.options, ctx.dtype = options, q.dtype
    keep = options[0] != "none"  # the gradient of a rotation needs the tables only
    ctx.save_for_backward(q if keep else None, k if keep else None, q_weight, k_weight, cos, sin)


def _backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    if grad_q is None and grad_k is None:
        return (None,) * 14
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    grads = qk_norm_rope_backward(grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, *ctx.options, ctx.dtype)
    has_q, has_k = grad_q is not None, grad_k is not None
    present = (has_q, has_k, has_q and q_weight is not None, has_k and k_weight is not None)
    return *(grad if there else None for grad, there in zip(grads, present, strict=True)), *[None] * 10


qk_norm_rope.register_autograd(_backward, setup_context=_save_for_backward)
