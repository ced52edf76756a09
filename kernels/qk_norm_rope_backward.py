"""The gradient of qk_norm_rope: through the rotation, the weight and the norm, of q and k in one launch.

    dy1 = g1 * cos1 + g2 * sin2                   dx_hat = dy * (weight + weight_offset)
    dy2 = g2 * cos2 - g1 * sin1                   dweight = sum of dy * x_hat over its tokens and heads
    rms:   dx = rstd * (dx_hat - x_hat * mean(dx_hat * x_hat))
    layer: dx = rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))

- grad_q, grad_k: [B, S, H, D] of any strides (expanded ones too), or None for a result that nothing used.
- q, k: the forward's inputs, None if norm is "none"; x_hat and rstd are computed again from them.
- Returns the gradients of q, k ([B, S, H, D] contiguous, in `dtype`, the inputs'), q_weight, k_weight (like
  the weights); an empty tensor stands for each that does not exist. fp32 arithmetic. A weight's gradient is
  the sum of one partial row a program, taken by a second reduction: no atomics, the same bits in each run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import define_op, on_device_of, tl, triton, wrap_triton
from ._qk_common import Spec, join_pairs, normalise, scale, split_pairs, table_values
from ._qk_tile import (
    Plan,
    load_pairs,
    load_rest,
    load_table,
    load_weight,
    no_kernel,
    normalise_tile,
    plan,
    row_mean,
    store_pairs,
    store_rest,
    tile_arguments,
    tile_rows,
    weight_kind,
)

# Elements of one program's tile, its warps, and the programs that share the sum of one weight's gradient.
TILE, NUM_WARPS, PARTIALS = 2048, 4, 512


def _reference_one(grad: Tensor | None, x: Tensor | None, weight: Tensor | None, cos: Tensor | None,
                   sin: Tensor | None, spec: Spec,
                   dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if grad is None:
        return None, None
    dy, dw = grad.to(torch.float64 if dtype == torch.float64 else torch.float32), None
    if cos is not None and sin is not None:
        g1, g2, rest = split_pairs(dy, spec)
        c1, c2 = table_values(cos, spec.cos_lanes, spec, dy.dtype)
        s1, s2 = table_values(sin, spec.sin_lanes, spec, dy.dtype)
        dy = join_pairs(g1 * c1 + g2 * s2, g2 * c2 - g1 * s1, rest, spec)
    if x is not None:
        x_hat, rstd = normalise(x.to(dy.dtype), spec)
        if weight is not None:
            dw = (dy * x_hat).sum((0, 1) if weight.numel() != x.shape[-1] else (0, 1, 2))
            dw = dw.reshape(weight.shape).to(weight.dtype)
            dy = dy * scale(weight, dy, spec)
        dims = (-2, -1) if spec.norm == "rms_full" else (-1,)
        inner = x_hat * (dy * x_hat).mean(dims, keepdim=True)
        if spec.norm == "layer_head":
            inner = inner + dy.mean(dims, keepdim=True)
        dy = rstd * (dy - inner)
    return dy.to(dtype).clone(memory_format=torch.contiguous_format), dw


@triton.jit
def _store_partial(partial, program, sum1, sum2, sumr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
                   P: tl.constexpr, T: tl.constexpr, WEIGHT: tl.constexpr, INTERLEAVED: tl.constexpr,
                   BLOCK_H: tl.constexpr):  # fmt: skip
    """This program's part of the weight's gradient: of [programs / HEAD_TILES, H, D] or [programs, D]."""
    HEAD_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    sum1, sum2 = tl.sum(sum1, axis=1, keep_dims=True), tl.sum(sum2, axis=1, keep_dims=True)
    sumr = tl.sum(sumr, axis=1, keep_dims=True)
    if WEIGHT == "per_head":
        h = (program % HEAD_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
        row = partial + ((program // HEAD_TILES) * H + h) * D
        mine = h < H
    else:
        sum1, sum2 = tl.sum(sum1, axis=0, keep_dims=True), tl.sum(sum2, axis=0, keep_dims=True)
        sumr = tl.sum(sumr, axis=0, keep_dims=True)
        row = partial + program * D + tl.zeros((1, 1, 1), tl.int32)
        mine = tl.full((1, 1, 1), True, tl.int1)
    if R:
        store_pairs(row, sum1, sum2, mine, R, P, INTERLEAVED)
    if R < D:
        store_rest(row, sumr, mine, R, D, T)


@triton.jit
def _backward_programs(program, n_programs, n_tokens, length, g, g_b, g_s, g_h, g_d, x, x_b, x_s, x_h, x_d,
                       weight, dx, partial, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
                       H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
                       WEIGHT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
                       INTERLEAVED: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
                       S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, BLOCK_H: tl.constexpr,
                       BLOCK_T: tl.constexpr):  # fmt: skip
    HEAD_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    FULL: tl.constexpr = NORM == "rms_full"
    COUNT: tl.constexpr = H * D if FULL else D
    sum1 = tl.zeros((BLOCK_H, BLOCK_T, P), tl.float32)
    sum2 = tl.zeros((BLOCK_H, BLOCK_T, P), tl.float32)
    sumr = tl.zeros((BLOCK_H, BLOCK_T, T), tl.float32)
    # n_programs is a multiple of HEAD_TILES: a program stays with its heads, the owners of its weights
    tile, n_tiles = program, HEAD_TILES * ((n_tokens + BLOCK_T - 1) // BLOCK_T)
    while tile < n_tiles:  # not range(): Triton 3.6's interpreter cannot take its bounds from NumPy 2.5
        h, b, s, exists, keep = tile_rows(tile, n_tokens, length, H, BLOCK_H, BLOCK_T)
        g_row = g + (b * g_b + s * g_s + h * g_h)
        if NORM != "none":
            x_row = x + (b * x_b + s * x_s + h * x_h)
        dx_row = dx + ((b * length + s) * H + h) * D
        if R:
            g1, g2 = load_pairs(g_row, g_d, keep, R, P, INTERLEAVED)
            if NORM != "none":
                x1, x2 = load_pairs(x_row, x_d, keep, R, P, INTERLEAVED)
        if R < D:
            dyr = load_rest(g_row, g_d, keep, R, D, T)
            if NORM != "none":
                xr = load_rest(x_row, x_d, keep, R, D, T)
        if R:
            c1, c2 = load_table(cos + (b * cos_b + s * cos_s), cos_d, exists, R, P, C0, C1, C2)
            s1, s2 = load_table(sin + (b * sin_b + s * sin_s), sin_d, exists, R, P, S0, S1, S2)
            dy1, dy2 = g1 * c1 + g2 * s2, g2 * c2 - g1 * s1
        if R == 0:  # names for lanes that there are not, so that one spelling serves below
            dy1, dy2 = dyr, dyr
            if NORM != "none":
                x1, x2 = xr, xr
        if R == D:
            dyr = dy1
            if NORM != "none":
                xr = x1
        if NORM != "none":
            x1, x2, xr, rstd = normalise_tile(x1, x2, xr, H, D, R, P, T, NORM, EPS)
            if WEIGHT != "none":
                # rows that do not exist would add 0 * inf if eps is 0
                if R:
                    sum1 += tl.where(keep, dy1 * x1, 0.0)
                    sum2 += tl.where(keep, dy2 * x2, 0.0)
                if R < D:
                    sumr += tl.where(keep, dyr * xr, 0.0)
                w1, w2, wr = load_weight(weight, h, H, D, R, P, T, WEIGHT == "per_head", INTERLEAVED, OFFSET)
                dy1, dy2, dyr = dy1 * w1, dy2 * w2, dyr * wr
            inner = row_mean(dy1 * x1, dy2 * x2, dyr * xr, R, D, COUNT, FULL)
            mean = 0.0
            if NORM == "layer_head":
                mean = row_mean(dy1, dy2, dyr, R, D, COUNT, FULL)
            dy1 = (dy1 - mean - x1 * inner) * rstd
            dy2 = (dy2 - mean - x2 * inner) * rstd
            dyr = (dyr - mean - xr * inner) * rstd
        if R:
            store_pairs(dx_row, dy1, dy2, keep, R, P, INTERLEAVED)
        if R < D:
            store_rest(dx_row, dyr, keep, R, D, T)
        tile += n_programs
    if WEIGHT != "none":
        _store_partial(partial, program, sum1, sum2, sumr, H, D, R, P, T, WEIGHT, INTERLEAVED, BLOCK_H)


@triton.jit
def _backward_kernel(gq, gq_b, gq_s, gq_h, gq_d, q, q_b, q_s, q_h, q_d, q_weight, dq, q_partial, gk, gk_b,
                     gk_s, gk_h, gk_d, k, k_b, k_s, k_h, k_d, k_weight, dk, k_partial, n_tokens, length,
                     q_programs, k_programs, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
                     HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
                     T: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, NORM: tl.constexpr,
                     EPS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, C0: tl.constexpr,
                     C1: tl.constexpr, C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
                     S2: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_TQ: tl.constexpr,
                     BLOCK_HK: tl.constexpr, BLOCK_TK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    is_q = program < q_programs
    # a side without a gradient is all None and has no programs: nothing to compile
    if gq is not None:  # noqa: SIM102
        if is_q:
            _backward_programs(program, q_programs, n_tokens, length, gq, gq_b, gq_s, gq_h, gq_d, q, q_b,
                               q_s, q_h, q_d, q_weight, dq, q_partial, cos, cos_b, cos_s, cos_d, sin, sin_b,
                               sin_s, sin_d, HQ, D, R, P, T, Q_WEIGHT, NORM, EPS, OFFSET, INTERLEAVED, C0,
                               C1, C2, S0, S1, S2, BLOCK_HQ, BLOCK_TQ)  # fmt: skip
    if gk is not None:  # noqa: SIM102
        if not is_q:
            _backward_programs(program - q_programs, k_programs, n_tokens, length, gk, gk_b, gk_s, gk_h,
                               gk_d, k, k_b, k_s, k_h, k_d, k_weight, dk, k_partial, cos, cos_b, cos_s,
                               cos_d, sin, sin_b, sin_s, sin_d, HK, D, R, P, T, K_WEIGHT, NORM, EPS, OFFSET,
                               INTERLEAVED, C0, C1, C2, S0, S1, S2, BLOCK_HK, BLOCK_TK)  # fmt: skip


class _Side(NamedTuple):
    """What the kernel takes for q (or for k); no programs and no tensors where there is no gradient."""

    arguments: tuple[Any, ...]
    programs: int = 0
    heads: int = 1
    weight: str = "none"
    plan: Plan = Plan(1, 1, 1)
    dx: Tensor | None = None
    partial: Tensor | None = None


def _side(grad: Tensor | None, x: Tensor | None, weight: Tensor | None, spec: Spec, dtype: torch.dtype) -> _Side:
    # No other tensor in place of a None: functionalisation makes an output of all that a kernel may write.
    if grad is None:
        return _Side((None, 0, 0, 0, 0, None, 0, 0, 0, 0, None, None, None))
    heads, dim = int(grad.shape[2]), int(grad.shape[3])
    how, kind = plan(heads, dim, spec.norm, TILE), weight_kind(weight, dim)
    dx, partial = grad.new_empty(grad.shape, dtype=dtype), None
    programs = how.tiles(grad.shape[0] * grad.shape[1])
    if weight is not None:
        rows = max(PARTIALS // how.head_tiles, 1)
        if isinstance(programs, int):  # a minimum with a symbolic number of tokens would be a guard
            rows = min(rows, programs // how.head_tiles)
        programs = rows * how.head_tiles
        shape = (rows, heads * dim) if kind == "per_head" else (programs, dim)
        partial = grad.new_empty(shape, dtype=torch.float32)
    strides = (0, 0, 0, 0) if x is None else x.stride()
    arguments = (grad, *grad.stride(), x, *strides, weight, dx, partial)
    return _Side(arguments, programs, heads, kind, how, dx, partial)


def _sum(partial: Tensor | None, weight: Tensor | None) -> Tensor | None:
    if partial is None or weight is None:
        return None
    return partial.sum(0).reshape(weight.shape).to(weight.dtype)


def _backward(grad_q: Tensor | None, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None,
              q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
              norm: str, eps: float, weight_offset: float, rotary_dim: int, interleaved: bool,
              cos_lanes: Sequence[int], sin_lanes: Sequence[int],
              dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(norm, eps, weight_offset, int(rotary_dim), interleaved, cos_lanes, sin_lanes)
    given = [grad for grad in (grad_q, grad_k) if grad is not None]
    heads = max(int(grad.shape[2]) for grad in given)
    tokens = given[0].shape[0] * given[0].shape[1]
    results: tuple[Tensor | None, ...]
    if tokens == 0 or no_kernel(given[0], dtype, heads, norm, spec.rotary_dim) is not None:
        dq, dq_weight = _reference_one(grad_q, q, q_weight, cos, sin, spec, dtype)
        dk, dk_weight = _reference_one(grad_k, k, k_weight, cos, sin, spec, dtype)
        results = dq, dk, dq_weight, dk_weight
    else:
        a, b = (_side(*one, spec, dtype) for one in ((grad_q, q, q_weight), (grad_k, k, k_weight)))
        with on_device_of(given[0]):
            wrap_triton(_backward_kernel)[(a.programs + b.programs,)](
                *a.arguments, *b.arguments, tokens, given[0].shape[1], a.programs, b.programs,
                **tile_arguments(cos, sin, int(given[0].shape[3]), spec),
                HQ=a.heads, HK=b.heads, Q_WEIGHT=a.weight, K_WEIGHT=b.weight,
                BLOCK_HQ=a.plan.block_h, BLOCK_TQ=a.plan.block_t,
                BLOCK_HK=b.plan.block_h, BLOCK_TK=b.plan.block_t, num_warps=NUM_WARPS,
            )  # fmt: skip
        results = a.dx, b.dx, _sum(a.partial, q_weight), _sum(b.partial, k_weight)
    dq, dk, dq_weight, dk_weight = (given[0].new_empty(0) if x is None else x for x in results)
    return dq, dk, dq_weight, dk_weight


qk_norm_rope_backward = define_op("torch_fuse::qk_norm_rope_backward", _backward)


@qk_norm_rope_backward.register_fake
def _fake(grad_q: Tensor | None, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None,
          q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
          norm: str, eps: float, weight_offset: float, rotary_dim: int, interleaved: bool,
          cos_lanes: Sequence[int], sin_lanes: Sequence[int],
          dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = grad_k if grad_q is None else grad_q
    assert given is not None, "autograd calls this op with a gradient for q, for k or for both"

    def like(grad: Tensor | None, what: Tensor | None) -> Tensor:
        if grad is None or what is None:
            return given.new_empty(0)
        return given.new_empty(what.shape, dtype=dtype if what is grad else what.dtype)

    return like(grad_q, grad_q), like(grad_k, grad_k), like(grad_q, q_weight), like(grad_k, k_weight)
