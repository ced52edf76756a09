"""A linear layer and its combination with a skip: one kernel, the combination in the product's epilogue.

    linear = y @ weight^T + bias
    out    = alpha * a * x + beta * b * linear        mode "sum"
    out    = lerp(x, linear, beta * b)                mode "lerp":      from x to linear
    out    = lerp(linear, x, beta * b)                mode "lerp_back": from linear to x
    out    = x + beta * b * (linear - x)              modes "step" and, from linear to x, "step_back"

The skip combination of consistency models (Song et al., arXiv:2303.01469: c_skip(t) * x + c_out(t) * F(x)) and gated
residuals. On Hopper, in 16 bits, the product is `_hopper_gemm`'s; else, and where its memory engine cannot read the
operands, a tiled one of Triton's tutorials. Both have fp32 sums, combined before the only rounding.

- y [..., K]: as many rows as x, in their order, last stride 1. weight [N, K]: either stride 1. bias [N] or None.
  y, weight and bias are of one dtype: fp32 (without TF32), bf16 or fp16; fp64 is left to the reference.
- x: [B, S, N] or [S, N], last stride 1, other strides as they are, of any of these dtypes.
- a, b: any that broadcast to x (one number a sample, a token, a channel, or all), any strides, or None for 1.
- a_of, b_of: functions that a and b are taken through first, as text (`_pointwise`): c_skip(t) of t itself.
- alpha, beta: numbers. Where a coefficient is 0 the product with 0 stays in: inf and NaN come through.
- one_pass: the gradient reads what its sums and products share in one pass (`linear_skip_backward`), where it can.
- save_linear: also return the linear layer's result, in y's dtype, for the gradient of b; without it that gradient
  computes the product once more.
- Returns (out in out_dtype, contiguous in x's shape; linear in x's shape or empty).
- Gradients of y, weight, bias, x, a, b: plain torch, whose products Inductor gives to the GEMM library.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> y, weight, x, t = torch.ones(1, 2, 16), torch.ones(16, 16), torch.zeros(1, 2, 16), torch.tensor([[[0.5]]])
    >>> out, _ = linear_skip(y, weight, None, x, None, t, 1.0, 1.0, "sum", False, torch.float32)
    >>> float(out[0, 0, 0])
    8.0
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _hopper_gemm, _linear_skip_hopper
from ._linear_skip_common import (
    Operands,
    Spec,
    acc_dtype,
    check,
    coefficient,
    combine,
    evaluated,
    into_coefficient,
    no_kernel,
    scaled,
    slopes,
    summed,
)
from ._linear_skip_hopper import kind, rank3, strides
from ._linear_skip_tile import kernel
from ._ops import define_op, define_opaque_op, on_device_of, triton, wrap_triton
from .linear_skip_backward import gradients, why_not

OPERANDS = len(Operands._fields)


class Config(NamedTuple):
    """A tile of rows, columns and the summed dimension, warps, stages, tiles in a group, x read before the product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    early: bool = False


# From the largest tile on, and how many of them an SM should get. The best of benchmarks/results/linear_skip.jsonl are
# 128 x 128 for 32,768 rows of 768 lanes, where two share an SM, and 64 x 128 for 4,096 rows of 512.
CONFIGS = (Config(128, 128, 64, 4, 3), Config(64, 128, 64, 4, 4, early=True), Config(64, 64, 64, 4, 4),
           Config(64, 32, 64, 4, 4), Config(32, 32, 64, 2, 4))  # fmt: skip
TILES = (4, 1, 1, 1, 1)
WIDE = Config(64, 64, 32, 4, 2)  # fp32 goes without tensor cores
PROGRAMS = 120  # about as many as an H100 or H200 has SMs


