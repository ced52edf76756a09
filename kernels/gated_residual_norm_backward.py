"""The gradient of gated_residual_norm, of all its tensors in one pass over the rows.

    g     = grad_1, times (1 + scale);  dscale = sum of grad_1 * h_1;  dshift = sum of grad_1
    dx_hat = sum_j g_j * (weight_j + weight_offset);  dweight_j = sum of g_j * x_hat;  dbias_j = sum of g_j
    layer: dr = grad_r + rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))
    rms:   dr = grad_r + rstd * (dx_hat - x_hat * mean(dx_hat * x_hat))
    dx    = dr;  dy_i = alpha_i * gate_i * dr;  dgate_i = sum of alpha_i * y_i * dr

- grad_r, grad_2: None where nothing used that result. grad_1, grad_2, grad_r: [B, S, C] of any strides.
- r: the forward's; x_hat and rstd are computed again from it. y1, y2: only for the gradient of a gate.
- wanted: for x, y1, y2, gate1, gate2, weight1, bias1, weight2, bias2, scale, shift: whether its gradient is asked.
- shift_shape: the shift's shape, where its gradient is asked.
- Returns eleven gradients in that order, dr in x_dtype and the terms' in theirs; an empty tensor for what is not
  asked, for a term whose gradient is dr itself, and for a shift that is not broadcast (it is grad_1 itself).
  fp32 arithmetic. Sums over rows are one partial row a program and a second reduction: no atomics, the same bits in
  each run; they are returned in fp32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._gated_residual_norm_common import DTYPES, MAX_WIDTH, Spec, normalise, strides
from ._gated_residual_norm_rows import backward_kernel
from ._gated_residual_norm_tile import Config, parts
from ._ops import define_op, no_triton, on_device_of, wrap_triton

# Programs that share the rows, each with a partial sum of its own.
PROGRAMS = 264
NAMES = ("x", "y1", "y2", "gate1", "gate2", "weight1", "bias1", "weight2", "bias2", "scale", "shift")


def config(width: int) -> Config:
    """How rows of `width` lanes are computed: about 8 lanes a thread, for the sums that stay in registers too."""
    warps = 4
    while warps < 16 and width >= 512 * warps:
        warps *= 2
    return Config(warps)


def sums(shape: Sequence[Any]) -> bool:
    """Whether the gradient of a factor [B, S, C] of this shape is a sum over positions."""
    return bool(shape[1] == 1)


def same_gradient(alpha: float, gate: Tensor | None, y_dtype: torch.dtype | None, x_dtype: torch.dtype) -> bool:
    """Whether the gradient of a term is dr itself."""
    return alpha == 1 and gate is None and y_dtype == x_dtype


def _whole(shape: Sequence[Any], batch: Any) -> bool:
    """Whether a factor of this shape has a value for each element."""
    return bool(shape[0] == batch and shape[1] != 1 and shape[2] != 1)


def summed(full: Tensor, shape: Sequence[Any]) -> Tensor:
    """The sum of [B, S, C] or [B, S, 1] down to a factor's shape."""
    dims = [i for i in range(3) if shape[i] == 1]
    return full if _whole(shape, full.shape[0]) else full.sum(dims, keepdim=True)


