"""Attention in 8 bits: INT8 for the scores, FP8 for the weights and the values. Lossy; only where it is asked for.

    out = softmax(q @ k.T * scale) @ v, to about 4 % (the error's norm by the result's), cosine 0.9993

`_quantise` says what is rounded and how, `_hopper_quantised` how it is multiplied; docs/notes/quantised_attention.md
has the errors. After SageAttention2 (Zhang et al., arXiv:2411.10958).

- q [B, H, S_q, D]; k, v [B, H_kv, S_k, D], H a multiple of H_kv: each key head serves H / H_kv query heads.
  bfloat16 and float16 on a GPU with FP8 (compute capability 8.9 and later), D in `HEAD_DIMS`, last stride 1; the rest
  by `reference`, which rounds likewise.
- is_causal: query i attends to keys 0 to i; needs S_q == S_k.
- scale: factor of the scores.
- Returns [B, H, S_q, D] in q's dtype, as the transpose of a contiguous [B, S_q, H, D]. What reads anything not finite
  is NaN, and the rest of its head may be: statistics are a head's, scales a tile's.
- Gradients are those of the exact attention, computed anew from q, k and v as they are (straight-through).
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> q, k, v = torch.randn(3, 1, 2, 5, 64).unbind(0)
    >>> quantised_attention(q, k, v, True, 64**-0.5).stride()
    (640, 64, 128, 1)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse._compat import likely

from . import _hopper_quantised, _quantise, _quantised_flash
from ._attention_arguments import DTYPES, check_heads, refusal, require
from ._flash import output
from ._ops import INTERPRETED, Launch, define_opaque_op, on_device_of

HEAD_DIMS = tuple(_quantise.LANES)
TILE = 128  # keys, of the reference
_TWO_GROUPS = _hopper_quantised.Config(programs=1)
HOPPER = dict.fromkeys(HEAD_DIMS, _TWO_GROUPS)


def supports_device(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton has no backend for device {device.type!r}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU has no FP8 (NVIDIA, compute capability 8.9 and later)"
    return None


def supports(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Why no kernel can take these arguments (the op then runs its reference), or None."""
    return supports_device(q.device) or refusal(q, k, v, scale, HEAD_DIMS, 1)


def hopper_config(q: Tensor) -> _hopper_quantised.Config | None:
    """How Hopper's kernel runs, or None for the one in plain Triton."""
    on_hopper = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) == (9, 0)
    return HOPPER[int(q.shape[3])] if on_hopper and not _hopper_quantised.MISSING else None


def _hadamard(like: Tensor) -> Tensor:
    h = like.new_ones(1, 1)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127)


