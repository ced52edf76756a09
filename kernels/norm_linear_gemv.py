"""A norm and the linear layers that read it, for a few rows: each weight is streamed once, the norm costs nothing.

    out_j = activation_j(norm_j(x) @ W_j^T + b_j)                     # one, two or three linear layers
    out = activation(norm(x) @ W_0^T + b_0) * (norm(x) @ W_1^T + b_1)   # gated
    norm_j(x) = (x - mean) / sqrt(var + eps) * (w_j + weight_offset) + c_j      # layer; rms: no mean; none: x

The statistics are the same for all norms of one x, so norms that differ in their weights share a launch: GPT-NeoX's
QKV and MLP-up projections. A program keeps the normalised row in registers and streams rows of the weights past it.

- x [..., K], 1 to 8 rows; bf16, fp16, fp32. Weights [N_j, K], contiguous, K a multiple of 16 and at most 8192.
- biases [N_j] or None, norm_weights and norm_biases [K] or None: one for each weight.
- norm: "layer", "rms", "none". activations: names joined by commas, of "none", "gelu", "gelu_tanh", "silu".
- gated: two weights of one shape give one result; the norm's weight and bias and the activation are the first's.
- Returns a list of [..., N_j]: fp32 arithmetic, rounded once. No gradient.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> x, w = torch.ones(1, 16), torch.ones(4, 16)
    >>> norm_linear_gemv(x, [w], [None], [None], [None], "rms", 0.0, 0.0, "none", False)[0]
    tensor([[16., 16., 16., 16.]])
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gemv_common import ACTIVATIONS, activate, activated, no_kernel, rows_of
from ._ops import define_op, on_device_of, tl, triton, wrap_triton
from ._qk_common import acc_dtype, require
from ._qk_tile import pow2

MAX_WIDTH, MAX_WEIGHTS = 8192, 3
NORMS = ("none", "layer", "rms")


class Config(NamedTuple):
    """Rows of a weight that a program takes at once, its warps, how many programs there are (0: one for each block)."""

    block_n: int
    num_warps: int
    programs: int


def config(width: int, gated: bool) -> Config:
    """For rows of `width` elements; benchmarks/decode.py --sweep tries others."""
    if width <= 1024:
        return Config(8, 4, 0)
    return Config(2 if gated or width > 4096 else 4, 4, 0)


def supports(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why the Triton kernel cannot take the inputs (the op then runs its reference), or None."""
    if x.shape[-1] > MAX_WIDTH:
        return f"the input has {x.shape[-1]} columns; allowed: up to {MAX_WIDTH}"
    if len(weights) > MAX_WEIGHTS:
        return f"there are {len(weights)} weights; allowed: up to {MAX_WEIGHTS}"
    return no_kernel(x, list(weights))


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
           norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, activations: str,
           gated: bool) -> None:  # fmt: skip
    def need(ok: bool, argument: str, value: object, allowed: str) -> None:
        require("norm_linear_gemv", ok, argument, value, allowed)

    count = len(weights)
    need(count > 0, "weights", count, "at least one")
    for name, given in (("biases", biases), ("norm_weights", norm_weights), ("norm_biases", norm_biases)):
        need(len(given) == count, f"len({name})", len(given), f"one for each of {count} weights, or None")
    need(norm in NORMS, "norm", repr(norm), ", ".join(NORMS))
    names = activations.split(",")
    need(len(names) == count and set(names) <= set(ACTIVATIONS), "activations", repr(activations),
         f"{count} names of {', '.join(ACTIVATIONS)}, joined by commas")  # fmt: skip
    width = x.shape[-1]
    for weight, bias in zip(weights, biases, strict=True):
        need(weight.dim() == 2 and weight.shape[1] == width, "weight.shape", tuple(weight.shape), f"[N, {width}]")
        need(bias is None or bias.shape == weight.shape[:1], "bias", "another shape", f"[{weight.shape[0]}]")
    for vector in (*norm_weights, *norm_biases):
        need(vector is None or vector.shape == (width,), "norm weight or bias", "another shape", f"[{width}]")
    need(not gated or (count == 2 and weights[0].shape == weights[1].shape), "gated", gated,
         "False, or two weights of one shape")  # fmt: skip


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
              norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
              weight_offset: float, activations: str, gated: bool) -> list[Tensor]:  # fmt: skip
    """The op in plain torch, with its arguments: fp32 inside the norm and between the norm and the activation."""
    dtype = acc_dtype(x)
    wide = x.to(dtype)
    if norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    if norm != "none":
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    outputs = []
    names = activations.split(",")
    if gated:
        norm_weights, norm_biases = [norm_weights[0]] * 2, [norm_biases[0]] * 2
    for weight, bias, scale, shift, name in zip(weights, biases, norm_weights, norm_biases, names, strict=True):
        h = wide if scale is None else wide * (scale.to(dtype) + weight_offset)
        h = h if shift is None else h + shift.to(dtype)
        y = F.linear(h, weight.to(dtype), None if bias is None else bias.to(dtype))
        outputs.append(activated(y, name))
    if gated:
        outputs = [outputs[0] * outputs[1]]
    return [y.to(x.dtype) for y in outputs]