def _reference(grad_r: Tensor | None, grad_1: Tensor, grad_2: Tensor | None, r: Tensor, y1: Tensor | None,
               y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None, weight1: Tensor | None,
               bias1: Tensor | None, weight2: Tensor | None, scale: Tensor | None, alphas: Sequence[float],
               norm: str, eps: float, weight_offset: float, x_dtype: torch.dtype, y1_dtype: torch.dtype,
               y2_dtype: torch.dtype, wanted: Sequence[bool],
               shift_shape: Sequence[int] | None) -> list[Tensor | None]:  # fmt: skip
    double = torch.float64 in (r.dtype, grad_1.dtype, x_dtype)
    dtype = torch.float64 if double else torch.float32
    spec = Spec(alphas, norm, eps, weight_offset, 1, r.dtype, grad_1.dtype, False)
    x_hat, rstd = normalise(r.to(dtype), spec)
    found: list[Tensor | None] = [None] * len(NAMES)
    g = grad_1.to(dtype)
    if shift_shape is not None and sums(shift_shape):
        found[10] = summed(g, shift_shape)
    if scale is not None:
        if wanted[9]:
            h = x_hat if weight1 is None else x_hat * (weight1.to(dtype) + weight_offset)
            h = h if bias1 is None else h + bias1.to(dtype)
            found[9] = summed(g * h, scale.shape)
        g = g * (1 + scale.to(dtype))
    dx_hat = torch.zeros_like(x_hat)
    for g_j, weight, at in ((g, weight1, 5), (None if grad_2 is None else grad_2.to(dtype), weight2, 7)):
        if g_j is not None:
            found[at] = (g_j * x_hat).sum((0, 1)) if wanted[at] else None
            found[at + 1] = g_j.sum((0, 1)) if wanted[at + 1] else None
            dx_hat = dx_hat + (g_j if weight is None else g_j * (weight.to(dtype) + weight_offset))
    inner = x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    if norm == "layer":
        inner = inner + dx_hat.mean(-1, keepdim=True)
    dr = rstd * (dx_hat - inner)
    dr = dr if grad_r is None else dr + grad_r.to(dtype)
    terms = ((y1, gate1, y1_dtype), (y2, gate2, y2_dtype))
    for i, (alpha, (y, gate, y_dtype)) in enumerate(zip(alphas, terms, strict=True), 1):
        if wanted[i] and not same_gradient(alpha, gate, y_dtype, x_dtype):
            found[i] = alpha * dr if gate is None else alpha * dr * gate.to(dtype)
        if wanted[i + 2] and gate is not None and y is not None:
            found[i + 2] = summed(alpha * dr * y.to(dtype), gate.shape)
    found[0] = dr
    like = _dtypes(r, gate1, gate2, scale, x_dtype, y1_dtype, y2_dtype)
    return [None if x is None else x.to(like[i]).contiguous() for i, x in enumerate(found)]


def _dtypes(r: Tensor, gate1: Tensor | None, gate2: Tensor | None, scale: Tensor | None, x_dtype: torch.dtype,
            y1_dtype: torch.dtype, y2_dtype: torch.dtype) -> list[torch.dtype]:  # fmt: skip
    """The dtypes of the gradients: of sums, that of the arithmetic."""
    total = torch.float64 if r.dtype == torch.float64 else torch.float32
    factors = [total if x is None or not _whole(x.shape, r.shape[0]) else x.dtype for x in (gate1, gate2, scale)]
    return [x_dtype, y1_dtype, y2_dtype, *factors[:2], *[total] * 4, factors[2], total]


def _partials(like: Tensor, programs: Any, asked: Sequence[bool]) -> list[Tensor | None]:
    """Memory for one partial row a program, for each sum that is asked."""
    width = like.shape[2]
    return [like.new_empty((programs, width), dtype=torch.float32) if a else None for a in asked]


def _kind(wanted: bool, factor: Tensor | None) -> str:
    """How the gradient of a gate or scale leaves the kernel: partial sums, a number a row, or all of it."""
    if not wanted or factor is None:
        return "none"
    if factor.shape[2] == 1:
        return "row"
    return "sum" if sums(factor.shape) else "full"


def _over_programs(partial: Tensor | None, groups: Any, shape: Sequence[Any]) -> Tensor | None:
    """[groups * programs, C] summed to [B or 1, 1, C]."""
    if partial is None:
        return None
    if shape[0] == 1:
        return partial.sum(0).view(1, 1, -1)
    return partial.view(groups, -1, partial.shape[1]).sum(1, keepdim=True)