def reference(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The op in plain torch, rounding as the kernels do, in fp32 (float64 for float64 inputs); without gradient."""
    (batch, heads, q_length, dim), kv, length = q.shape, k.shape[1], k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q5, k, v = q.to(dtype).reshape(batch, kv, heads // kv, q_length, dim), k.to(dtype), v.to(dtype)
    k = k - k.mean(2, keepdim=True)
    ratio = k.square().sum(2).add(1e-20).log2() - q5.square().mean((2, 3)).mul(length).add(1e-20).log2()
    balance = (ratio / 4).round().clamp(-12, 12).exp2()[:, :, None]
    pad = (0, -dim % 32)
    q5, k = F.pad(q5 * balance[:, :, None], pad), F.pad(k / balance, pad)
    q5, k = (x.unflatten(-1, (-1, 32)).matmul(_hadamard(x)).flatten(-2) for x in (q5, k))
    q_scale = q5.abs().amax(-1, keepdim=True).clamp_min(1e-15) / 127
    q8, q_scale = _rounded(q5, q_scale), q_scale * (scale * _quantise.LOG2_E / 32)
    row = torch.arange(q_length, device=q.device)[:, None]
    total = acc = q5.new_zeros(())
    unit = top = q5.new_full((), -math.inf)
    for first in range(0, length, TILE):
        keys, values = k[:, :, None, first : first + TILE], v[:, :, None, first : first + TILE]
        k_scale = keys.abs().amax((-2, -1), keepdim=True).clamp_min(1e-15) / 127
        scores = (q8 @ _rounded(keys, k_scale).mT) * (q_scale * k_scale)
        if is_causal:
            later = first + torch.arange(keys.shape[3], device=q.device) > row
            scores = scores.masked_fill(later, -math.inf)
        largest = scores.amax(-1, keepdim=True)
        top = torch.maximum(largest, top)
        new_unit = torch.maximum(largest, top - 24)
        safe = new_unit.masked_fill(new_unit == -math.inf, 0)
        weights = (scores - safe).exp2() * 448
        v_scale = values.abs().amax((-2, -1), keepdim=True).clamp_min(1e-15) / 448
        values = (values / v_scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype) * v_scale
        decay = (unit - safe).exp2()
        total = total * decay + weights.sum(-1, keepdim=True)
        acc = acc * decay + weights.clamp_max(448).to(torch.float8_e4m3fn).to(dtype) @ values
        unit = new_unit
    out = (acc / total).reshape(q.shape).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    check_heads("quantised_attention", q, k, v)
    same = not is_causal or q.shape[2] == k.shape[2]
    require(same, "quantised_attention", "k.shape[2]", k.shape[2], f"q's {q.shape[2]} when is_causal")
    require(not likely(k.shape[2] == 0), "quantised_attention", "k.shape[2]", k.shape[2], "1 and more")


# By everything but the tensors' data: how many keys a tile and queries a program, and the launches.
_launches: dict[tuple[Any, ...], tuple[int, int, list[Launch]]] = {}


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    alike = [(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in (q, k, v)]
    key = (is_causal, scale, *alike)
    known = _launches.get(key)
    if known is None:
        return _first(key, q, k, v, is_causal, scale)
    tile, rows, (sample, quantise, attend) = known
    out, to, found = output(q), _quantise.empty(q, k, tile, rows), _quantise.statistics(q, k)
    with on_device_of(q):
        sample.again(q, k, v, found)
        quantise.again(q, k, v, found, *to)
        _attend_again(attend, q, to, out)
    return out.transpose(1, 2)


def _attend_again(attend: Launch, q: Tensor, to: _quantise.Quantised, out: Tensor) -> None:
    if hopper_config(q) is None:
        attend.again(*to, out)
        return
    parts = 2 if _hopper_quantised.PARTS[q.shape[3]][1] else 1
    attend.again(*[x for x in (to.q8, to.k8, to.v8) for _ in range(parts)], to.q_scale, to.kv_scale, out)


def _first(key: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The first call of its kind."""
    _check(q, k, v, is_causal)
    out = output(q)
    if q.numel() == 0:
        return out.transpose(1, 2)
    if supports(q, k, v, is_causal, scale) is not None:
        return reference(q, k, v, is_causal, scale)
    if len(_launches) == 1024:
        _launches.clear()
    config = hopper_config(q)
    tile = _quantised_flash.TILE if config is None else config.block_n
    rows = _quantised_flash.BLOCK_M if config is None else 64 * config.groups
    to, found = _quantise.empty(q, k, tile, rows), _quantise.statistics(q, k)
    with on_device_of(q):
        made = [Launch(*call) for call in _quantise.calls(q, k, v, scale, tile, found, to)]
        if config is None:
            made.append(Launch(_quantised_flash.kernel, *_quantised_flash.call(q, k, is_causal, to, out)))
        else:
            arguments = _hopper_quantised.call(q, k, is_causal, config, to, out)
            made.append(Launch(_hopper_quantised.kernel, *arguments))
    _launches[key] = tile, rows, made
    return out.transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    return output(q).transpose(1, 2)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By PyTorch's FlashAttention on a GPU, written out elsewhere: an op's body cannot ask autograd."""
    (batch, kv, length, dim), group = k.shape, q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    if q.is_cuda and q.dtype in DTYPES and q.numel():
        ops = torch.ops.aten
        out, *saved = ops._scaled_dot_product_flash_attention(q, keys, values, 0.0, is_causal, False, scale=scale)
        lse, starts_q, starts_k, max_q, max_k, seed, offset, _ = saved
        dq, dk, dv = ops._scaled_dot_product_flash_attention_backward(
            grad, q, keys, values, out, lse, starts_q, starts_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=scale
        )
    else:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        g, queries, keys, values = (x.to(dtype) for x in (grad, q, keys, values))
        scores = queries @ keys.mT * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        weights = scores.softmax(-1)
        dv = weights.mT @ g
        d_weights = g @ values.mT
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        dq, dk = d_scores @ keys, d_scores.mT @ queries
    dk, dv = (x.reshape(batch, kv, group, length, dim).sum(2) for x in (dk, dv))
    dq, dk, dv = (output(x).copy_(found.transpose(1, 2)).transpose(1, 2) for x, found in ((q, dq), (k, dk), (v, dv)))
    return dq, dk, dv


def _fake_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (output(x).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


quantised_attention_backward = define_opaque_op("torch_fuse::quantised_attention_backward", _gradients, _fake_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*quantised_attention_backward(grad, *ctx.saved_tensors, ctx.is_causal, ctx.scale), None, None)


quantised_attention = define_opaque_op("torch_fuse::quantised_attention", _forward, _fake, _backward, _setup)
