"""What linear_skip's kernel, reference and gradient share in plain torch: options, checks, the combination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _pointwise
from ._ops import no_triton

MODES = ("sum", "lerp", "lerp_back", "step", "step_back")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """The tensors of linear_skip, in the op's order."""

    y: Tensor
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    a: Tensor | None
    b: Tensor | None


class Spec(NamedTuple):
    """The options of linear_skip, in the op's order."""

    alpha: float
    beta: float
    mode: str
    save_linear: bool
    out_dtype: torch.dtype
    a_of: str = _pointwise.IDENTITY
    b_of: str = _pointwise.IDENTITY
    one_pass: bool = False


def _require(ok: bool, argument: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"linear_skip: {argument} is {value}; allowed: {allowed}")


def _rows(x: Tensor) -> Any:
    """Number of rows of [..., C]."""
    count: Any = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def check(t: Operands, spec: Spec) -> None:
    """Raises ValueError for arguments that the op does not define."""
    _require(spec.mode in MODES, "mode", repr(spec.mode), ", ".join(MODES))
    _require(t.x.dim() in (2, 3), "x.shape", tuple(t.x.shape), "[B, S, N] or [S, N]")
    _require(t.weight.dim() == 2 and t.weight.shape[0] == t.x.shape[-1], "weight.shape", tuple(t.weight.shape),
             f"[{t.x.shape[-1]}, K]")  # fmt: skip
    rows, width = _rows(t.x), t.weight.shape[1]
    _require(t.y.dim() >= 2 and t.y.shape[-1] == width and _rows(t.y) == rows, "y.shape", tuple(t.y.shape),
             f"{rows} rows of {width}")  # fmt: skip
    if t.bias is not None:
        _require(t.bias.dim() == 1 and t.bias.shape[0] == t.x.shape[-1], "bias.shape", tuple(t.bias.shape),
                 f"[{t.x.shape[-1]}]")  # fmt: skip
    for name, like in (("weight", t.weight), ("bias", t.bias)):
        _require(like is None or like.dtype == t.y.dtype, f"{name}.dtype", None if like is None else like.dtype,
                 f"y's, {t.y.dtype}")  # fmt: skip
    for name, factor in (("a", t.a), ("b", t.b)):
        if factor is not None:
            sizes = list(zip(factor.shape[::-1], t.x.shape[::-1], strict=False))
            ok = factor.dim() <= t.x.dim() and all(n == 1 or n == m for n, m in sizes)
            _require(ok, f"{name}.shape", tuple(factor.shape), f"what broadcasts to x's {tuple(t.x.shape)}")
    for name, tensor in t._asdict().items():
        if tensor is not None:
            _require(tensor.is_floating_point(), f"{name}.dtype", tensor.dtype, "floating-point types")
            _require(tensor.device == t.x.device, f"{name}.device", tensor.device, f"x's, {t.x.device}")
    for name, program in (("a_of", spec.a_of), ("b_of", spec.b_of)):
        reason = _pointwise.problem(program)
        _require(reason is None, name, f"{program!r}: {reason}", "functions as `_pointwise` writes them")
    plain = t.a is None and spec.alpha == 1
    _require(spec.mode == "sum" or plain, "a or alpha", "given", "None and 1 but for the mode sum: b is the weight")


def no_kernel(t: Operands, spec: Spec) -> str | None:
    """Why the kernel cannot take these arguments, or None; installs no guard but on the weight's sizes."""
    if reason := no_triton(t.x):
        return reason
    for name, tensor in t._asdict().items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name}.dtype is {tensor.dtype}; allowed: fp32, bf16, fp16"
    if spec.out_dtype not in DTYPES:
        return f"out_dtype is {spec.out_dtype}; allowed: fp32, bf16, fp16"
    if t.weight.shape[1] % 16 or t.weight.shape[0] % 16:
        return f"the weight is {list(t.weight.shape)}; allowed: multiples of 16"
    for name, tensor in (("y", t.y), ("x", t.x)):
        if tensor.stride(-1) != 1:
            return f"{name}.stride(-1) is {tensor.stride(-1)}; allowed: 1"
    if t.weight.stride(0) != 1 and t.weight.stride(1) != 1:
        return f"the weight's strides are {t.weight.stride()}; allowed: one of them 1"
    return None


# -- in plain torch -------------------------------------------------------------------------------------------------


def acc_dtype(t: Operands) -> torch.dtype:
    """The dtype of the combination: float64 where x or y is, else float32."""
    return torch.float64 if torch.float64 in (t.x.dtype, t.y.dtype) else torch.float32


def coefficient(
    tensor: Tensor | None, number: float, dtype: torch.dtype, of: str = _pointwise.IDENTITY
) -> Tensor | float:
    """number * of(tensor), in a dtype."""
    if tensor is None:
        return number
    found = _pointwise.evaluate(of, tensor.to(dtype))
    return found if number == 1 else found * number


def evaluated(t: Operands, spec: Spec) -> tuple[Operands, Spec]:
    """The same combination with the coefficients' own values."""
    a, b = (
        None if tensor is None else tensor if of == _pointwise.IDENTITY else _pointwise.evaluate(of, tensor.float())
        for tensor, of in ((t.a, spec.a_of), (t.b, spec.b_of))
    )
    return t._replace(a=a, b=b), spec._replace(a_of=_pointwise.IDENTITY, b_of=_pointwise.IDENTITY)


def scaled(x: Tensor, by: Tensor | float) -> Tensor:
    """x * by; x itself for 1. For 0 the product stays: 0 * inf is NaN."""
    return x if isinstance(by, (int, float)) and by == 1 else x * by


def combine(x: Tensor, linear: Tensor, a: Tensor | float, b: Tensor | float, mode: str) -> Tensor:
    """The combination of two tensors of one dtype."""
    if mode == "sum":
        return scaled(x, a) + scaled(linear, b)
    start, end = (linear, x) if mode.endswith("back") else (x, linear)
    return torch.lerp(start, end, b) if mode.startswith("lerp") else start + b * (end - start)


def slopes(a: Tensor | float, b: Tensor | float, mode: str) -> tuple[Tensor | float, Tensor | float]:
    """Derivatives of the combination by x and by the linear layer's result."""
    if mode == "sum":
        return a, b
    return (b, 1 - b) if mode.endswith("back") else (1 - b, b)


def into_coefficient(full: Tensor, tensor: Tensor, number: float, of: str) -> Tensor:
    """The gradient of a coefficient's tensor, from that of its value at each element."""
    return through_coefficient(summed(full, tensor.shape), tensor, number, of)


def through_coefficient(found: Tensor, tensor: Tensor, number: float, of: str) -> Tensor:
    """The gradient of a coefficient's tensor, from that of the coefficient."""
    slope = _pointwise.slope(of, tensor.to(found.dtype))
    found = found if number == 1 else found * number
    return found if slope is None else found * slope


def summed(full: Tensor, shape: Sequence[Any]) -> Tensor:
    """The sum of a tensor down to a shape that broadcasts to its own."""
    lead = full.dim() - len(shape)
    dims = [*range(lead), *(lead + i for i, size in enumerate(shape) if size == 1)]
    return full.sum(dims, keepdim=True).reshape(shape) if dims else full