def _backward(grad_r: Tensor | None, grad_1: Tensor, grad_2: Tensor | None, r: Tensor, y1: Tensor | None,
              y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None, weight1: Tensor | None,
              bias1: Tensor | None, weight2: Tensor | None, scale: Tensor | None, alphas: Sequence[float],
              norm: str, eps: float, weight_offset: float, x_dtype: torch.dtype, y1_dtype: torch.dtype,
              y2_dtype: torch.dtype, wanted: Sequence[bool], shift_shape: Sequence[int] | None,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                         Tensor]:  # fmt: skip
    arguments = (grad_r, grad_1, grad_2, r, y1, y2, gate1, gate2, weight1, bias1, weight2, scale, alphas, norm, eps,
                 weight_offset, x_dtype, y1_dtype, y2_dtype, wanted, shift_shape)  # fmt: skip
    rows = r.shape[0] * r.shape[1]
    run = _reference if rows == 0 or _no_kernel(*arguments[:12]) is not None else _launch
    like = _dtypes(r, gate1, gate2, scale, x_dtype, y1_dtype, y2_dtype)
    found = [r.new_empty(0, dtype=like[i]) if x is None else x for i, x in enumerate(run(*arguments))]
    dr, dy1, dy2, dg1, dg2, dw1, db1, dw2, db2, ds, dt = found
    return dr, dy1, dy2, dg1, dg2, dw1, db1, dw2, db2, ds, dt


