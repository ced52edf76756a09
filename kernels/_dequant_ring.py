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
from .packed_weight import COMPUTE, Format

MAX_ROWS = 16
TILE, PIECE, BUFFERS = 16, 64, 2
MOST_WARPS, PRODUCERS = 16, 3
MOST_SLOT, MOST_SLOTS, ENOUGH_SLOTS, MOST_SEGMENTS = 40 << 10, 24, 4, 16
OTHER_REGISTERS = 50  # of a thread, but for its part of x, with scales and sums
_TYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int8: 4, torch.uint8: 5, torch.int32: 6}
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
    """What a compiled kernel is for: `rows` of x, or fewer, and any of the weight."""

    form: Format
    k: int
    dtype: torch.dtype
    scale: torch.dtype
    zero: torch.dtype | None
    biased: bool
    activation: str = "none"
    rows: int = 8
    early: bool = False


def kind_of(x: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
            activation: str = "none", early: bool = False) -> Kind:  # fmt: skip
    k = int(x.shape[-1])
    rows = max(x.numel() // max(k, 1), 1)
    return Kind(form, k, x.dtype, scale.dtype, None if zero is None else zero.dtype, bias is not None, activation,
                1 << (rows - 1).bit_length(), early)  # fmt: skip


def no_layout(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format) -> str | None:
    """Why the kernel cannot read these tensors, on any device, or None."""
    rows = x.numel() // max(int(x.shape[-1]), 1)
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    if reason := _not_taken(kind_of(x, scale, zero, None, form), codes.shape[0]):
        return reason
    for part in (codes, scale, zero):
        if part is not None and not (part.is_contiguous() and part.data_ptr() % 16 == 0):
            return "codes, scale or zero point are not contiguous from a multiple of 16 bytes on"
    return None


@functools.lru_cache(maxsize=256)
def _not_taken(kind: Kind, n: int) -> str | None:
    """Why the kernel is not for such a weight of n rows, or None."""
    form, k = kind.form, kind.k
    if kind.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {kind.dtype}; allowed: fp16, bf16"
    if form.bits not in (4, 8) or form.kind not in ("int", "uint") or form.nibbles not in ("low", "high"):
        return (
            f"codes are {form.bits} bits, {form.kind!r}, {form.nibbles!r}; allowed: integers of 4 or 8 bits, in order"
        )
    if form.arithmetic not in ("sub_mul", "output") or form.rows != 1 or abs(form.offset) > 255:
        return f"arithmetic is {form.arithmetic!r}, with {form.rows} rows a scale and offset {form.offset}"
    if kind.zero is not None and kind.zero not in _TYPES:
        return f"zero points are {kind.zero}"
    columns = PIECE * 8 // form.bits
    if k % columns or (form.group < k and (form.group % columns or k % form.group)):
        return f"K = {k} and groups of {form.group}; allowed: multiples of {columns}"
    groups = k // min(form.group, k)
    if n < TILE or any(n * groups * t.itemsize % 16 for t in (kind.scale, kind.zero) if t is not None):
        return f"there are {n} rows of the weight; allowed: 16 and more, of scales that end at a multiple of 16 bytes"
    return None


@functools.lru_cache(maxsize=256)
def plan(
    kind: Kind, device: Device, segments: int = 0, warps: int = 0, slots: int = 0, producers: int = 0
) -> Plan | str:
    """How the work is divided, or why it cannot be. What is not 0 is taken as it is, for measurements."""
    pieces = kind.k * kind.form.bits // 8 // PIECE
    if segments:
        return _plan(kind, device, -(-pieces // -(-pieces // segments)), warps, slots, producers)
    found: Plan | str = ""
    for each in range(1, min(pieces, MOST_SEGMENTS) + 1):
        if -(-pieces // -(-pieces // each)) < each:  # one would be empty
            continue
        tried = _plan(kind, device, each, warps, slots, producers)
        if isinstance(tried, Plan):
            of = dict(tried.constants)
            if of["SLOT_BYTES"] <= MOST_SLOT and of["SLOTS"] >= ENOUGH_SLOTS:
                return tried
            found = tried
        elif not isinstance(found, Plan):
            found = tried
    return found


def _plan(kind: Kind, device: Device, segments: int, warps: int, slots: int, producers: int) -> Plan | str:
    """With parts of a tile that have 1 / segments of the columns."""
    form, k = kind.form, kind.k
    columns = PIECE * 8 // form.bits
    group, in_segment = min(form.group, k), -(-(k // columns) // segments)
    groups, row = k // group, in_segment * PIECE
    scales = TILE * groups * (kind.scale.itemsize + (0 if kind.zero is None else kind.zero.itemsize))
    slot_bytes = _whole(scales) + _whole(TILE * (row + (64 if row % 128 == 0 else 0)))
    own = -(-in_segment // (warps or MOST_WARPS))
    warps = -(-in_segment // own)
    threads = (warps + (producers or PRODUCERS) + 1) * 32

    column_tiles = -(-kind.rows // 8)
    of_x = segments * own * (columns // 32) * column_tiles * 4
    others = OTHER_REGISTERS + (0 if groups == 1 else segments * own * (2 * column_tiles + 4))
    registers = (
        16384 // (-(-threads // 128) * 32) // 8 * 8
    )  # a quarter of the multiprocessor has a quarter of the warps
    in_shared = of_x + others > registers
    if in_shared and others + 16 * column_tiles > registers:
        return f"the scales of K = {k} columns do not fit the registers"
    rest = BUFFERS * warps * TILE * 8 * column_tiles * 4 + 512 + (k * kind.rows * 2 if in_shared else 0)
    fitting = min((device.shared_bytes - rest) // slot_bytes, MOST_SLOTS)
    slots = slots or fitting
    if not 2 <= slots <= fitting:
        return f"beside {kind.rows} rows of x, {max(fitting, 0)} parts of a tile of K = {k} columns fit; needed: 2"
    producers = min(producers or PRODUCERS, slots)
    constants = {
        "BITS": form.bits, "K": k, "GROUP": group, "SIGNED": int(form.kind == "int"), "OFFSET": form.offset,
        "HIGH_FIRST": int(form.nibbles == "high"), "BFLOAT": int(kind.dtype == torch.bfloat16),
        "SCALE_TYPE": _TYPES[kind.scale], "ZERO_TYPE": 0 if kind.zero is None else _TYPES[kind.zero],
        "COMPUTE": _TYPES[COMPUTE[form.compute]], "BIASED": int(kind.biased),
        "ACTIVATION": ACTIVATIONS.index(kind.activation), "COLUMN_TILES": column_tiles,
        "X_ROWS": kind.rows if in_shared else 0, "EARLY": int(kind.early), "SEGMENTS": segments, "WARPS": warps,
        "PRODUCERS": producers, "SLOTS": slots, "SLOT_BYTES": slot_bytes, "REST_BYTES": rest,
    }  # fmt: skip
    return Plan(tuple(constants.items()), (warps + producers + 1) * 32, slots * slot_bytes + rest)


def _whole(size: int) -> int:
    """Bytes up to a multiple of 128."""
    return -(-size // 128) * 128


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
    """The compiled kernel for a weight of n rows, or why there is none."""
    of = device_of(device)
    fitting = plan(kind, of, **choices)
    if isinstance(fitting, str):
        return fitting
    grid = min(-(-n // TILE), of.multiprocessors)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda.kernel("dequant_ring", fitting.constants, index, grid, fitting.threads, fitting.shared_bytes)


def kernel_for(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
    activation: str = "none", early: bool = False, **choices: int,
) -> _cuda.Kernel | str:  # fmt: skip
    """The compiled kernel for such a product, or why it cannot take it.

    early: the launch may begin before the one before it has ended, which then writes nothing that is read but x.
    choices: of `plan`, for measurements.
    """
    if reason := _cuda.unavailable(x.device) or no_layout(x, codes, scale, zero, form):
        return reason
    return ready(kind_of(x, scale, zero, bias, form, activation, early), x.device, codes.shape[0], **choices)


def ring_linear(
    kernel: _cuda.Kernel, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    early: bool = False,
) -> Tensor:  # fmt: skip
    """The product by the kernel that `kernel_for` found for it, [..., N]."""
    n, k = codes.shape[0], x.shape[-1]
    flat = x.reshape(-1, k).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    out = flat.new_empty(flat.shape[0], n)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.start(arguments(flat, codes, scale, zero, bias, out), stream, early)
    return out.view(*x.shape[:-1], n)
