"""GELU of a whole tensor in one kernel that is bound by memory: about 17 instructions an element, not 40.

    gelu(x) = x * cdf(x)
    "none":  cdf(x) = (1 + erf(x / sqrt(2))) / 2
    "tanh":  cdf(x) = sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3))
    backward: grad * (cdf(x) + x * cdf'(x))

Hendrycks & Gimpel (arXiv:1606.08415). For "none", with h = exp(-x^2 / 2) * Q(1 / (1 + p |x|)) for cdf(-|x|), the cdf is
h where x < 0 and 1 - h elsewhere: the form of Abramowitz & Stegun 7.1.26, whose relative error does not grow in the
negative tail, and which has no branches. p and Q's six coefficients minimise Q's largest relative error over
0 <= |x| <= 13.5 (behind it bfloat16 ends), by linear programming in float64 for each p and a search over p: 1.1e-5.
Over all bfloat16 and float16 inputs the largest relative error before rounding is 1.6e-5 ("tanh" 1e-6), while rounding
to float16 alone is up to 4.9e-4: a float16 result is within 0.52 units in the last place of float64's. Results
smaller than 1e-36 may become 0.

- x: any shape and strides, any floating dtype. The kernel takes bfloat16 and float16 that fill their memory
  (contiguous, or any permutation of it); the rest is left to `torch.nn.functional.gelu`.
- approximate: "none" or "tanh".
- Returns gelu(x) with x's shape and dtype and the strides of `torch.nn.functional.gelu`: fp32 arithmetic, rounded once.
  -inf gives NaN and inf gives inf, as in PyTorch on CUDA and in float64.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]), "none")
    tensor([-0.1587,  0.0000,  0.8413])
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import INTERPRETED, define_op, no_triton, on_device_of, tl, triton, wrap_triton

# Elements of one program, and its warps; benchmarks/bench_gelu.py --sweep tries others.
BLOCK, NUM_WARPS = 2048, 4
APPROXIMATE = ("none", "tanh")


def supports(x: Tensor) -> str | None:
    """Why the Triton kernel cannot take x (the op then runs its reference), or None."""
    reason = no_triton(x)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {x.dtype}; allowed: bfloat16, float16"
    if not (x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)):
        return f"x has gaps or overlaps in memory: strides {tuple(x.stride())} of shape {tuple(x.shape)}"
    return None


def reference(x: Tensor, approximate: str) -> Tensor:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    return F.gelu(x, approximate=approximate)


def _check(approximate: str) -> None:
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate is {approximate!r}; allowed: {', '.join(APPROXIMATE)}")


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:  # one MUFU; Triton's own division is five instructions
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)  # fmt: skip
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        return 1.0 / x


@triton.jit
def _cdf_erf(x, PTX: tl.constexpr):
    """The normal distribution's cdf, and exp(-x^2 / 2)."""
    t = _reciprocal(tl.fma(tl.abs(x), 0.36048660, 1.0), PTX)
    q = tl.fma(t, -0.09902890, 0.25451642)
    q = tl.fma(t, q, 0.03494386)
    q = tl.fma(t, q, 0.16910969)
    q = tl.fma(t, q, 0.14025630)
    q = tl.fma(t, q, 0.00019704403)
    y = x * 0.84932180  # sqrt(log2(e) / 2); x * x would be exact, but costs one more product
    e = tl.exp2(-(y * y))
    h = q * e
    return tl.where(x < 0, h, 1.0 - h), e


@triton.jit
def _cdf_tanh(x, PTX: tl.constexpr):
    """sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)); the factors below are -log2(e) times its own."""
    z = x * tl.fma(x * x, -0.10294324, -2.3022082)
    return _reciprocal(1.0 + tl.exp2(z), PTX)


@triton.jit
def _forward_kernel(x, out, n, TANH: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    keep = lane < n - start
    v = tl.load(x + start + lane, keep, other=0.0).to(tl.float32)
    if TANH:
        cdf = _cdf_tanh(v, PTX)
    else:
        cdf, _ = _cdf_erf(v, PTX)
    tl.store(out + start + lane, (v * cdf).to(out.dtype.element_ty), keep)


@triton.jit
def _backward_kernel(grad, x, out, n, TANH: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    keep = lane < n - start
    g = tl.load(grad + start + lane, keep, other=0.0).to(tl.float32)
    v = tl.load(x + start + lane, keep, other=0.0).to(tl.float32)
    if TANH:
        cdf = _cdf_tanh(v, PTX)
        inner = tl.fma(v * v, 0.21406466, 1.5957691)  # 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * x^2)
        slope = tl.fma(v * (cdf * (1.0 - cdf)), inner, cdf)
    else:
        cdf, e = _cdf_erf(v, PTX)
        slope = tl.fma(v * e, 0.39894228, cdf)
    tl.store(out + start + lane, (g * slope).to(out.dtype.element_ty), keep)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], approximate: str) -> None:
    n = tensors[-1].numel()
    if n == 0:
        return
    ptx = not INTERPRETED and torch.version.hip is None
    with on_device_of(tensors[-1]):
        wrap_triton(kernel)[(triton.cdiv(n, BLOCK),)](
            *tensors, n, TANH=approximate == "tanh", PTX=ptx, BLOCK=BLOCK, num_warps=NUM_WARPS
        )


def _forward(x: Tensor, approximate: str) -> Tensor:
    _check(approximate)
    if supports(x) is not None:
        return reference(x, approximate)
    out = torch.empty_like(x)
    _launch(_forward_kernel, (x, out), approximate)
    return out


gelu = define_op("torch_fuse::gelu", _forward)


@gelu.register_fake
def _fake(x: Tensor, approximate: str) -> Tensor:
    _check(approximate)
    return reference(x, approximate)


def _backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    _check(approximate)
    if grad.shape != x.shape:
        raise ValueError(f"grad.shape is {tuple(grad.shape)}; allowed: x's {tuple(x.shape)}")
    if supports(x) is not None or grad.stride() != x.stride() or grad.dtype != x.dtype:
        return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    out = torch.empty_like(x)
    _launch(_backward_kernel, (grad, x, out), approximate)
    return out


gelu_backward = define_op("torch_fuse::gelu_backward", _backward)


@gelu_backward.register_fake
def _backward_fake(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    _check(approximate)
    return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return gelu_backward(grad, x, ctx.approximate), None


gelu.register_autograd(_gradient, setup_context=_save_for_backward)