def _no_kernel(*tensors: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors, or None."""
    r = tensors[3]
    assert r is not None
    if reason := no_triton(r):
        return reason
    if not 8 <= r.shape[2] <= MAX_WIDTH or r.shape[2] % 8:
        return f"C is {r.shape[2]}"
    for x in tensors:
        if x is not None and (x.dtype not in DTYPES or (x.shape[-1] != 1 and x.stride(-1) != 1)):
            return f"a tensor of {x.dtype} with last stride {x.stride(-1)}"
    return None


def _launch(grad_r: Tensor | None, grad_1: Tensor, grad_2: Tensor | None, r: Tensor, y1: Tensor | None,
            y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None, weight1: Tensor | None,
            bias1: Tensor | None, weight2: Tensor | None, scale: Tensor | None, alphas: Sequence[float],
            norm: str, eps: float, weight_offset: float, x_dtype: torch.dtype, y1_dtype: torch.dtype,
            y2_dtype: torch.dtype, wanted: Sequence[bool],
            shift_shape: Sequence[int] | None) -> list[Tensor | None]:  # fmt: skip
    batch, length, width = r.shape
    how = config(int(width))
    found: list[Tensor | None] = [None] * len(NAMES)
    found[0] = dr = r.new_empty(r.shape, dtype=x_dtype)
    kinds = [_kind(wanted[at], x) for at, x in ((3, gate1), (4, gate2), (9, scale))]
    for i, (gate, dtype) in enumerate(((gate1, y1_dtype), (gate2, y2_dtype)), 1):
        if wanted[i] and not same_gradient(alphas[i - 1], gate, dtype, x_dtype):
            found[i] = r.new_empty(r.shape, dtype=dtype)
    for at, kind, x in zip((3, 4, 9), kinds, (gate1, gate2, scale), strict=True):
        if kind == "row":
            found[at] = r.new_empty((batch, length, 1), dtype=torch.float32)
        elif kind == "full":
            found[at] = r.new_empty(r.shape, dtype=x.dtype if _whole(x.shape, batch) else torch.float32)  # type: ignore[union-attr]
    shift_sums = shift_shape is not None and sums(shift_shape)
    summed_shapes: list[Any] = [
        x.shape for x, kind in zip((gate1, gate2, scale), kinds, strict=True) if kind == "sum" and x is not None
    ]
    summed_shapes += [shift_shape] if shift_sums else []
    # sums for each sample: its rows are shared by programs of its own
    groups = batch if any(shape[0] != 1 for shape in summed_shapes) else 1
    group_rows = length if groups is batch else batch * length
    programs = max(PROGRAMS // groups, 1) if isinstance(groups, int) else 16
    if isinstance(group_rows, int):  # a minimum with a symbolic number of rows would be a guard
        programs = min(programs, group_rows)
    asked = (wanted[5], wanted[6], wanted[7] and grad_2 is not None, wanted[8] and grad_2 is not None,
             *(kind == "sum" for kind in kinds), shift_sums)  # fmt: skip
    partials = _partials(r, groups * programs, asked)
    with on_device_of(r):
        wrap_triton(backward_kernel)[(groups * programs,)](
            grad_r, *strides(grad_r), grad_1, *strides(grad_1), grad_2, *strides(grad_2), r, *strides(r),
            y1, *strides(y1), y2, *strides(y2), gate1, *strides(gate1), gate2, *strides(gate2),
            weight1, bias1, weight2, scale, *strides(scale),
            dr, *(None if kind == "sum" else x for kind, x in zip(("", "", *kinds), (*found[1:5], found[9]),
                                                                 strict=True)),
            *partials, group_rows, programs, length,
            ALPHA1=float(alphas[0]), ALPHA2=float(alphas[1]), LANES1=gate1 is None or gate1.shape[2] != 1,
            LANES2=gate2 is None or gate2.shape[2] != 1, DGATE1=kinds[0], DGATE2=kinds[1], DSCALE=kinds[2],
            LAYER=norm == "layer", EPS=eps, OFFSET=weight_offset, **parts(int(width), how.split),
            num_warps=how.num_warps,
        )  # fmt: skip
    for at, partial in zip((5, 6, 7, 8), partials[:4], strict=True):
        found[at] = None if partial is None else partial.sum(0)
    for at, partial, x in zip((3, 4, 9), partials[4:7], (gate1, gate2, scale), strict=True):
        if partial is not None:
            found[at] = _over_programs(partial, groups, x.shape)  # type: ignore[union-attr]
        elif found[at] is not None:
            found[at] = summed(found[at], x.shape)  # type: ignore[arg-type,union-attr]
    if shift_shape is not None:
        found[10] = _over_programs(partials[7], groups, shift_shape)
    return found


gated_residual_norm_backward = define_op("torch_fuse::gated_residual_norm_backward", _backward)


@gated_residual_norm_backward.register_fake
def _fake(grad_r: Tensor | None, grad_1: Tensor, grad_2: Tensor | None, r: Tensor, y1: Tensor | None,
          y2: Tensor | None, gate1: Tensor | None, gate2: Tensor | None, weight1: Tensor | None,
          bias1: Tensor | None, weight2: Tensor | None, scale: Tensor | None, alphas: Sequence[float],
          norm: str, eps: float, weight_offset: float, x_dtype: torch.dtype, y1_dtype: torch.dtype,
          y2_dtype: torch.dtype, wanted: Sequence[bool], shift_shape: Sequence[int] | None,
          ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                     Tensor]:  # fmt: skip
    width = r.shape[2]
    shapes: list[Any] = [r.shape, *[None] * 10]
    for i, (alpha, gate, dtype) in enumerate(zip(alphas, (gate1, gate2), (y1_dtype, y2_dtype), strict=True), 1):
        shapes[i] = r.shape if wanted[i] and not same_gradient(alpha, gate, dtype, x_dtype) else None
    for at, factor in ((3, gate1), (4, gate2), (9, scale)):
        shapes[at] = factor.shape if wanted[at] and factor is not None else None
    shapes[5:9] = [(width,) if wanted[at] and (at < 7 or grad_2 is not None) else None for at in range(5, 9)]
    shapes[10] = shift_shape if shift_shape is not None and sums(shift_shape) else None
    dtypes = _dtypes(r, gate1, gate2, scale, x_dtype, y1_dtype, y2_dtype)
    found = [r.new_empty(0 if n is None else n, dtype=d) for n, d in zip(shapes, dtypes, strict=True)]
    dr, dy1, dy2, dg1, dg2, dw1, db1, dw2, db2, ds, dt = found
    return dr, dy1, dy2, dg1, dg2, dw1, db1, dw2, db2, ds, dt