@triton.jit
def _normalised(x, k, scale, shift, eps, offset, K: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr,
                SHIFTED: tl.constexpr):  # fmt: skip
    """One row in fp32, normalised; zeros past its end."""
    y = tl.load(x + k, k < K, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = tl.where(k < K, y - tl.sum(y, 0) / K, 0.0)
    if NORM != "none":
        y = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    if SCALED:
        y = y * (tl.load(scale + k, k < K, other=0.0).to(tl.float32) + offset)
    if SHIFTED:
        y = y + tl.load(shift + k, k < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _tile(weight, n, k, N, K: tl.constexpr):
    return tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], (n < N)[:, None] & (k < K)[None, :], other=0.0,
                   eviction_policy="evict_first")  # fmt: skip


@triton.jit
def _dot(tile, y, bias, n, N, BIASED: tl.constexpr):
    found = tl.sum(tile.to(tl.float32) * y[None, :], 1)
    if BIASED:
        found += tl.load(bias + n, n < N, other=0.0).to(tl.float32)
    return found


@triton.jit
def _block(block, tile, gate_tile, y0, x, bias, other_bias, scale, shift, out, N, k, eps, offset, M: tl.constexpr,
           K: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
           OTHER_BIASED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
           BLOCK_N: tl.constexpr):  # fmt: skip
    """BLOCK_N rows of a weight times all rows of x; y0 is the first row of x, normalised."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    for m in tl.static_range(M):
        y = y0
        if m > 0:
            y = _normalised(x + m * K, k, scale, shift, eps, offset, K, NORM, SCALED, SHIFTED)
        found = activate(_dot(tile, y, bias, n, N, BIASED), ACTIVATION)
        if GATED:
            found = found * _dot(gate_tile, y, other_bias, n, N, OTHER_BIASED)
        tl.store(out + m * N + n, found.to(out.dtype.element_ty), n < N)


@triton.jit
def _share(first, programs, x, weight, bias, other, other_bias, scale, shift, out, N, eps, offset, M: tl.constexpr,
           K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
           BIASED: tl.constexpr, OTHER_BIASED: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
           BLOCK_N: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """A program's share of one weight: the blocks first, first + programs, ...; the next is read ahead."""
    k, col = tl.arange(0, KP), tl.arange(0, BLOCK_N)
    tile = _tile(weight, first * BLOCK_N + col, k, N, K)  # on its way while the norm is computed
    gate_tile = tile
    if GATED:
        gate_tile = _tile(other, first * BLOCK_N + col, k, N, K)
    y0 = _normalised(x, k, scale, shift, eps, offset, K, NORM, SCALED, SHIFTED)
    if ONCE:
        _block(first, tile, gate_tile, y0, x, bias, other_bias, scale, shift, out, N, k, eps, offset, M, K, NORM,
               SCALED, SHIFTED, BIASED, OTHER_BIASED, GATED, ACTIVATION, BLOCK_N)  # fmt: skip
    else:
        block = first
        while block * BLOCK_N < N:
            following = (block + programs) * BLOCK_N + col
            next_tile = _tile(weight, following, k, N, K)
            next_gate_tile = next_tile
            if GATED:
                next_gate_tile = _tile(other, following, k, N, K)
            _block(block, tile, gate_tile, y0, x, bias, other_bias, scale, shift, out, N, k, eps, offset, M, K, NORM,
                   SCALED, SHIFTED, BIASED, OTHER_BIASED, GATED, ACTIVATION, BLOCK_N)  # fmt: skip
            tile, gate_tile = next_tile, next_gate_tile
            block += programs


