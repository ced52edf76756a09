"""Attention over a band of keys and without padded keys: causal, sliding windows and padding masks, without the mask.

    keep[b, i, j] = (j >= i - left) & (j <= i + right) & key_keep[b, j]        None: no condition
    out = softmax(where(keep, q @ k.T * scale, -inf)) @ v;        zeros for a query that keeps no key

With a soft cap c, c * tanh(q @ k.T * scale / c) takes the place of the scores (Gemma 2). With sinks, a score of each
head joins the softmax whose weight goes to no value: exp(sink) is added to the denominator (gpt-oss).

What `scaled_dot_product_attention` computes with the dense boolean mask `keep`, which no one reads here: tiles outside
of the band or the kept keys are skipped. The forward and the backward pass are FlashAttention-2's (Dao,
arXiv:2307.08691), see `_flash` and `_flash_backward`; gradients are summed in a fixed order.

- q [B, H, S_q, D]; k, v [B, H_kv, S_k, D], H a multiple of H_kv: each key head serves H / H_kv query heads.
  bfloat16 and float16 on a GPU, D in `CONFIGS`, at least 64 keys, last stride 1 and other strides as they are; the
  rest is left to `torch.nn.functional.scaled_dot_product_attention` with the dense mask.
- key_keep: boolean [B, S_k] or [1, S_k], or None.
- key_range: `key_range(key_keep)`, to compute it once for many layers; None: computed here. Any other tensor gives
  wrong results.
- left, right: as above; a causal window of w keys is left = w - 1, right = 0. Either may be negative.
- scale: factor of the scores.
- softcap: c, or 0 for none. The kernels take up to `MAX_SOFTCAP`: their tanh has an error of 1e-6, scores have c times
  that.
- sinks: [H], in any floating-point dtype, or None; it has a gradient.
- Returns [B, H, S_q, D] in q's dtype, as the transpose of a contiguous [B, S_q, H, D], and the logarithm to base 2 of
  the sum of exp(scores), [B, H, S_q] in fp32, +inf where there is no score (for the backward pass; no gradient; the
  reference has zeros without soft cap and sinks).
- Values of keys that no query of a tile sees are not read: a NaN there does not spread, as zero times NaN would.
- Raises ValueError, naming the argument, its value and what is allowed.

Example:
    >>> q, k, v = torch.randn(3, 1, 2, 5, 32).unbind(0)
    >>> out, _ = masked_attention(q, k, v, torch.tensor([[True, True, True, True, False]]), None, 1, 0, 32**-0.5)
    >>> out.stride()
    (320, 32, 64, 1)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_arguments import check_heads, refusal, require
from ._calls import Call, Calls
from ._flash import Band, Config, attend, output
from ._flash_backward import backward
from ._ops import define_op, define_opaque_op

# Forward; gradients of keys and values; gradients of queries. benchmarks/bench_masked_attention.py sweeps others.
CONFIGS = {
    32: (Config(64, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    48: (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    64: (Config(64, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    80: (Config(64, 64, 4, 3), Config(64, 64, 8, 2), Config(64, 64, 4, 2)),
    96: (Config(64, 64, 4, 3), Config(64, 64, 8, 2), Config(64, 64, 4, 2)),
    128: (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    160: (Config(128, 64, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
    256: (Config(64, 64, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
}


# Scores up to here have an error below 1e-3, as weights rounded to bfloat16 or float16 have.
MAX_SOFTCAP = 1000.0


def supports(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, softcap: float = 0.0) -> str | None:
    """Why the Triton kernels cannot take these arguments (the op then runs its reference), or None."""
    if softcap > MAX_SOFTCAP:
        return f"softcap is {softcap}; allowed: up to {MAX_SOFTCAP:g}"
    least = CONFIGS[int(q.shape[3])][0].block_n if q.shape[3] in CONFIGS else 0
    return refusal(q, k, v, scale, CONFIGS, least)


def dense_mask(q: Tensor, k: Tensor, key_keep: Tensor | None, left: int | None, right: int | None) -> Tensor:
    """The mask written out: boolean, broadcastable to [B, H, S_q, S_k]."""
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    keep = i >= 0 if key_keep is None else key_keep[:, None, None, :]
    if left is not None:
        keep = keep & (j >= i - left)
    if right is not None:
        keep = keep & (j <= i + right)
    return keep.expand(*keep.shape[:-2], q.shape[2], k.shape[2])


def reference(
    q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None, left: int | None,
    right: int | None, scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    gqa = bool(q.shape[1] != k.shape[1])
    mask = dense_mask(q, k, key_keep, left, right)
    if softcap or sinks is not None:
        scores, _ = _scores(q, k, mask, scale, softcap)
        p, lse = _weights(scores, sinks)
        wide = (p @ v.to(p.dtype)[:, :, None]).flatten(1, 2).to(q.dtype)
        return wide.transpose(1, 2).contiguous().transpose(1, 2), lse.flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, q.new_zeros(q.shape[:3], dtype=_wide(q))


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _grouped(x: Tensor, kv_heads: Any) -> Tensor:
    """[B, H, S, D] as [B, H_kv, H / H_kv, S, D], in float32 at least."""
    return x.to(_wide(x)).unflatten(1, (kv_heads, int(x.shape[1]) // int(kv_heads)))


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H_kv, H / H_kv, S_q, S_k], -inf where the mask does not keep, and the slope of the soft cap."""
    scores = _grouped(q, k.shape[1]) @ k.to(_wide(k))[:, :, None].mT * scale
    slope = None
    if softcap:
        bounded = (scores / softcap).tanh()
        scores, slope = bounded * softcap, 1 - bounded * bounded
    return scores.masked_fill(~(mask[:, :, None] if mask.dim() == 4 else mask), -math.inf), slope


