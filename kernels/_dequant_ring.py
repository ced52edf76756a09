"""A few rows times a weight of 4-bit or 8-bit codes as one persistent CUDA kernel, for `dequant_linear` on sm_90.

cuda/dequant_ring.cu streams the codes through shared memory; this says what it takes, how it divides the work, and
launches it. Zero points, and what the codes are away from the numbers that they stand for, are subtracted from sums:

    sum of x * (q - zero) = sum of x * q - zero * sum of x

in fp32, so that a weight costs no instruction for them. Where x is not finite, so is no output that reads it: it may
be nan where the source gives an infinity.
"""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _cuda
from ._gemv_common import ACTIVATIONS
from .packed_weight import Format, weight_shape

MAX_ROWS = 16
TILE, PIECE, BUFFERS = 16, 64, 2
MOST_WARPS, PRODUCERS, MOST_SLOT = 16, 3, 40 << 10
_TYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int8: 4, torch.uint8: 5, torch.int32: 6}
_COMPUTE = {"float32": 3, "float16": 1, "bfloat16": 2}
_ARGUMENTS = struct.Struct("=6q2i")


class Device(NamedTuple):
    multiprocessors: int
    shared_bytes: int


class Plan(NamedTuple):
    """Constants of the compiler, and the sizes of a launch."""

    constants: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int


class Kind(NamedTuple):
    """What a compiled kernel is for: all but the rows of x, up to 8 for each of `column_tiles`, and of the weight."""

    form: Format
    k: int
    dtype: torch.dtype
    scale: torch.dtype
    zero: torch.dtype | None
    biased: bool
    activation: str = "none"
    column_tiles: int = 1
    early: bool = False


def kind_of(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
            activation: str = "none", early: bool = False) -> Kind:  # fmt: skip
    k = int(x.shape[-1])
    return Kind(form, k, x.dtype, scale.dtype, None if zero is None else zero.dtype, bias is not None, activation,
                1 if x.numel() <= 8 * k else 2, early)  # fmt: skip


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    activation: str = "none", early: bool = False,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take these, or None; it is then compiled."""
    if reason := _cuda.unavailable(x.device):
        return reason
    if reason := no_layout(x, codes, scale, zero, lut, form):
        return reason
    made = ready(kind_of(x, codes, scale, zero, bias, form, activation, early), x.device, codes.shape[0])
    return made if isinstance(made, str) else None


def no_layout(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot read these tensors, on any device, or None."""
    n, k = weight_shape(codes, form)
    rows = x.numel() // max(int(x.shape[-1]), 1)
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {x.dtype}; allowed: fp16, bf16"
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    if form.bits not in (4, 8) or form.kind not in ("int", "uint") or form.nibbles not in ("low", "high"):
        return (
            f"codes are {form.bits} bits, {form.kind!r}, {form.nibbles!r}; allowed: integers of 4 or 8 bits, in order"
        )
    if form.arithmetic not in ("sub_mul", "output") or form.rows != 1 or abs(form.offset) > 255:
        return f"arithmetic is {form.arithmetic!r}, with {form.rows} rows a scale and offset {form.offset}"
    if zero is not None and zero.dtype not in _TYPES:
        return f"zero points are {zero.dtype}"
    columns = PIECE * 8 // form.bits
    if k % columns or (form.group < k and (form.group % columns or k % form.group)):
        return f"K = {k} and groups of {form.group}; allowed: multiples of {columns}"
    parts = (codes, scale, *(() if zero is None else (zero,)))
    if not all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in parts):
        return "codes, scale or zero point are not contiguous from a multiple of 16 bytes on"
    if n < TILE or any(part.numel() * part.element_size() % 16 for part in (scale, *parts[2:])):
        return f"there are {n} rows of the weight; allowed: 16 and more, of scales that end at a multiple of 16 bytes"
    return None