@triton.jit
def _kernel(x, eps, offset, w0, b0, s0, c0, out0, n0, p0, w1, b1, s1, c1, out1, n1, p1, w2, b2, s2, c2, out2, n2, p2,
            WEIGHTS: tl.constexpr, BIASED0: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr,
            ACTIVATION0: tl.constexpr, ACTIVATION1: tl.constexpr, ACTIVATION2: tl.constexpr, M: tl.constexpr,
            K: tl.constexpr, KP: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
            GATED: tl.constexpr, BLOCK_N: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """The first p0 programs stream w0, the next p1 w1, the last p2 w2."""
    eps, offset = tl.cast(eps, tl.float32), tl.cast(offset, tl.float32)  # Inductor passes Python floats as float64
    program = tl.program_id(0)
    if program < p0:
        _share(program, p0, x, w0, b0, w1, b1, s0, c0, out0, n0, eps, offset, M, K, KP, NORM, SCALED, SHIFTED, BIASED0,
               BIASED1, GATED, ACTIVATION0, BLOCK_N, ONCE)  # fmt: skip
    if WEIGHTS > 1:  # noqa: SIM102  # one decided when compiling, one when running
        if (program >= p0) & (program < p0 + p1):
            _share(program - p0, p1, x, w1, b1, w1, b1, s1, c1, out1, n1, eps, offset, M, K, KP, NORM, SCALED, SHIFTED,
                   BIASED1, False, False, ACTIVATION1, BLOCK_N, ONCE)  # fmt: skip
    if WEIGHTS > 2:  # noqa: SIM102
        if program >= p0 + p1:
            _share(program - p0 - p1, p2, x, w2, b2, w2, b2, s2, c2, out2, n2, eps, offset, M, K, KP, NORM, SCALED,
                   SHIFTED, BIASED2, False, False, ACTIVATION2, BLOCK_N, ONCE)  # fmt: skip


def _shares(sizes: list[int], chosen: Config) -> list[int]:
    """How many programs each weight gets: one for each block, or a part of `programs` by its rows."""
    blocks = [triton.cdiv(n, chosen.block_n) for n in sizes]
    if chosen.programs == 0 or chosen.programs >= sum(blocks):
        return blocks
    return [max(min(count, round(chosen.programs * count / sum(blocks))), 1) for count in blocks]


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
             norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
             weight_offset: float, activations: str, gated: bool) -> list[Tensor]:  # fmt: skip
    _check(x, weights, biases, norm_weights, norm_biases, norm, activations, gated)
    uneven = any((v is None) != (w[0] is None) for w in (norm_weights, norm_biases) for v in w)
    if uneven or supports(x, weights) is not None:
        return reference(x, weights, biases, norm_weights, norm_biases, norm, eps, weight_offset, activations, gated)
    rows, width = rows_of(x), int(x.shape[-1])
    chosen, names = config(width, gated), activations.split(",")
    outputs = [x.new_empty(*x.shape[:-1], w.shape[0]) for w in (weights[:1] if gated else weights)]
    shares = _shares([int(y.shape[-1]) for y in outputs], chosen)
    arguments: dict[str, Any] = {}
    for j in range(MAX_WEIGHTS):
        i = j if j < len(weights) else 0
        arguments |= {
            f"w{j}": weights[i], f"b{j}": _or(biases[i], x), f"s{j}": _or(norm_weights[i], x),
            f"c{j}": _or(norm_biases[i], x), f"out{j}": outputs[j] if j < len(outputs) else rows,
            f"n{j}": outputs[j].shape[-1] if j < len(outputs) else 0,
            f"p{j}": shares[j] if j < len(shares) else 0, f"BIASED{j}": biases[i] is not None,
            f"ACTIVATION{j}": names[i],
        }  # fmt: skip
    with on_device_of(x):
        wrap_triton(_kernel)[(sum(shares),)](
            x=rows, eps=eps, offset=weight_offset, **arguments, WEIGHTS=len(outputs), M=rows.shape[0], K=width,
            KP=pow2(width), NORM=norm, SCALED=norm_weights[0] is not None, SHIFTED=norm_biases[0] is not None,
            GATED=gated, BLOCK_N=chosen.block_n, ONCE=chosen.programs == 0,
            num_warps=chosen.num_warps,
        )  # fmt: skip
    return outputs


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """An argument that the kernel does not read has to be some tensor."""
    return other if given is None else given


norm_linear_gemv = define_op("torch_fuse::norm_linear_gemv", _forward)


@norm_linear_gemv.register_fake
def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
          norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
          weight_offset: float, activations: str, gated: bool) -> list[Tensor]:  # fmt: skip
    _check(x, weights, biases, norm_weights, norm_biases, norm, activations, gated)
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in (weights[:1] if gated else weights)]


def _no_gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise NotImplementedError("norm_linear_gemv has no gradient; use torch.nn.functional.linear for training")


norm_linear_gemv.register_autograd(_no_gradient)
