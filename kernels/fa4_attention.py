"""FlashAttention-4's forward pass, where flash-attn-4 is installed: an adapter to its public function.

    out = softmax(q @ k.T * scale) @ v

- q [B, H, S_q, D]; k, v [B, H_kv, S_k, D], H a multiple of H_kv; bfloat16 or float16, last stride 1;
  D is 64, 96 or 128.
- is_causal: query i attends to keys 0 to i; needs S_q == S_k.
- Returns [B, H, S_q, D] in q's dtype, as the transpose of a contiguous [B, S_q, H, D].
- Raises ValueError, naming the argument, its value and what is allowed; NotImplementedError where a gradient would be
  needed.

Kernels and function are of the package flash-attn-4 (Dao-AILab; extra `fa4`), which compiles them at their first call,
for Hopper and Blackwell. What it cannot take runs the reference.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._attention_arguments import DTYPES, check_heads, require
from ._flash import output
from ._ops import define_opaque_op, on_device_of
from .dense_attention import reference

HEAD_DIMS = (64, 96, 128)
CAPABILITIES = (9, 10)  # major ones
PACKAGE = "flash-attn-4"


def installed() -> str | None:
    """The version of flash-attn-4, or None."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _function() -> tuple[Callable[..., Any] | None, str]:
    """FlashAttention-4's function, or None and why there is none."""
    if installed() is None:
        return None, f"{PACKAGE} is not installed (pip install 'torch_fuse[fa4]')"
    try:
        return importlib.import_module("flash_attn.cute").flash_attn_func, ""
    except Exception as error:  # it loads CUDA's bindings and a compiler
        return None, f"{PACKAGE} is installed, but does not import: {type(error).__name__}: {error}"


def supports_device(device: torch.device) -> str | None:
    """Why FlashAttention-4 does not run on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{PACKAGE} has kernels for CUDA only"
    function, reason = _function()
    if function is None:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if major not in CAPABILITIES:
        return f"compute capability {major}.{minor}; {PACKAGE} has kernels for Hopper (9) and Blackwell (10)"
    return None


def supports(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Why FlashAttention-4 cannot take these arguments (the op then runs its reference), or None."""
    reason = supports_device(q.device)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}; allowed: bfloat16, float16"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim is {q.shape[3]}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or any(stride % 8 for stride in x.stride()[:3]):
            return f"{name}.stride() is {x.stride()}; allowed: the last 1, the others multiples of 8"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    check_heads("fa4_attention", q, k, v)
    same = not is_causal or q.shape[2] == k.shape[2]
    require(same, "fa4_attention", "k.shape[2]", k.shape[2], f"q's {q.shape[2]} when is_causal")


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    aligned = all(x.data_ptr() % 16 == 0 for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or not aligned or supports(q, k, v, is_causal, scale) is not None:
        return reference(q, k, v, is_causal, scale)
    function, _ = _function()
    assert function is not None
    with on_device_of(q):
        found = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=is_causal)
    out = found[0] if isinstance(found, tuple) else found  # newer versions return the log-sum-exp, too
    return out.contiguous().transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    return output(q).transpose(1, 2)


fa4_attention = define_opaque_op("torch_fuse::fa4_attention", _forward, _fake)