@functools.lru_cache(maxsize=256)
def plan(
    kind: Kind, device: Device, segments: int = 0, warps: int = 0, slots: int = 0, producers: int = 0
) -> Plan | str:
    """How the work is divided, or why it cannot be. What is not 0 is taken as it is, for measurements."""
    form, k = kind.form, kind.k
    columns = PIECE * 8 // form.bits
    pieces, group = k // columns, min(form.group, k)
    groups = k // group
    size = {1: 2, 2: 2, 3: 4, 4: 1, 5: 1, 6: 4}
    scale, zero = _TYPES[kind.scale], 0 if kind.zero is None else _TYPES[kind.zero]
    scales = TILE * groups * (size[scale] + (size[zero] if zero else 0))
    front = -(-scales // 128) * 128

    def slot_bytes(segments: int) -> int:
        row = -(-pieces // segments) * PIECE
        return front + -(-TILE * (row + (64 if row % 128 == 0 else 0)) // 128) * 128

    if not segments:
        segments = next((s for s in range(1, pieces + 1) if slot_bytes(s) <= MOST_SLOT), pieces)
    segments = -(-pieces // -(-pieces // segments))  # none is empty
    in_segment = -(-pieces // segments)
    own = -(-in_segment // (warps or MOST_WARPS))
    warps = -(-in_segment // own)
    rest = BUFFERS * warps * TILE * 8 * kind.column_tiles * 4
    room = device.shared_bytes - rest - 512
    fitting = min(room // (slot_bytes(segments) + 16), 24)
    slots = slots or fitting
    if not 2 <= slots <= fitting:
        return f"{fitting} parts of a tile of K = {k} columns fit the shared memory; needed: 2"
    producers = min(producers or PRODUCERS, slots)
    threads = (warps + producers + 1) * 32
    held = segments * own * (columns // 32) * kind.column_tiles * 4 + (0 if groups == 1 else segments * own * 6)
    if held + 48 > 65536 // threads // 8 * 8:
        return f"a warp's part of {8 * kind.column_tiles} rows of K = {k} does not fit its registers"
    constants = {
        "BITS": form.bits, "K": k, "GROUP": group, "SIGNED": int(form.kind == "int"), "OFFSET": form.offset,
        "HIGH_FIRST": int(form.nibbles == "high"), "BFLOAT": int(kind.dtype == torch.bfloat16),
        "SCALE_TYPE": scale, "ZERO_TYPE": zero, "COMPUTE": _COMPUTE[form.compute], "BIASED": int(kind.biased),
        "ACTIVATION": ACTIVATIONS.index(kind.activation), "COLUMN_TILES": kind.column_tiles, "EARLY": int(kind.early),
        "SEGMENTS": segments, "WARPS": warps, "PRODUCERS": producers, "SLOTS": slots,
        "SLOT_BYTES": slot_bytes(segments), "REST_BYTES": rest + 512,
    }  # fmt: skip
    return Plan(tuple(constants.items()), threads, slots * slot_bytes(segments) + rest + 512)


def arguments(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, out: Tensor) -> bytes:
    """The struct `Arguments` of cuda/dequant_ring.cu; x is [M, K], out [M, N]."""
    return _ARGUMENTS.pack(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1],
    )  # fmt: skip


@functools.cache
def device_of(device: torch.device) -> Device:
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@functools.lru_cache(maxsize=256)
def ready(kind: Kind, device: torch.device, n: int, **choices: int) -> _cuda.Kernel | str:
    """The compiled kernel, or why there is none."""
    of = device_of(device)
    fitting = plan(kind, of, **choices)
    if isinstance(fitting, str):
        return fitting
    grid = min(-(-n // TILE), of.multiprocessors)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda.kernel("dequant_ring", fitting.constants, index, grid, fitting.threads, fitting.shared_bytes)


def ring_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    activation: str = "none", early: bool = False, **choices: int,
) -> Tensor:  # fmt: skip
    """The product for inputs that `supports` takes, through an activation of `_gemv_common.ACTIVATIONS`.

    early: the launch may begin before the one before it has ended, which then writes nothing that is read but x.
    choices: of `plan`, for measurements.

    Raises:
        RuntimeError: the kernel does not compile, or does not fit the device.
    """
    n, k = codes.shape[0], int(x.shape[-1])
    kernel = ready(kind_of(x, codes, scale, zero, bias, form, activation, early), x.device, n, **choices)
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    flat = x.reshape(-1, k).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    out = flat.new_empty(flat.shape[0], n)
    kernel.start(arguments(flat, codes, scale, zero, bias, out), torch.cuda.current_stream(x.device).cuda_stream, early)
    return out.view(*x.shape[:-1], n)