def _weights(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax, zeros where there is no score, and the logarithm to base 2 of its denominator."""
    keys = scores.shape[-1]
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat((scores, column), -1)
    lse = scores.logsumexp(-1).detach() * math.log2(math.e)
    empty = lse == -math.inf
    return scores.softmax(-1).masked_fill(empty[..., None], 0.0)[..., :keys], lse.masked_fill(empty, math.inf)


def _key_range(key_keep: Tensor) -> Tensor:
    """The first kept key of each batch, one past the last, and how many between are not kept: int32 [B, 3].

    Without any kept key the range is empty: [S_k, 0, at most 0].
    """
    length = key_keep.shape[1]
    position = torch.arange(1, length + 1, device=key_keep.device, dtype=torch.int32)
    kept = key_keep.to(torch.int32)
    end = (kept * position).amax(1)
    first = length - (kept * (length + 1 - position)).amax(1)
    return torch.stack((first, end, end - first - kept.sum(1, dtype=torch.int32)), 1).to(torch.int32)


key_range = define_op("torch_fuse::key_range", _key_range)


@key_range.register_fake
def _fake_key_range(key_keep: Tensor) -> Tensor:
    return key_keep.new_empty(key_keep.shape[0], 3, dtype=torch.int32)


def _require(ok: bool, argument: str, value: object, allowed: str) -> None:
    require(ok, "masked_attention", argument, value, allowed)


def _check(q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, softcap: float, sinks: Tensor | None) -> None:
    check_heads("masked_attention", q, k, v)
    if key_keep is not None:
        _require(key_keep.dtype == torch.bool, "key_keep.dtype", key_keep.dtype, "torch.bool")
        shape = tuple(key_keep.shape)
        ok = len(shape) == 2 and (shape[0] == 1 or shape[0] == q.shape[0]) and shape[1] == k.shape[2]
        _require(ok, "key_keep.shape", shape, f"[{q.shape[0]} or 1, {k.shape[2]}]")
    _require(0 <= softcap < math.inf, "softcap", softcap, "0 and more")
    if sinks is not None:
        _require(
            sinks.dim() == 1 and sinks.shape[0] == q.shape[1], "sinks.shape", tuple(sinks.shape), f"[{q.shape[1]}]"
        )
        _require(sinks.dtype.is_floating_point, "sinks.dtype", sinks.dtype, "floating-point numbers")
        _require(sinks.device == q.device, "sinks.device", sinks.device, f"q's {q.device}")


def _ranges(key_keep: Tensor | None, key_range: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if key_keep is None:
        return None, None
    return key_keep.contiguous(), _key_range(key_keep) if key_range is None else key_range


_calls = Calls()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None, left: int | None,
    right: int | None, scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = (q, k, v, key_keep, key_range, sinks)
    options = (left, right, scale, softcap, CONFIGS.get(q.shape[-1]) if q.shape else None)
    return _calls.make(given, options, _first, *given, Band(left, right), scale, softcap)


def _first(
    call: Call, q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None,
    sinks: Tensor | None, band: Band, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first call of its kind."""
    _check(q, k, v, key_keep, softcap, sinks)
    if q.numel() == 0:  # on a GPU SDPA may return None
        return output(q).transpose(1, 2), q.new_empty(q.shape[:3], dtype=_wide(q))
    if supports(q, k, v, scale, softcap) is not None:
        return reference(q, k, v, key_keep, key_range, band.left, band.right, scale, softcap, sinks)
    lse = call.empty(q.shape[:3], torch.float32)
    config = CONFIGS[int(q.shape[3])][0]
    sinks = None if sinks is None else sinks.contiguous()
    out = attend(call, q, k, v, *_ranges(key_keep, key_range), band, scale, config, lse, softcap, sinks)
    return out, lse


def _fake(
    q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None, left: int | None,
    right: int | None, scale: float, softcap: float = 0.0, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, key_keep, softcap, sinks)
    return output(q).transpose(1, 2), q.new_empty(q.shape[:3], dtype=_wide(q))


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, key_keep: Tensor | None,
    key_range: Tensor | None, left: int | None, right: int | None, scale: float, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or supports(q, k, v, scale, softcap) is not None:
        mask = dense_mask(q, k, key_keep, left, right)
        return _reference_gradients(grad, q, k, v, mask, scale, softcap, sinks)
    if grad.stride(3) != 1 or grad.stride(2) >= 2**23:
        grad = grad.contiguous()
    lse, delta = lse.contiguous(), delta.contiguous()
    _, key_config, query_config = CONFIGS[int(q.shape[3])]
    ranges = _ranges(key_keep, key_range)
    grads = backward(grad, q, k, v, lse, delta, *ranges, Band(left, right), scale, key_config, query_config, softcap)
    return grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)


