"""Attention over all keys or causal, without gradients, by the fastest kernel for the shape and the GPU.

    out = softmax(q @ k.T * scale) @ v

- On Hopper, `_hopper_flash`: FlashAttention-3's forward pass (Shah et al., arXiv:2407.08608).
- On others, and for short sequences of uneven heads, `_flash`: FlashAttention-2's (Dao, arXiv:2307.08691).

Both take a head dim that is no power of two as two parts that are: 80 = 64 + 16. Libraries pad it to the next one (128:
60% more work).

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
    >>> dense_attention(q, k, v, True, 48**-0.5).stride()
    (480, 48, 96, 1)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse._compat import likely

from . import _flash, _hopper_flash
from ._attention_arguments import check_heads, refusal, require
from ._flash import PARTS, Band, output
from ._ops import Launch, define_opaque_op, on_device_of

# Two to four programs an SM by registers and shared memory, so that one's products hide another's softmax. The best of
# benchmarks/results/uneven_head_attention.jsonl, for up to LONG queries and for more.
LONG = 4096
_WIDE = _flash.Config(128, 64, 8, 3, maxnreg=128)
TRITON = {
    48: (_flash.Config(maxnreg=168), _flash.Config(maxnreg=168)),
    64: (_flash.Config(), _flash.Config()),
    80: (_flash.Config(num_stages=2, maxnreg=128), _WIDE),
    96: (_WIDE, _WIDE),
    128: (_flash.Config(128, 64, 8), _flash.Config(128, 64, 8)),
    160: (_flash.Config(num_stages=2), _flash.Config(num_stages=2)),
}
_TWO_A_SM = _hopper_flash.Config(1, 128, 2, maxnreg=128)
_TWO_A_SM_80 = _TWO_A_SM._replace(lazy=False, order=False)
_THREE_GROUPS = _hopper_flash.Config(3, 128, 3, 160, programs=1, turns=True)
_ONE_A_SM = _hopper_flash.Config(programs=1)
# By head dim and whether it is causal; None: Triton's kernel is faster. Of benchmarks/results/hopper_flash*.jsonl.
HOPPER: dict[tuple[int, bool], tuple[_hopper_flash.Config | None, _hopper_flash.Config | None]] = {
    (64, False): (_THREE_GROUPS, _THREE_GROUPS), (64, True): (None, _TWO_A_SM),
    (80, False): (None, _TWO_A_SM_80), (80, True): (None, _TWO_A_SM_80),
    (128, False): (_ONE_A_SM, _ONE_A_SM), (128, True): (_ONE_A_SM, _ONE_A_SM),
}  # fmt: skip
HEAD_DIMS = tuple(TRITON)


def hopper_config(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[_hopper_flash.Config | None, str]:
    """How Hopper's kernel runs for these tensors, or None and why it does not."""
    config = HOPPER.get((int(q.shape[3]), is_causal), (None, None))[likely(q.shape[2] > LONG)]
    if config is None:
        return None, f"head_dim {q.shape[3]} is as fast without it"
    if not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) != (9, 0):
        return None, "the GPU is not Hopper (compute capability 9.0)"
    reason = _hopper_flash.MISSING or _hopper_flash.cannot_read(q=q, k=k, v=v)
    return (None, reason) if reason else (config, "")


def hopper_config_now(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> _hopper_flash.Config | None:
    """How Hopper's kernel runs for these very tensors: it reads from multiples of 16 bytes on."""
    config, _ = hopper_config(q, k, v, is_causal)
    return None if any(x.data_ptr() % 16 for x in (q, k, v)) else config


def supports(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    return refusal(q, k, v, scale, HEAD_DIMS, 64)


def reference(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    gqa = bool(q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    check_heads("dense_attention", q, k, v)
    same = not is_causal or q.shape[2] == k.shape[2]
    require(same, "dense_attention", "k.shape[2]", k.shape[2], f"q's {q.shape[2]} when is_causal")


# By everything but the tensors' data: a launch, and how many lanes the first part of the head dim has if the launch
# takes the parts as tensors of their own.
_launches: dict[tuple[Any, ...], tuple[Launch, int | None]] = {}


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    alike = [(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) for x in (q, k, v)]
    key = (is_causal, scale, *alike)
    known = _launches.get(key)
    if known is None:
        return _first(key, q, k, v, is_causal, scale)
    launch, split = known
    out = output(q)
    with on_device_of(q):
        if split is None:
            launch.again(q, k, v, q, q, out, out, q)
        elif split == 0:
            launch.again(q, k, v, out)
        else:
            launch.again(q, q[..., split:], k, k[..., split:], v, v[..., split:], out)
    return out.transpose(1, 2)


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
    parts = PARTS[int(q.shape[3])]
    config = hopper_config_now(q, k, v, is_causal)
    with on_device_of(q):
        if config is not None:
            arguments = _hopper_flash.call(q, k, v, is_causal, scale, parts, config, out)
            _launches[key] = Launch(_hopper_flash.kernel, *arguments), parts[0] if parts[1] else 0
        else:
            band, triton = Band(right=0 if is_causal else None), TRITON[int(q.shape[3])][q.shape[2] > LONG]
            arguments = _flash.call(q, k, v, None, None, band, scale, triton, out)
            _launches[key] = Launch(_flash.kernel, *arguments), None
    return out.transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    return output(q).transpose(1, 2)


dense_attention = define_opaque_op("torch_fuse::dense_attention", _forward, _fake)
