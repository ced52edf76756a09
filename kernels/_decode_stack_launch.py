"""The arguments of `decode_stack` as its persistent kernel takes them: sizes, constants of the compiler, one struct."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _cuda
from ._decode_stack_plan import Device, Plan, Sizes, plan, softmax_scale

if TYPE_CHECKING:
    from .decode_stack import Stack

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
HALVES = (torch.float16, torch.bfloat16)
MAX_PARAMETERS = 32764  # bytes
_plans = functools.lru_cache(maxsize=32)(plan)


def sizes_of(s: Stack) -> Sizes:
    projections = len(s.in_weights) // s.layers
    return Sizes(
        s.layers, int(s.x.shape[2]), s.heads, s.kv_heads, s.head_dim,
        tuple(int(w.shape[0]) for w in s.in_weights[:projections]), int(s.up_weights[0].shape[0]),
        0 if s.head_weight is None else int(s.head_weight.shape[0]), s.parallel, s.gated, s.rotary_dim,
    )  # fmt: skip


def supports(s: Stack, device: Device) -> str | None:
    """Why the kernel cannot take the arguments on such a device, or None; also of fake tensors."""
    if s.x.dtype not in HALVES:
        return f"dtype is {s.x.dtype}; allowed: fp16, bf16"
    if reason := _elsewhere(s) or _differing(s) or _strides(s) or _tables(s):
        return reason
    if s.head_dim % 8 or s.head_dim > 256:
        return f"head_dim is {s.head_dim}; allowed: multiples of 8 up to 256"
    if any(n % 8 for n in (s.x.shape[2], s.heads * s.head_dim, s.up_weights[0].shape[0])):
        return "a weight's rows are no multiple of 8 long"
    if any(n % 8 for i, n in enumerate(s.layout) if i % 3):
        return f"the heads are at {list(s.layout)}; allowed: rows in multiples of 8"
    fitting = _plans(sizes_of(s), device)
    if isinstance(fitting, str):
        return fitting
    size = _argument_bytes(s)
    return f"the kernel's parameters are {size} bytes; allowed: {MAX_PARAMETERS}" if size > MAX_PARAMETERS else None


def _elsewhere(s: Stack) -> str | None:
    for given in s.tensors:
        for t in (given,) if isinstance(given, Tensor) else given or ():
            if t is not None and t.device != s.x.device:
                return f"a tensor is on {t.device}, and the stream on {s.x.device}"
    return None


def _differing(s: Stack) -> str | None:
    projections, ups = len(s.in_weights) // s.layers, 2 if s.gated else 1
    rows = [w.shape[0] for w in s.in_weights[:projections]]
    if any(w.shape[0] != rows[i % projections] for i, w in enumerate(s.in_weights)):
        return "the layers' projections have different sizes"
    if any(w.shape != s.up_weights[0].shape for w in s.up_weights[ups:]):
        return "the layers' MLPs have different sizes"
    for caches in (s.key_caches, s.value_caches):
        if any(c.shape != s.key_caches[0].shape or c.stride() != caches[0].stride() for c in caches):
            return "the layers' caches have different sizes or strides"
    if any(m.stride(3) != s.masks[0].stride(3) for m in s.masks):
        return "the layers' masks have different strides"
    return None


def _strides(s: Stack) -> str | None:
    weights = (*s.in_weights, *s.up_weights, *s.out_weights, *s.down_weights, s.head_weight)
    for w in weights:
        if w is not None and (not w.is_contiguous() or w.dtype != s.x.dtype):
            return f"a weight is {w.dtype} of strides {w.stride()}; allowed: {s.x.dtype}, rows side by side"
    for v in _vectors(s):
        if v is not None and (not v.is_contiguous() or v.dtype != s.x.dtype):
            return f"a bias or norm weight is {v.dtype} of strides {v.stride()}; allowed: {s.x.dtype}, contiguous"
    for c in (s.key_caches[0], s.value_caches[0]):
        if c.stride(3) != 1 or (c.shape[1] > 1 and c.stride(1) % 8) or (c.shape[2] > 1 and c.stride(2) % 8):
            return f"a cache's strides are {c.stride()}; allowed: lanes side by side, rows in multiples of 8"
    if s.positions is not None and s.positions.dtype not in (torch.int64, torch.int32):
        return f"positions are {s.positions.dtype}; allowed: int64, int32"
    return None


def _vectors(s: Stack) -> tuple[Tensor | None, ...]:
    return (*s.norm_weights, *s.norm_biases, *s.in_biases, *s.up_biases, *s.out_biases, *s.down_biases,
            *s.q_norm_weights, *s.k_norm_weights, s.head_norm_weight, s.head_norm_bias, s.head_bias)  # fmt: skip


def _tables(s: Stack) -> str | None:
    if s.cos is None or s.sin is None:
        return None
    if s.cos.dtype != s.sin.dtype or s.cos.dtype not in (*HALVES, torch.float32):
        return f"cos and sin are {s.cos.dtype} and {s.sin.dtype}; allowed: one of fp16, bf16, fp32"
    return None


def misplaced(s: Stack) -> str | None:
    """Why the tensors' addresses do not suit the kernel, or None."""
    wide = (*s.in_weights, *s.up_weights, *s.out_weights, *s.down_weights, s.head_weight, *s.norm_weights,
            *s.norm_biases, *s.q_norm_weights, *s.k_norm_weights, s.head_norm_weight, s.head_norm_bias,
            *s.key_caches, *s.value_caches)  # fmt: skip
    if any(t is not None and t.data_ptr() % 16 for t in wide):
        return "a weight, a norm or a cache does not begin at a multiple of 16 bytes"
    written = [t.data_ptr() for t in (*s.key_caches, *s.value_caches, *s.lengths)]
    if len(set(written)) < len(written):
        return "two layers share a cache or a length"
    return None


