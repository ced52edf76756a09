"""What the attention ops ask of query, key and value."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from torch_fuse._compat import likely

from . import _flash
from ._ops import no_triton

DTYPES = (torch.bfloat16, torch.float16)


def refusal(q: Tensor, k: Tensor, v: Tensor, scale: float, head_dims: Iterable[int], least_keys: int) -> str | None:
    """Why no Triton kernel can take these arguments, or None; checked ones, whose sizes may be symbols."""
    reason = no_triton(q)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}; allowed: bfloat16, float16"
    if q.shape[3] not in head_dims:
        return f"head_dim is {q.shape[3]}; allowed: {', '.join(map(str, head_dims))}"
    if not 0 < scale < math.inf:
        return f"scale is {scale}; allowed: positive numbers"
    if likely(k.shape[2] < least_keys):
        return f"there are {k.shape[2]} keys; allowed: {least_keys} and more"
    return _flash.cannot_read(q=q, k=k, v=v)


def require(ok: bool, op: str, argument: str, value: object, allowed: str) -> None:
    """Raises ValueError, naming argument, value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {argument} is {value}; allowed: {allowed}")


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [B, H, S_q, D], and k and v are [B, H_kv, S_k, D], of one dtype and device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 4, op, f"{name}.shape", tuple(x.shape), "four dimensions [B, H, S, D]")
        require(x.dtype == q.dtype, op, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        require(x.device == q.device, op, f"{name}.device", x.device, f"q's {q.device}")
    wanted = "[B, H_kv, S_k, D] with q's B and D, and H_kv a divisor of q's H"
    heads, kv_heads = q.shape[1], k.shape[1]
    ok = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    require(ok and kv_heads > 0 and heads % kv_heads == 0, op, "k.shape", tuple(k.shape), wanted)
    require(v.shape == k.shape, op, "v.shape", tuple(v.shape), f"k's {tuple(k.shape)}")