def config(rows: Any, columns: int, dtype: torch.dtype) -> Config:
    """The largest tile that gives every SM enough; benchmarks/bench_linear_skip.py --sweep tries others.

    A symbolic number of rows takes the first: a comparison would be a guard.
    """
    if dtype == torch.float32:
        return WIDE
    if not isinstance(rows, int):
        return CONFIGS[0]
    for found, tiles in zip(CONFIGS, TILES, strict=True):
        if -(-rows // found.block_m) * -(-columns // found.block_n) >= tiles * PROGRAMS:
            return found
    return CONFIGS[-1]


def supports(t: Operands, spec: Spec) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    return no_kernel(t, spec)


def reference(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, a: Tensor | None, b: Tensor | None,
              alpha: float, beta: float, mode: str, save_linear: bool,
              out_dtype: torch.dtype, a_of: str = "x", b_of: str = "x",
              one_pass: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in plain torch, with its arguments: differentiable, compilable, float64 for float64 inputs."""
    t = Operands(y, weight, bias, x, a, b)
    dtype = acc_dtype(t)
    linear = F.linear(y, weight, bias).reshape(x.shape)
    one, two = coefficient(a, alpha, dtype, a_of), coefficient(b, beta, dtype, b_of)
    out = combine(x.to(dtype), linear.to(dtype), one, two, mode)
    out = out.to(out_dtype).contiguous()
    return out, linear.detach().clone() if save_linear else y.new_empty(0)


def unmeasured(t: Operands, spec: Spec) -> str | None:
    """Why the call is not like those measured to win (benchmarks/results/linear_skip_hopper.jsonl), or None."""
    reason = _linear_skip_hopper.cannot_take(t, spec)
    if reason is not None:
        return reason
    full = any(c is not None and kind(rank3(c)) == "full" for c in (t.a, t.b))
    return "a coefficient has a value for each sample or token and lane" if full else None


def _results(t: Operands, spec: Spec) -> tuple[Tensor, Tensor]:
    out = t.x.new_empty(t.x.shape, dtype=spec.out_dtype)
    return out, t.y.new_empty(t.x.shape if spec.save_linear else 0)


def _forward(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, a: Tensor | None, b: Tensor | None,
             alpha: float, beta: float, mode: str, save_linear: bool,
             out_dtype: torch.dtype, a_of: str = "x", b_of: str = "x",
             one_pass: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, spec = Operands(y, weight, bias, x, a, b), Spec(alpha, beta, mode, save_linear, out_dtype, a_of, b_of)
    check(t, spec)
    if supports(t, spec) is not None:
        return reference(*t, *spec)  # type: ignore[arg-type]
    if _linear_skip_hopper.cannot_take(t, spec) is None:
        return hopper_linear_skip(*t, *spec)
    return _tiled(t, spec)


def _tiled(t: Operands, spec: Spec) -> tuple[Tensor, Tensor]:
    """By Triton's kernel."""
    t, spec = evaluated(t, spec)
    out, linear = _results(t, spec)
    columns, inner = int(t.weight.shape[0]), int(t.weight.shape[1])
    flat, whole = t.y.reshape(-1, inner), rank3(t.x)
    rows = whole.shape[0] * whole.shape[1]
    if rows == 0:
        return out, linear
    how = config(rows, columns, t.y.dtype)
    one, two = (None if c is None else rank3(c) for c in (t.a, t.b))
    vector = None if t.bias is None else t.bias.contiguous()
    with on_device_of(t.x):
        wrap_triton(kernel)[(triton.cdiv(rows, how.block_m) * triton.cdiv(columns, how.block_n),)](
            flat, flat.stride(0), t.weight, t.weight.stride(0), t.weight.stride(1), vector, whole,
            *strides(whole)[:2], one, *strides(one), two, *strides(two), out, linear if spec.save_linear else None,
            float(spec.alpha), float(spec.beta), rows, whole.shape[1], N=columns, K=inner, A=kind(one), B=kind(two),
            MODE=spec.mode, ONE_A=spec.alpha == 1, ONE_B=spec.beta == 1, EARLY=how.early, BLOCK_M=how.block_m,
            BLOCK_N=how.block_n, BLOCK_K=how.block_k, GROUP=how.group, num_warps=how.num_warps,
            num_stages=how.num_stages,
        )  # fmt: skip
    return out, linear


# Tiles of Hopper's kernel in place of the chosen ones, or False: none of it. For benchmarks.
hopper_config: _hopper_gemm.Config | bool | None = None


def _by_either(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, a: Tensor | None, b: Tensor | None,
               alpha: float, beta: float, mode: str, save_linear: bool,
               out_dtype: torch.dtype, a_of: str = "x", b_of: str = "x",
               one_pass: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, spec = Operands(y, weight, bias, x, a, b), Spec(alpha, beta, mode, save_linear, out_dtype, a_of, b_of)
    if hopper_config is not False and x.numel() > 0:
        out, linear = _results(t, spec)
        how = None if isinstance(hopper_config, bool) else hopper_config
        if _linear_skip_hopper.launch(t, spec, out, linear if save_linear else None, how):
            return out, linear
    return _tiled(t, spec)


def _by_either_fake(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, a: Tensor | None, b: Tensor | None,
                    alpha: float, beta: float, mode: str, save_linear: bool,
                    out_dtype: torch.dtype, a_of: str = "x", b_of: str = "x",
                    one_pass: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(Operands(y, weight, bias, x, a, b), Spec(alpha, beta, mode, save_linear, out_dtype, a_of, b_of))


hopper_linear_skip = define_opaque_op("torch_fuse::hopper_linear_skip", _by_either, _by_either_fake)


linear_skip = define_op("torch_fuse::linear_skip", _forward)


@linear_skip.register_fake
def _fake(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, a: Tensor | None, b: Tensor | None,
          alpha: float, beta: float, mode: str, save_linear: bool,
          out_dtype: torch.dtype, a_of: str = "x", b_of: str = "x",
          one_pass: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, spec = Operands(y, weight, bias, x, a, b), Spec(alpha, beta, mode, save_linear, out_dtype, a_of, b_of)
    check(t, spec)
    return _results(t, spec)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    t, spec = Operands(*inputs[:OPERANDS]), Spec(*inputs[OPERANDS:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.dtype, ctx.y_shape = spec, acc_dtype(t), t.y.shape
    ctx.dtypes = [None if x is None else x.dtype for x in t]
    _, into_weight, _, into_x, into_a, into_b = ctx.needs_input_grad[:OPERANDS]
    # b's gradient is a sum of grad * linear. Saved, linear costs the forward a write and this pass a read, less than
    # the product that it took, and unfused graphs save it, too.
    ctx.recompute = into_b and not spec.save_linear
    x = t.x if into_a or (into_b and spec.mode != "sum") else None
    # A gradient that is differentiated itself needs the product as a function of y, weight and bias.
    y = t.y if into_weight or into_b else None
    bias = t.bias if into_b else None
    a = t.a if into_x or into_a else None
    ctx.save_for_backward(y, t.weight, bias, x, a, t.b, output[1] if into_b and spec.save_linear else None)


def _backward(ctx: Any, grad: Tensor | None, _linear: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (OPERANDS + len(ctx.spec))
    y, weight, bias, x, a, b, linear = ctx.saved_tensors
    spec, (into_y, into_weight, into_bias, into_x, into_a, into_b) = ctx.spec, ctx.needs_input_grad[:OPERANDS]
    wide, again = grad.to(ctx.dtype), torch.is_grad_enabled()
    by_x, by_linear = slopes(
        coefficient(a, spec.alpha, ctx.dtype, spec.a_of), coefficient(b, spec.beta, ctx.dtype, spec.b_of), spec.mode
    )
    if into_b and (ctx.recompute or again):
        linear = F.linear(y, weight, bias).reshape(grad.shape)
    found: list[Tensor | None] = [None] * OPERANDS
    found[3] = scaled(wide, by_x) if into_x else None
    flat: Tensor | None = None
    shared, wanted = (grad, x, linear, a, b, spec), (into_bias, into_a, into_b)
    one = spec.one_pass and not again and ctx.dtype == torch.float32  # the pass has no gradient of its own
    if one and (into_y or into_weight) and why_not(*shared, wanted) is None:
        flat, found[2], found[4], found[5] = gradients(*shared, wanted, weight.dtype)
    else:
        if into_y or into_weight or into_bias:
            full = scaled(wide, by_linear)
            flat, found[2] = full.to(weight.dtype), summed(full, full.shape[-1:]) if into_bias else None
        if into_a:
            found[4] = into_coefficient(wide * x, a, spec.alpha, spec.a_of)
        if into_b:
            towards = linear.to(ctx.dtype)
            if spec.mode != "sum":
                towards = x - towards if spec.mode.endswith("back") else towards - x
            found[5] = into_coefficient(wide * towards, b, spec.beta, spec.b_of)
    if flat is not None:
        flat = flat.reshape(-1, weight.shape[0])
        found[0] = (flat @ weight).reshape(ctx.y_shape) if into_y else None
        found[1] = flat.t() @ y.reshape(-1, weight.shape[1]) if into_weight else None
    return *(None if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)), *[None] * len(
        spec
    )


linear_skip.register_autograd(_backward, setup_context=_save_for_backward)