def constants(s: Stack, fitting: Plan) -> dict[str, int]:
    """Those of the plan, and those that only say how the arguments are read."""
    rows = [fitting.constants[f"IN_ROWS_{i}_PADDED"] for i in range(3)]
    begin = [0, rows[0], rows[0] + rows[1]]
    found = dict(fitting.constants)
    for i, name in enumerate("QKV"):
        at, first, step = s.layout[3 * i : 3 * i + 3]
        found |= {f"{name}_FIRST": begin[at] + first, f"{name}_STEP": step}
    for name, table, lanes in (("COS", s.cos, s.cos_lanes), ("SIN", s.sin, s.sin_lanes)):
        mult, first, second = (0, 0, 0) if table is None else (n * table.stride(2) for n in lanes)
        found |= {f"{name}_STEP": mult, f"{name}_FIRST": first, f"{name}_SECOND": second}
    table_dtype = s.x.dtype if s.cos is None else s.cos.dtype
    return found | {
        "RMS": int(s.norm == "rms"), "ACTIVATION": ACTIVATIONS.index(s.activation),
        "BFLOAT": int(s.x.dtype == torch.bfloat16), "INTERLEAVED": int(s.interleaved),
        "TABLE_BYTES": table_dtype.itemsize, "TABLE_BFLOAT": int(table_dtype == torch.bfloat16),
        "MASKS": len(s.masks), "COUNTED": int(bool(s.lengths)), "SIZE": int(s.key_caches[0].shape[2]),
        "POSITION_BYTES": 8 if s.positions is None else s.positions.dtype.itemsize,
        "HEAD_NORM": int(bool(s.q_norm_weights)), "ARGUMENT_BYTES": _argument_bytes(s),
    }  # fmt: skip


def _argument_bytes(s: Stack) -> int:
    pointers = 14 + 2 * len(s.in_weights) // s.layers + (4 if s.gated else 2)  # of a layer
    return 8 * (18 + s.layers * pointers)


def arguments(s: Stack, out: Tensor, workspace: int) -> tuple[bytes, Tensor]:
    """The struct `Arguments` of cuda/decode_stack_parts.cuh, and a tensor to hold until it has been used."""

    def at(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    x = s.x
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    keys, values = s.key_caches[0], s.value_caches[0]
    words = [at(x), at(out), at(s.cos), at(s.sin), at(s.positions), at(s.head_norm_weight), at(s.head_norm_bias),
             at(s.head_weight), at(s.head_bias), workspace]  # fmt: skip
    strides = [keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), s.masks[0].stride(3)]
    numbers = struct.pack("=15q6f", *words, *strides, s.eps, s.weight_offset, softmax_scale(s.scale), s.qk_eps,
                          s.qk_weight_offset, 0.0)  # fmt: skip
    projections, ups = len(s.in_weights) // s.layers, 2 if s.gated else 1
    tensors: list[Tensor | None] = []
    for i in range(s.layers):
        norms, ins, up = (slice(i * n, i * n + n) for n in (2, projections, ups))
        tensors += [*s.norm_weights[norms], *s.norm_biases[norms], *s.in_weights[ins], *s.in_biases[ins],
                    *s.up_weights[up], *s.up_biases[up], s.out_weights[i], s.out_biases[i], s.down_weights[i],
                    s.down_biases[i], s.q_norm_weights[i] if s.q_norm_weights else None,
                    s.k_norm_weights[i] if s.k_norm_weights else None, s.key_caches[i], s.value_caches[i], s.lengths[i] if s.lengths else None,
                    s.masks[i if len(s.masks) > 1 else 0]]  # fmt: skip
    return numbers + struct.pack(f"={len(tensors)}q", *map(at, tensors)), x


@functools.cache
def device_of(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


class Ready(NamedTuple):
    """A kernel for arguments of one kind."""

    kernel: _cuda.Kernel
    plan: Plan

    def launch(self, s: Stack, workspace: Tensor | None = None) -> Tensor:
        """The op's result; the workspace, bytes, may be given to look at it."""
        out = s.x.new_empty(1, 1, s.x.shape[2] if s.head_weight is None else s.head_weight.shape[0])
        if workspace is None:
            workspace = torch.empty(self.plan.workspace, dtype=torch.uint8, device=s.x.device)
        given, _held = arguments(s, out, workspace.data_ptr())
        with torch.cuda.device(s.x.device):
            stream = torch.cuda.current_stream().cuda_stream
            self.kernel.launch(given, workspace.data_ptr(), self.plan.counters, stream)
        return out


def ready(s: Stack, macros: tuple[tuple[str, int], ...] = (), **choices: int) -> Ready | str:
    """The compiled kernel for such arguments, on a device that `_cuda` can use, or why there is none.

    macros and choices: further ones for the compiler and for `plan`, for measurements.
    """
    index = s.x.device.index
    device = device_of(index)
    if reason := supports(s, device) or misplaced(s):
        return reason
    fitting = _plans(sizes_of(s), device, **choices)
    if isinstance(fitting, str):
        return fitting
    given = tuple({**constants(s, fitting), **dict(macros)}.items())
    kernel = _cuda.kernel("decode_stack", given, index, device.multiprocessors, fitting.threads, fitting.shared_bytes)
    return kernel if isinstance(kernel, str) else Ready(kernel, fitting)