def _reference_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in plain torch, in the inputs' dtype at least float32."""
    g, x = (_grouped(t, k.shape[1]) for t in (grad, q))
    y, z = (t.to(_wide(t))[:, :, None] for t in (k, v))
    scores, slope = _scores(q, k, mask, scale, softcap)
    p, _ = _weights(scores, sinks)
    dp = g @ z.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    ds = ds if slope is None else ds * slope
    dq, dk, dv = (ds @ y).flatten(1, 2), (ds.mT @ x).sum(2), (p.mT @ g).sum(2)
    return tuple(t.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in (dq, dk, dv))  # type: ignore[return-value]


def _fake_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, key_keep: Tensor | None,
    key_range: Tensor | None, left: int | None, right: int | None, scale: float, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return output(q).transpose(1, 2), output(k).transpose(1, 2), output(v).transpose(1, 2)


masked_attention_backward = define_opaque_op("torch_fuse::masked_attention_backward", _gradients, _fake_gradients)


def _sink_gradient(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """-sum(p * delta) over batch and queries, where p is the weight of the sink and delta = sum(out * grad).

    A softmax has d(score) = p * (dp - delta) for each of its scores; the sink's value, and so its dp, is zero.
    """
    p = torch.exp2(sinks.to(lse.dtype)[:, None] * math.log2(math.e) - lse)
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_keep, ranges, *options, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, key_keep, ranges, sinks)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor | None, _lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    q, k, v, out, lse, key_keep, ranges, sinks = ctx.saved_tensors
    needed = sinks is not None and ctx.needs_input_grad[9]  # arguments left to their defaults are not counted
    delta = (out.to(lse.dtype) * grad.to(lse.dtype)).sum(-1)  # here, where Inductor makes one kernel of it
    d_sinks = _sink_gradient(delta, lse, sinks) if needed else None
    grads = masked_attention_backward(grad, q, k, v, lse, delta, key_keep, ranges, *ctx.options, sinks)
    return *grads, *[None] * 6, d_sinks


masked_attention = define_opaque_op("torch_fuse::masked_attention", _forward, _fake, _backward, _save_for_backward)
