"""A norm and the linear layers that read it, for a few rows: each weight is streamed once, the norm costs nothing.

    out_j = activation_j(norm_j(x) @ W_j^T + b_j)                     # one, two or three linear layers
    out = activation(norm(x) @ W_0^T + b_0) * (norm(x) @ W_1^T + b_1)   # gated
    norm_j(x) = (x - mean) / sqrt(var + eps) * (w_j + weight_offset) + c_j      # layer; rms: no mean; none: x

The statistics are the same for all norms of one x, so norms that differ in their weights share a launch: GPT-NeoX's
QKV and MLP-up projections. For one row (or fp32) a program keeps the normalised row in registers and streams rows of
the weights past it; for more rows of a half type one launch writes the normalised rows and another multiplies them on
tensor cores.

- x [..., K], 1 to 8 rows; bf16, fp16, fp32. Weights [N_j, K], contiguous, K a multiple of 16 and at most 8192.
- biases [N_j] or None, norm_weights and norm_biases [K] or None: one for each weight; copied unless contiguous.
- norm: "layer", "rms", "none". activations: names joined by commas, of "none", "gelu", "gelu_tanh", "silu".
- gated: two weights of one shape give one result; the norm's weight and bias and the activation are the first's.
- early: the launch may begin before the one before it has ended (programmatic dependent launch). The weights, biases,
  norm_weights and norm_biases must then be written by nothing on the stream since two launches before.
- Returns a list of [..., N_j]: fp32 arithmetic, rounded once (several rows: after the norm too). No gradient.
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

from ._calls import Call, Calls
from ._gemv_common import ACTIVATIONS, activated, dense, launch_options, no_kernel, span, starts_early
from ._gemv_rows import normalise
from ._norm_linear_kernels import row_kernel, rows_kernel
from ._ops import INTERPRETED, define_opaque_op, triton
from ._qk_common import acc_dtype, require
from ._qk_tile import pow2

MAX_WIDTH, MAX_WEIGHTS = 8192, 3
NORMS = ("none", "layer", "rms")


class Config(NamedTuple):
    """For one row: rows of a weight that a program takes at once, its warps, how many programs there are (0: one for
    each block), tiles on their way to a program that has several, bytes of each row that it asks for before its turn,
    at most how many registers of a thread where elements are of two bytes.
    """

    block_n: int
    num_warps: int
    programs: int = 0
    stages: int = 3
    ahead: int = 2048
    maxnreg: int | None = None


class RowsConfig(NamedTuple):
    """For several rows: a tile of a weight, its columns being those of one warp, warps, tiles on their way."""

    block_n: int
    block_k: int
    num_warps: int
    stages: int


def config(width: int, gated: bool) -> Config:
    """For rows of `width` elements; benchmarks/decode.py --sweep tries others."""
    if width <= 1024:
        return Config(8, 4)
    if gated or width > 4096:
        return Config(2, 4)
    return Config(4, 4, maxnreg=96)  # five programs on a multiprocessor, not four


def rows_config(width: int) -> RowsConfig:
    """For several rows of `width` elements."""
    return RowsConfig(16, 64, 4, 4)


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
              weight_offset: float, activations: str, gated: bool, early: bool = False) -> list[Tensor]:  # fmt: skip
    """The op in plain torch, with its arguments: fp32, but where the op rounds several normalised rows."""
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
        if norm != "none" and x.numel() > x.shape[-1]:
            h = h.to(x.dtype).to(dtype)
        y = F.linear(h, weight.to(dtype), None if bias is None else bias.to(dtype))
        outputs.append(activated(y, name))
    if gated:
        outputs = [outputs[0] * outputs[1]]
    return [y.to(x.dtype) for y in outputs]


def _shares(sizes: list[int], chosen: Config) -> list[int]:
    """How many programs each weight gets: one for each block, or a part of `programs` by its rows."""
    blocks = [triton.cdiv(n, chosen.block_n) for n in sizes]
    if chosen.programs == 0 or chosen.programs >= sum(blocks):
        return blocks
    return [max(min(count, round(chosen.programs * count / sum(blocks))), 1) for count in blocks]


_calls = Calls()


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
             norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
             weight_offset: float, activations: str, gated: bool, early: bool = False) -> list[Tensor]:  # fmt: skip
    given = (x, *weights, *biases, *norm_weights, *norm_biases)
    lists = (weights, biases, norm_weights, norm_biases)
    options = (norm, eps, weight_offset, activations, gated, early)
    return _calls.make(given, (*options, *map(len, lists), config, rows_config), _first, x, *lists, *options)


def _first(call: Call, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
           norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
           weight_offset: float, activations: str, gated: bool, early: bool) -> list[Tensor]:  # fmt: skip
    """The first call of its kind."""
    _check(x, weights, biases, norm_weights, norm_biases, norm, activations, gated)
    uneven = any((v is None) != (w[0] is None) for w in (norm_weights, norm_biases) for v in w)
    if uneven or supports(x, weights) is not None:
        return reference(x, weights, biases, norm_weights, norm_biases, norm, eps, weight_offset, activations, gated)
    biases, norm_weights, norm_biases = (dense(vectors) for vectors in (biases, norm_weights, norm_biases))
    outputs = [call.empty((*x.shape[:-1], w.shape[0]), x.dtype) for w in (weights[:1] if gated else weights)]
    given = (weights, biases, norm_weights, norm_biases, norm, eps, weight_offset, activations.split(","))
    if x.numel() == x.shape[-1] or x.dtype == torch.float32:
        _row(call, x.contiguous(), *given, gated, outputs, starts_early(x, early))
    else:
        _rows(call, x.contiguous(), *given, gated, outputs)
    return outputs


def _row(call: Call, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
         norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
         weight_offset: float, names: list[str], gated: bool, outputs: list[Tensor], early: bool) -> None:  # fmt: skip
    width, chosen = int(x.shape[-1]), config(int(x.shape[-1]), gated)
    shares = _shares([int(y.shape[-1]) for y in outputs], chosen)
    once = sum(shares) == sum(_shares([int(y.shape[-1]) for y in outputs], chosen._replace(programs=0)))
    arguments: list[Any] = [x, eps, weight_offset]
    for j in range(MAX_WEIGHTS):
        i = j if j < len(weights) else 0
        arguments += [weights[i], _or(biases[i], x), _or(norm_weights[i], x), _or(norm_biases[i], x)]
        used = j < len(outputs)
        arguments += [outputs[j], outputs[j].shape[-1], shares[j]] if used else [x, 0, 0]
    ahead = min(chosen.ahead, width * x.element_size())
    limit = {"maxnreg": chosen.maxnreg} if chosen.maxnreg and x.element_size() == 2 and not torch.version.hip else {}
    call.launch(row_kernel, sum(shares), arguments, {
        "WEIGHTS": len(outputs), **_kinds(biases, names), "M": x.numel() // width, "K": width, "KP": pow2(width),
        "NORM": norm, "SCALED": norm_weights[0] is not None, "SHIFTED": norm_biases[0] is not None, "GATED": gated,
        "BLOCK_N": chosen.block_n, "STAGES": 1 if once else 0 if INTERPRETED else max(chosen.stages, 2),
        "AHEAD": ahead, "LINES": pow2(-(-ahead // 128)), "EARLY": early, "num_warps": chosen.num_warps,
        **launch_options(early), **limit,
    })  # fmt: skip


def _rows(call: Call, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
          norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
          weight_offset: float, names: list[str], gated: bool, outputs: list[Tensor]) -> None:  # fmt: skip
    width = int(x.shape[-1])
    count = x.numel() // width
    norms = list(zip(norm_weights, norm_biases, strict=True))[: len(outputs)]
    same = all(w is norms[0][0] and b is norms[0][1] for w, b in norms)
    different = norms[:1] if same else norms
    inputs = [x]
    if norm != "none" or norms[0] != (None, None):
        inputs = call.rows(call.empty((len(different), count, width), x.dtype))
        vectors = [_or(v, x) for pair in (*different, *[different[0]] * (MAX_WEIGHTS - len(different))) for v in pair]
        call.launch(normalise, len(different) * count, [x, eps, weight_offset, *vectors, inputs[0], count], {
            "K": width, "KP": pow2(width), "NORM": norm, "SCALED": norms[0][0] is not None,
            "SHIFTED": norms[0][1] is not None, "num_warps": 4 if width <= 2048 else 8,
        })  # fmt: skip
    chosen = rows_config(width)
    tiles = [triton.cdiv(int(y.shape[-1]), chosen.block_n) for y in outputs]
    arguments: list[Any] = []
    for j in range(MAX_WEIGHTS):
        i = j if j < len(weights) else 0
        arguments += [inputs[j] if j < len(inputs) else inputs[0], weights[i], _or(biases[i], x)]
        arguments += [outputs[j], outputs[j].shape[-1]] if j < len(outputs) else [x, 0]
        arguments += [tiles[j] if j < len(tiles) else 0] if j < MAX_WEIGHTS - 1 else []
    call.launch(rows_kernel, sum(tiles), arguments, {
        "WEIGHTS": len(outputs), **_kinds(biases, names), "M": count, "MP": max(pow2(count), 8), "K": width,
        "GATED": gated, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k, "PARTS": chosen.num_warps,
        "SPAN": span(width, chosen.num_warps), "STAGES": chosen.stages, "WIDE": INTERPRETED,
        "num_warps": chosen.num_warps,
    })  # fmt: skip


def _kinds(biases: Sequence[Tensor | None], names: list[str]) -> dict[str, Any]:
    at = [j if j < len(names) else 0 for j in range(MAX_WEIGHTS)]
    return {f"BIASED{j}": biases[i] is not None for j, i in enumerate(at)} | {
        f"ACTIVATION{j}": names[i] for j, i in enumerate(at)
    }


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    """An argument that the kernel does not read has to be some tensor."""
    return other if given is None else given


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
          norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None], norm: str, eps: float,
          weight_offset: float, activations: str, gated: bool, early: bool = False) -> list[Tensor]:  # fmt: skip
    _check(x, weights, biases, norm_weights, norm_biases, norm, activations, gated)
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in (weights[:1] if gated else weights)]


norm_linear_gemv = define_opaque_op("torch_fuse::norm_linear_gemv", _forward, _fake)
