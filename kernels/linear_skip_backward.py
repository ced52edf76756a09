"""What linear_skip's gradient reads all of, in one pass: the gradient for the products, and the sums.

    scaled = beta * b * grad          modes "sum", "lerp" and "step"; (1 - beta * b) * grad for "lerp_back", "step_back"
    bias   = sums of scaled over all rows;  a = sums of grad * x;  b = sums of grad * towards
    towards = linear (mode "sum"), linear - x ("lerp", "step"), x - linear ("lerp_back", "step_back")

Taken apart, grad is read four times. Here a program takes some rows of one sample and some lanes, and leaves one
partial sum of each kind, in fp32: whoever calls adds them up. No atomics: the same bits in each run.

- grad [B, S, N]; x, linear likewise or None where no sum needs them; any strides, fp32, bf16 or fp16.
- b, b_of, beta, mode: as in linear_skip; b: what broadcasts to [B, S, N], or None.
- a_sums, b_sums: "none", "all": a sum for each sample, "lanes": for each sample and lane.
- biased: whether the bias's gradient is asked.
- parts: programs that share a sample's rows (`parts_of`).
- Returns scaled [B, S, N] in dtype, contiguous; bias [B * parts, N]; a and b: [B, parts * `tiles`] for "all",
  [B, parts, N] for "lanes"; an empty tensor for what is not asked. Has no gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._linear_skip_common import DTYPES, Spec, coefficient, slopes, through_coefficient
from ._linear_skip_hopper import kind, rank3, strides
from ._ops import define_opaque_op, launch, no_triton, on_device_of, tl, triton
from ._pointwise import IDENTITY, evaluate
from ._tile_pointwise import function


class Config(NamedTuple):
    """Rows of a tile, warps, and programs that the GPU should get."""

    block_m: int
    num_warps: int
    programs: int


# An H200 has 132 multiprocessors, each with room for four: 49 KB under way in each keep its memory busy.
CONFIG = Config(8, 4, 4 * 132)
# With fewer rows of a sample than these the partial sums would be a good part of what is read.
MIN_LENGTH = 64


def block_n(width: int) -> int:
    """Lanes of a program."""
    return 256 if width % 256 == 0 else 128


def tiles(width: int) -> int:
    """Programs that share a row."""
    return -(-width // block_n(width))


def parts_of(batch: Any, length: Any, width: int) -> int:
    """Programs that share a sample's rows: about 4 programs on a multiprocessor; 16 where sizes are symbolic."""
    if not isinstance(batch, int) or not isinstance(length, int):
        return 16
    return max(min(CONFIG.programs // max(batch * tiles(width), 1), -(-length // CONFIG.block_m)), 1)


def sums_of(shape: Any, rank: int) -> str | None:
    """Which sums the gradient of a coefficient of a shape is made of; None where it differs from row to row."""
    whole = [1] * (rank - len(shape)) + list(shape)
    if whole[-2] != 1:
        return None
    return "all" if whole[-1] == 1 else "lanes"


def added_up(parts: Tensor, shape: Any) -> Tensor:
    """A coefficient's gradient of a shape from the partial sums of each sample."""
    one = len(shape) < 3 or shape[0] == 1
    return parts.sum((0, 1) if one else 1).reshape(shape)


@triton.jit
def _factor(b, b_b, b_s, b_n, sample, s, n, keep_s, keep_n, beta, KIND: tl.constexpr, OF: tl.constexpr,
            ONE: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """The derivative by the linear layer's result, in fp32: [1 or rows, 1 or lanes]."""
    at = sample * b_b
    if KIND == "sample":
        found = function(tl.load(b + at + tl.arange(0, 1)).to(tl.float32), OF)[:, None]
    elif KIND == "row":
        found = function(tl.load(b + at + s * b_s, keep_s, other=0.0).to(tl.float32), OF)[:, None]
    elif KIND == "lane":
        found = function(tl.load(b + n * b_n, keep_n, other=0.0).to(tl.float32), OF)[None, :]
    elif KIND == "full":
        from_ = b + at + (s * b_s)[:, None] + (n * b_n)[None, :]
        found = tl.load(from_, keep_s[:, None] & keep_n[None, :], other=0.0).to(tl.float32)
    else:
        found = tl.full([1, 1], 1.0, tl.float32)
    if not ONE:
        found = found * tl.cast(beta, tl.float32)
    if BACK:
        found = 1.0 - found
    return found


@triton.jit
def _tile(pointer, stride_b, stride_s, stride_n, sample, s, n, keep):
    at = pointer + sample * stride_b + (s * stride_s)[:, None] + (n * stride_n)[None, :]
    return tl.load(at, keep, other=0.0).to(tl.float32)


@triton.jit
def _store_sums(to, total, part, tile, n, TILES: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr):
    if KIND == "all":
        tl.store(to + part * TILES + tile, tl.sum(tl.sum(total, 0), 0))
    elif KIND == "lanes":
        tl.store(to + part.to(tl.int64) * N + n, tl.sum(total, 0), n < N)


@triton.jit
def linear_skip_backward_kernel(
    grad, g_b, g_s, g_n, x, x_b, x_s, x_n, linear, l_b, l_s, l_n, b, b_b, b_s, b_n, scaled, of_bias, of_a, of_b, beta,
    length, parts, N: tl.constexpr, B: tl.constexpr, B_OF: tl.constexpr, MODE: tl.constexpr, ONE_B: tl.constexpr,
    BIASED: tl.constexpr, A_SUMS: tl.constexpr, B_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Part tl.program_id // TILES of B * parts, and a tile of lanes. B: how b is read."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BACK: tl.constexpr = MODE == "lerp_back" or MODE == "step_back"
    HOISTED: tl.constexpr = B != "row" and B != "full"
    part, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    sample, rows = (part // parts).to(tl.int64), tl.cdiv(length, parts)
    first = part % parts * rows
    last = tl.minimum(first + rows, length)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n = n.to(tl.int64)
    keep_n = n < N
    for_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for_a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for_b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HOISTED:
        factor = _factor(b, b_b, b_s, b_n, sample, n, n, keep_n, keep_n, beta, B, B_OF, ONE_B, BACK)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        keep_s, s = row < last, row.to(tl.int64)
        keep = keep_s[:, None] & keep_n[None, :]
        g = _tile(grad, g_b, g_s, g_n, sample, s, n, keep)
        if x is not None:
            skip = _tile(x, x_b, x_s, x_n, sample, s, n, keep)
        if linear is not None:
            towards = _tile(linear, l_b, l_s, l_n, sample, s, n, keep)
        if not HOISTED:
            factor = _factor(b, b_b, b_s, b_n, sample, s, n, keep_s, keep_n, beta, B, B_OF, ONE_B, BACK)
        value = g * factor
        at = scaled + sample * length * N + (s * N)[:, None] + n[None, :]
        tl.store(at, value.to(scaled.dtype.element_ty), keep)
        if BIASED:
            for_bias += tl.where(keep, value, 0.0)  # 0 times an infinite factor is no number
        if A_SUMS != "none":
            for_a += g * skip
        if B_SUMS != "none":
            if BACK:
                towards = skip - towards
            elif MODE != "sum":
                towards = towards - skip
            for_b += g * towards
    if BIASED:
        tl.store(of_bias + part.to(tl.int64) * N + n, tl.sum(for_bias, 0), keep_n)
    _store_sums(of_a, for_a, part, tile, n, TILES, N, A_SUMS)
    _store_sums(of_b, for_b, part, tile, n, TILES, N, B_SUMS)


def _results(grad: Tensor, dtype: torch.dtype, biased: bool, a_sums: str, b_sums: str, parts: int) -> list[Tensor]:
    batch, _, width = grad.shape
    shapes = {"none": (0,), "all": (batch, parts * tiles(int(width))), "lanes": (batch, parts, width)}
    sums = [(batch * parts, width) if biased else (0,), shapes[a_sums], shapes[b_sums]]
    return [grad.new_empty(grad.shape, dtype=dtype), *(grad.new_empty(n, dtype=torch.float32) for n in sums)]


def _read_as(b: Tensor | None) -> str:
    """How the kernel reads b [B, S, N]."""
    found = kind(b)
    return "sample" if found == "row" and b is not None and b.shape[1] == 1 else found


def _launch(grad: Tensor, x: Tensor | None, linear: Tensor | None, b: Tensor | None, beta: float, mode: str, b_of: str,
            dtype: torch.dtype, biased: bool, a_sums: str, b_sums: str,
            parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scaled, of_bias, of_a, of_b = _results(grad, dtype, biased, a_sums, b_sums, parts)
    batch, length, width = grad.shape
    if grad.numel() == 0:
        return scaled, of_bias.zero_(), of_a.zero_(), of_b.zero_()
    if no_triton(grad) is not None:
        return _reference(grad, x, linear, b, beta, mode, b_of, dtype, biased, a_sums, b_sums, parts)
    b = None if b is None else rank3(b)
    linear = linear if b_sums != "none" else None
    x = x if a_sums != "none" or (mode != "sum" and linear is not None) else None
    given = (grad, *grad.stride(), x, *_strides(x), linear, *_strides(linear), b, *strides(b), scaled,
             of_bias, of_a, of_b, float(beta), length, parts)  # fmt: skip
    constants = {
        "N": width, "B": _read_as(b), "B_OF": b_of, "MODE": mode, "ONE_B": beta == 1, "BIASED": biased,
        "A_SUMS": a_sums, "B_SUMS": b_sums, "BLOCK_M": CONFIG.block_m, "BLOCK_N": block_n(width),
        "num_warps": CONFIG.num_warps,
    }  # fmt: skip
    with on_device_of(grad):
        launch(linear_skip_backward_kernel, batch * parts * tiles(width), given, constants)
    return scaled, of_bias, of_a, of_b


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _reference(grad: Tensor, x: Tensor | None, linear: Tensor | None, b: Tensor | None, beta: float, mode: str,
               b_of: str, dtype: torch.dtype, biased: bool, a_sums: str, b_sums: str,
               parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op in plain torch: the first part of a sample's sums is all of it."""
    scaled, *sums = _results(grad, dtype, biased, a_sums, b_sums, parts)
    wide = grad.float()
    full = wide * slopes(1.0, coefficient(b, beta, torch.float32, b_of), mode)[1]
    towards = torch.zeros(()) if linear is None else linear.float()
    if mode != "sum" and x is not None:
        towards = x.float() - towards if mode.endswith("back") else towards - x.float()
    values = (full, wide if x is None else wide * x.float(), wide * towards)
    for total, value, of in zip(sums, values, ("lanes" if biased else "none", a_sums, b_sums), strict=True):
        if of != "none":
            each = value.sum(1) if of == "lanes" else value.sum((1, 2))[:, None]
            total.zero_().view(grad.shape[0], -1, each.shape[1])[:, 0] = each
    return scaled.copy_(full), sums[0], sums[1], sums[2]


def _fake(grad: Tensor, x: Tensor | None, linear: Tensor | None, b: Tensor | None, beta: float, mode: str, b_of: str,
          dtype: torch.dtype, biased: bool, a_sums: str, b_sums: str,
          parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    scaled, of_bias, of_a, of_b = _results(grad, dtype, biased, a_sums, b_sums, parts)
    return scaled, of_bias, of_a, of_b


linear_skip_backward = define_opaque_op("torch_fuse::linear_skip_backward", _launch, _fake)


class Gradients(NamedTuple):
    """Those of linear_skip that come from one pass: for the products [B, S, N], of the bias and of the coefficients."""

    scaled: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None


def why_not(grad: Tensor, x: Tensor | None, linear: Tensor | None, a: Tensor | None, b: Tensor | None, spec: Spec,
            wanted: Sequence[bool]) -> str | None:  # fmt: skip
    """Why one pass cannot have, or does not pay for, the gradients; installs no guard. Arguments: see `gradients`."""
    _, into_a, into_b = wanted
    if b is None and spec.beta == 1 and not spec.mode.endswith("back"):
        return "the products read the gradient as it is"
    if not any(wanted):
        return "there is no sum"
    for name, tensor in (("grad", grad), ("x", x), ("linear", linear), ("b", b)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name}.dtype is {tensor.dtype}"
    for name, tensor, asked in (("a", a, into_a), ("b", b, into_b)):
        if asked and tensor is not None and sums_of(tensor.shape, grad.dim()) is None:
            return f"{name} has a number for each row"
    length = grad.shape[-2]
    if isinstance(length, int) and length < MIN_LENGTH:
        return f"{length} rows a sample; it pays from {MIN_LENGTH} on"
    return None


def gradients(grad: Tensor, x: Tensor | None, linear: Tensor | None, a: Tensor | None, b: Tensor | None, spec: Spec,
              wanted: Sequence[bool], dtype: torch.dtype) -> Gradients:  # fmt: skip
    """Gradients of linear_skip from one pass over what they share, in fp32 but for the first.

    Args:
        grad: of the result, in its shape.
        x: the forward's, where a's gradient is asked, or b's of a lerp.
        linear: the product, where b's gradient is asked.
        a: the forward's, where its gradient is asked.
        b: the forward's.
        spec: the forward's options.
        wanted: whether the gradients of bias, a and b are asked.
        dtype: of the first.
    """
    into_bias, into_a, into_b = wanted
    whole = rank3(grad)
    a_sums, b_sums = (
        "none" if not asked or tensor is None else sums_of(tensor.shape, grad.dim()) or "none"
        for tensor, asked in ((a, into_a), (b, into_b))
    )
    given, of = b, spec.b_of
    if b is not None and of != IDENTITY and kind(rank3(b)) == "full":
        given, of = evaluate(of, b.float()), IDENTITY
    found, of_bias, of_a, of_b = linear_skip_backward(
        whole, *(None if z is None else rank3(z) for z in (x, linear, given)), spec.beta, spec.mode, of, dtype,
        into_bias, a_sums, b_sums, parts_of(whole.shape[0], whole.shape[1], int(whole.shape[2])),
    )  # fmt: skip
    return Gradients(
        found.reshape(grad.shape),
        of_bias.sum(0) if into_bias else None,
        through_coefficient(added_up(of_a, a.shape), a, spec.alpha, spec.a_of) if into_a and a is not None else None,
        through_coefficient(added_up(of_b, b.shape), b, spec.beta, spec.b_of) if into_b and b is not None else None,
    )
