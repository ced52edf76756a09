"""Attention for head dims that are no power of two, computed as two parts that are: 80 = 64 + 16, without padding.

    scores = (q1 @ k1.T + q2 @ k2.T) * scale        q1, q2: the first D1 and the last D2 lanes of q
    weights = softmax(scores), causal or over all keys
    out = [weights @ v1, weights @ v2]

Libraries pad such heads to the next power of two (128 for 80: 60% more work). The algorithm is FlashAttention-2's
(Dao, arXiv:2307.08691): one pass over tiles of keys with a running maximum and sum, in fp32; the weights are rounded
to the inputs' dtype for the second product; the result is rounded once. Causal tiles with most keys start first, so
that the short ones fill the end. Only tiles on the diagonal and the last one are masked; the last one of an uneven
length starts earlier and masks the keys it has seen, so that no load needs a mask.

- q [B, H, S_q, D]; k, v [B, H_kv, S_k, D], H a multiple of H_kv: each key head serves H / H_kv query heads.
  bfloat16 and float16 on a GPU, D in `HEAD_DIMS`, at least 64 keys, last stride 1 and other strides as they are
  (views into a projection); the rest is left to `torch.nn.functional.scaled_dot_product_attention`.
- is_causal: query i attends to keys 0 to i; needs S_q == S_k.
- scale: factor of the scores.
- Returns [B, H, S_q, D] in q's dtype, as the transpose of a contiguous [B, S_q, H, D].
- Raises ValueError, naming the argument, its value and what is allowed; NotImplementedError where a gradient would be
  needed.

Example:
    >>> q, k, v = torch.randn(3, 1, 2, 5, 48).unbind(0)
    >>> uneven_head_attention(q, k, v, True, 48**-0.5).stride()
    (480, 48, 96, 1)
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._flash import PARTS, Band, Config, call, cannot_read, kernel, output
from ._ops import Launch, define_opaque_op, no_triton, on_device_of

# The two parts of each head dim, powers of two that a matrix instruction takes.
HEAD_DIMS = {dim: parts for dim, parts in PARTS.items() if parts[1]}
DTYPES = (torch.bfloat16, torch.float16)


# Two to four programs an SM by registers and shared memory, so that one's products hide another's softmax. The best of
# benchmarks/results/uneven_head_attention.jsonl, for up to LONG queries and for more.
LONG = 4096
_WIDE = Config(128, 64, 8, 3, maxnreg=128)
CONFIGS = {
    48: (Config(maxnreg=168), Config(maxnreg=168)),
    80: (Config(num_stages=2, maxnreg=128), _WIDE),
    96: (_WIDE, _WIDE),
    160: (Config(num_stages=2), Config(num_stages=2)),
}


def config(q: Tensor) -> Config:
    """How the kernel runs for these queries."""
    return CONFIGS[int(q.shape[3])][q.shape[2] > LONG]


def supports(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    reason = no_triton(q)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}; allowed: bfloat16, float16"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim is {q.shape[3]}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if not 0 < scale < math.inf:
        return f"scale is {scale}; allowed: positive numbers"
    block_n = CONFIGS[int(q.shape[3])][0].block_n
    if k.shape[2] < block_n:
        return f"there are {k.shape[2]} keys; allowed: {block_n} and more"
    return cannot_read(q=q, k=k, v=v)


def reference(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    gqa = bool(q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _require(ok: bool, argument: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"uneven_head_attention: {argument} is {value}; allowed: {allowed}")


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.dim() == 4, f"{name}.shape", tuple(x.shape), "four dimensions [B, H, S, D]")
        _require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        _require(x.device == q.device, f"{name}.device", x.device, f"q's {q.device}")
    wanted = "[B, H_kv, S_k, D] with q's B and D, and H_kv a divisor of q's H"
    heads, kv_heads = q.shape[1], k.shape[1]
    ok = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    _require(ok and kv_heads > 0 and heads % kv_heads == 0, "k.shape", tuple(k.shape), wanted)
    _require(v.shape == k.shape, "v.shape", tuple(v.shape), f"k's {tuple(k.shape)}")
    if is_causal:
        _require(q.shape[2] == k.shape[2], "k.shape[2]", k.shape[2], f"q's {q.shape[2]} when is_causal")


# By everything but the tensors' data.
_launches: dict[tuple[Any, ...], Launch] = {}


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    alike = [(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in (q, k, v)]
    key = (is_causal, scale, *alike)
    if key in _launches:
        out = output(q)
        with on_device_of(q):
            _launches[key].again(q, k, v, q, q, out, out, q)
        return out.transpose(1, 2)
    _check(q, k, v, is_causal)
    out = output(q)
    if q.numel() == 0:
        return out.transpose(1, 2)
    if supports(q, k, v, is_causal, scale) is not None:
        return reference(q, k, v, is_causal, scale)
    band = Band(right=0 if is_causal else None)
    if len(_launches) == 1024:
        _launches.clear()
    with on_device_of(q):
        _launches[key] = Launch(kernel, *call(q, k, v, None, None, band, scale, config(q), out))
    return out.transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    return output(q).transpose(1, 2)


uneven_head_attention = define_opaque_op("torch_fuse::uneven_head_attention", _forward, _fake)
