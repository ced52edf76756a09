"""Residual sum, LayerNorm or RMSNorm, and adaLN modulation in one pass: each tensor is read and written once.

    r     = x + sum_i alpha_i * gate_i * y_i                         no, one or two terms, rounded to r_dtype
    x_hat = (r - mean(r)) / sqrt(var(r) + eps)      layer            statistics of the rounded r
    x_hat = r / sqrt(mean(r^2) + eps)               rms
    h_j   = x_hat * (weight_j + weight_offset) + bias_j              one or two norms of the same r
    out   = h_1 * (1 + scale) + shift                                with one norm only

LayerNorm is Ba et al. (arXiv:1607.06450), RMSNorm Zhang & Sennrich (1910.07467), adaLN Peebles & Xie (2212.09748).
A program holds whole rows in registers, so the two passes of the variance cost no second read.

- x, y1, y2: [B, S, C], last stride 1, other strides as they are; fp32, bf16, fp16 each; fp64 too.
- gate1, gate2: [1 or B, 1 or S, 1 or C] or None; alphas: two numbers, one a term.
- weight1, bias1, weight2, bias2: [C] or None. scale, shift: [1 or B, 1 or S, C] or None.
- outputs: number of norms, 1 or 2; the second one is x_hat * (weight2 + weight_offset) + bias2.
- write_r: False where nothing reads r (then a gradient has to compute it once more), and without y1: r is x.
- Returns r in r_dtype, out_1 and out_2 in out_dtype, [B, S, C] contiguous; an empty tensor for what is not asked.
  fp32 arithmetic, rounded once for r and once for the results.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> x, y = torch.randn(2, 1, 3, 8).unbind(0)
    >>> r, h, _ = gated_residual_norm(x[None], y[None], *[None] * 9, [1.0, 1.0], "layer", 1e-5, 0.0, 1,
    ...                               torch.float32, torch.float32, True)
    >>> torch.equal(r[0], x + y)
    True
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._gated_residual_norm_common import (
    Operands,
    Spec,
    affine,
    check,
    combine,
    modulate,
    no_kernel,
    normalise,
    strides,
)
from ._gated_residual_norm_tile import Config, load, load_factor, normalised, parts, store
from ._ops import define_op, on_device_of, tl, triton, wrap_triton
from .gated_residual_norm_backward import gated_residual_norm_backward, same_gradient, summed, sums

OPERANDS = len(Operands._fields)
# 0 where r keeps fp32's bits, else the type that it is rounded to before the norm reads it.
ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def config(width: int) -> Config:
    """How rows of `width` lanes are computed: about 16 lanes a thread."""
    warps = 2
    while warps < 16 and width >= 1024 * warps:
        warps *= 2
    return Config(warps)


def supports(t: Operands, spec: Spec) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    return no_kernel(t, spec)


def reference(x: Tensor, y1: Tensor | None, y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None,
              weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
              scale: Tensor | None, shift: Tensor | None, alphas: Sequence[float], norm: str, eps: float,
              weight_offset: float, outputs: int, r_dtype: torch.dtype, out_dtype: torch.dtype,
              write_r: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op in plain torch, with its arguments: differentiable, compilable, float64 for float64 inputs."""
    t = Operands(x, y1, y2, gate1, gate2, weight1, bias1, weight2, bias2, scale, shift)
    spec = Spec(alphas, norm, eps, weight_offset, outputs, r_dtype, out_dtype, write_r)
    r = combine(t, spec)
    x_hat, _ = normalise(r.to(torch.promote_types(r_dtype, torch.float32)), spec)

    def result(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        h = modulate(affine(x_hat, weight, bias, spec), scale, shift).to(out_dtype)
        return h.clone(memory_format=torch.contiguous_format)  # an op's result must not alias its input

    out1 = result(weight1, bias1)
    out2 = result(weight2, bias2) if outputs == 2 else x.new_empty(0, dtype=out_dtype)
    if not write_r:
        return x.new_empty(0, dtype=r_dtype), out1, out2
    return r.clone(memory_format=torch.contiguous_format), out1, out2


@triton.jit
def _term(r, y, y_b, y_s, gate, gate_b, gate_s, b, s, col, keep, ALPHA: tl.constexpr, LANES: tl.constexpr,
          MASK: tl.constexpr):  # fmt: skip
    value = load(y + (b * y_b + s * y_s) + col, keep, MASK)
    if gate is not None:
        value *= load_factor(gate, gate_b, gate_s, b, s, col, keep, LANES, MASK)
    if ALPHA == 1.0:
        return r + value
    else:  # noqa: RET505
        return r + value * ALPHA


@triton.jit
def _combined(x, x_b, x_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, g1_b, g1_s, gate2, g2_b, g2_s, r, row, b, s, col,
              keep, C: tl.constexpr, ALPHA1: tl.constexpr, ALPHA2: tl.constexpr, LANES1: tl.constexpr,
              LANES2: tl.constexpr, ROUND: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """r of one part of a row, rounded as it is stored."""
    total = load(x + (b * x_b + s * x_s) + col, keep, MASK)
    if y1 is not None:
        total = _term(total, y1, y1_b, y1_s, gate1, g1_b, g1_s, b, s, col, keep, ALPHA1, LANES1, MASK)
    if y2 is not None:
        total = _term(total, y2, y2_b, y2_s, gate2, g2_b, g2_s, b, s, col, keep, ALPHA2, LANES2, MASK)
    if ROUND == 1:
        total = total.to(tl.bfloat16).to(tl.float32)
    if ROUND == 2:
        total = total.to(tl.float16).to(tl.float32)
    if r is not None:
        store(r + row * C + col, total, keep, MASK)
    return total


@triton.jit
def _affine(x_hat, weight, bias, col, keep, OFFSET: tl.constexpr, MASK: tl.constexpr):
    if weight is not None:
        x_hat = x_hat * (load(weight + col, keep, MASK) + OFFSET)
    if bias is not None:
        x_hat = x_hat + load(bias + col, keep, MASK)
    return x_hat


@triton.jit
def _write(x_hat, weight1, bias1, weight2, bias2, scale, scale_b, scale_s, shift, shift_b, shift_s, out1, out2, row, b,
           s, col, keep, C: tl.constexpr, OFFSET: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """The results of one part of a row."""
    h = _affine(x_hat, weight1, bias1, col, keep, OFFSET, MASK)
    if scale is not None:
        h *= 1.0 + load_factor(scale, scale_b, scale_s, b, s, col, keep, True, MASK)
    if shift is not None:
        h += load_factor(shift, shift_b, shift_s, b, s, col, keep, True, MASK)
    store(out1 + row * C + col, h, keep, MASK)
    if out2 is not None:
        store(out2 + row * C + col, _affine(x_hat, weight2, bias2, col, keep, OFFSET, MASK), keep, MASK)


@triton.jit
def _forward_kernel(x, x_b, x_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, g1_b, g1_s, gate2, g2_b, g2_s, weight1, bias1,
                    weight2, bias2, scale, scale_b, scale_s, shift, shift_b, shift_s, r, out1, out2, length,
                    ALPHA1: tl.constexpr, ALPHA2: tl.constexpr, LANES1: tl.constexpr, LANES2: tl.constexpr,
                    ROUND: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
                    C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASK_MAIN: tl.constexpr,
                    MASK_REST: tl.constexpr):  # fmt: skip
    """One row a program."""
    index = tl.program_id(0)  # fewer than 2^31 rows; their offsets are int64
    b, s, row = (index // length).to(tl.int64), (index % length).to(tl.int64), index.to(tl.int64)
    col_a = tl.arange(0, MAIN)
    keep_a = col_a < C
    part_a = _combined(x, x_b, x_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, g1_b, g1_s, gate2, g2_b, g2_s, r, row, b, s,
                       col_a, keep_a, C, ALPHA1, ALPHA2, LANES1, LANES2, ROUND, MASK_MAIN)  # fmt: skip
    col_b, keep_b, part_b = col_a, keep_a, part_a  # names for a part that there may not be
    if REST:
        col_b = MAIN + tl.arange(0, REST)
        keep_b = col_b < C
        part_b = _combined(x, x_b, x_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, g1_b, g1_s, gate2, g2_b, g2_s, r, row,
                           b, s, col_b, keep_b, C, ALPHA1, ALPHA2, LANES1, LANES2, ROUND, MASK_REST)  # fmt: skip
    part_a, part_b, _ = normalised(part_a, part_b, keep_a, keep_b, C, REST, MASK_MAIN, MASK_REST, LAYER, EPS)
    _write(part_a, weight1, bias1, weight2, bias2, scale, scale_b, scale_s, shift, shift_b, shift_s, out1, out2, row, b,
           s, col_a, keep_a, C, OFFSET, MASK_MAIN)  # fmt: skip
    if REST:
        _write(part_b, weight1, bias1, weight2, bias2, scale, scale_b, scale_s, shift, shift_b, shift_s, out1, out2,
               row, b, s, col_b, keep_b, C, OFFSET, MASK_REST)  # fmt: skip


def _outputs(t: Operands, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    x = t.x
    r = x.new_empty(x.shape if spec.write_r else 0, dtype=spec.r_dtype)
    out1 = x.new_empty(x.shape, dtype=spec.out_dtype)
    out2 = x.new_empty(x.shape if spec.outputs == 2 else 0, dtype=spec.out_dtype)
    return r, out1, out2


def _forward(x: Tensor, y1: Tensor | None, y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None,
             weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
             scale: Tensor | None, shift: Tensor | None, alphas: Sequence[float], norm: str, eps: float,
             weight_offset: float, outputs: int, r_dtype: torch.dtype, out_dtype: torch.dtype,
             write_r: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    t = Operands(x, y1, y2, gate1, gate2, weight1, bias1, weight2, bias2, scale, shift)
    spec = Spec(alphas, norm, eps, weight_offset, outputs, r_dtype, out_dtype, write_r)
    check(t, spec)
    if supports(t, spec) is not None:
        return reference(*t, *spec)
    r, out1, out2 = _outputs(t, spec)
    n_rows, width = x.shape[0] * x.shape[1], int(x.shape[2])
    if n_rows == 0:
        return r, out1, out2
    how = config(width)
    with on_device_of(x):
        wrap_triton(_forward_kernel)[(n_rows,)](
            x, *strides(x), y1, *strides(y1), y2, *strides(y2), gate1, *strides(gate1), gate2, *strides(gate2),
            weight1, bias1, weight2, bias2, scale, *strides(scale), shift, *strides(shift),
            r if write_r else None, out1, out2 if outputs == 2 else None, x.shape[1],
            ALPHA1=float(alphas[0]), ALPHA2=float(alphas[1]), LANES1=gate1 is None or gate1.shape[2] != 1,
            LANES2=gate2 is None or gate2.shape[2] != 1, ROUND=ROUNDING[r_dtype], LAYER=norm == "layer",
            EPS=eps, OFFSET=weight_offset, **parts(width, how.split), num_warps=how.num_warps,
        )  # fmt: skip
    return r, out1, out2


gated_residual_norm = define_op("torch_fuse::gated_residual_norm", _forward)


@gated_residual_norm.register_fake
def _fake(x: Tensor, y1: Tensor | None, y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None,
          weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None, bias2: Tensor | None,
          scale: Tensor | None, shift: Tensor | None, alphas: Sequence[float], norm: str, eps: float,
          weight_offset: float, outputs: int, r_dtype: torch.dtype, out_dtype: torch.dtype,
          write_r: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    t = Operands(x, y1, y2, gate1, gate2, weight1, bias1, weight2, bias2, scale, shift)
    spec = Spec(alphas, norm, eps, weight_offset, outputs, r_dtype, out_dtype, write_r)
    check(t, spec)
    return _outputs(t, spec)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    t, spec = Operands(*inputs[:OPERANDS]), Spec(*inputs[OPERANDS:])
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    ctx.dtypes = [None if x is None else x.dtype for x in t]
    ctx.shapes = [None if x is None else x.shape for x in t]
    ctx.y_dtypes = [t.x.dtype if y is None else y.dtype for y in (t.y1, t.y2)]
    ctx.recombine = t.y1 is not None and not spec.write_r  # nothing wrote r: the backward computes it once more
    # else a term is needed for the gradient of its gate only
    y1 = t.y1 if ctx.recombine or (t.gate1 is not None and ctx.needs_input_grad[3]) else None
    y2 = t.y2 if ctx.recombine or (t.gate2 is not None and ctx.needs_input_grad[4]) else None
    bias1 = t.bias1 if t.scale is not None and ctx.needs_input_grad[9] else None
    r = output[0] if spec.write_r else t.x
    ctx.save_for_backward(r, y1, y2, t.gate1, t.gate2, t.weight1, bias1, t.weight2, t.scale)


def _backward(ctx: Any, grad_r: Tensor | None, grad_1: Tensor | None, grad_2: Tensor | None) -> tuple[Any, ...]:
    spec, wanted = ctx.spec, list(ctx.needs_input_grad[:OPERANDS])
    grad_r = grad_r if spec.write_r else None
    grad_2 = grad_2 if spec.outputs == 2 else None
    if grad_r is None and grad_1 is None and grad_2 is None:
        return (None,) * (OPERANDS + len(spec))
    if grad_2 is None:
        wanted[7] = wanted[8] = False
    r, y1, y2, gate1, gate2, weight1, bias1, weight2, scale = ctx.saved_tensors
    if ctx.recombine:
        r = combine(Operands(r, y1, y2, gate1, gate2, *[None] * 6), spec)
    if grad_1 is None:  # rare: nothing uses the first norm
        grad_1 = torch.zeros_like(r, dtype=spec.out_dtype)
    shift_shape = list(ctx.shapes[10]) if wanted[10] else None
    grads = list(gated_residual_norm_backward(
        grad_r, grad_1, grad_2, r, y1, y2, gate1, gate2, weight1, bias1, weight2, scale, list(spec.alphas),
        spec.norm, spec.eps, spec.weight_offset, ctx.dtypes[0], *ctx.y_dtypes, wanted, shift_shape,
    ))  # fmt: skip
    for i, (alpha, gate) in enumerate(zip(spec.alphas, (gate1, gate2), strict=True), 1):
        if same_gradient(alpha, gate, ctx.dtypes[i], ctx.dtypes[0]):
            grads[i] = grads[0]
    if shift_shape is not None and not sums(shift_shape):
        grads[10] = summed(grad_1, shift_shape)
    return *(grad.to(dtype) if need else None for grad, need, dtype in zip(grads, wanted, ctx.dtypes, strict=True)), *[
        None
    ] * len(spec)


gated_residual_norm.register_autograd(_backward, setup_context=_save_for_backward)
