"""Some rows times a weight of codes on Hopper, for `dequant_linear`: what the Gluon kernel takes, and its launch.

The product is weight @ x.T: the weight is the operand that Hopper's products take from registers, so codes go from
shared memory into registers, are decoded there and are multiplied from there. They are read where they lie. A lane
takes bytes that lie side by side; the product's lanes have columns in another order, so x's columns are put into that
order by a small launch before (`arranged`); the sum over them does not depend on it.

A weight with one scale a row is not rounded: the scale multiplies the sum. With groups, a weight is rounded to x's
dtype as its source does. Results of PARTS parts are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._bit_planes import BITS
from ._dequant_codes import BF16, FP16, convert, order
from ._dequant_layout import run_of
from ._dequant_rows import _NAMES, _zeros, tile_of
from ._dequant_rows import no_layout as rows_no_layout
from ._dequant_tiled_kernel import MISSING, gl, kernel
from ._ops import INTERPRETED, launch, no_triton, on_device_of, tl, triton
from .packed_weight import Format, weight_shape

try:
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # MISSING says so
    gdc_launch_dependents = None

MAX_ROWS = 1024
SHARED = 227 << 10  # bytes of shared memory of a multiprocessor for programs
REGISTERS = 65536
PROGRAMS = 132  # multiprocessors of an H100 or H200
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Config(NamedTuple):
    """How a product is cut.

    Attributes:
        block_m: rows of x in a tile: 32, 64, 128 or 256.
        teams: groups of four warps, each with 64 rows of the weight: 1 to 4.
        programs: on a multiprocessor at a time.
        parts: programs that share a tile's sums.
        tile: bytes of a row of the weight in a step, at most: 32, 64 or 128.
        stages: steps under way, at most.
        early: begins while x is still being arranged (programmatic dependent launch).
    """

    block_m: int = 64
    teams: int = 2
    programs: int = 1
    parts: int = 1
    tile: int = 128
    stages: int = 8
    early: bool = False


def config(m: int, n: int, k: int, form: Format) -> Config:
    """benchmarks/bench_dequant_linear.py --sweep --rows 64,128,256 tries others."""
    least = max(32, min(1 << (m - 1).bit_length(), 256))
    shapes = [(least, 2)] if m <= 128 else [(256, 2), (128, 3), (128, 2)]

    def tiles_of(block_m: int, teams: int) -> int:
        return -(-m // block_m) * -(-n // (64 * teams))

    block_m, teams = min(shapes, key=lambda shape: -(-tiles_of(*shape) // PROGRAMS) * shape[0] * shape[1])
    tile = 128 if form.bits == 8 and m <= 64 else 64
    steps = k * form.bits // 8 // tile
    parts = max(1, min(PROGRAMS // tiles_of(block_m, teams), steps // 4, 8))  # a part has to be worth its sums
    return Config(block_m, teams, 1, parts, tile)


def stages_that_fit(chosen: Config, tile: int, bits: int) -> int:
    """The steps under way that fit in shared memory, up to the configured ones."""
    step = tile * (64 * chosen.teams + 2 * chosen.block_m * (8 // bits))
    return min(chosen.stages, (SHARED // chosen.programs - 2048) // step)


def registers(chosen: Config) -> tuple[int, int]:
    """Registers a thread of the launch, and of a group that multiplies: the warp that moves tiles has 24."""
    threads = 128 * (chosen.teams + 1)
    each = min(REGISTERS // chosen.programs // threads // 8 * 8, 248)
    return each, min((each * threads - 24 * 128) // (128 * chosen.teams) // 8 * 8, 240)


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot take these, or None."""
    if reason := no_triton(x):
        return reason
    if INTERPRETED:
        return "Gluon kernels cannot be interpreted"
    if MISSING:
        return MISSING
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the device is not sm_90"
    return no_layout(x, codes, scale, zero, lut, form)


def no_layout(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot read these tensors, on any device, or None."""
    rows = x.numel() // max(int(x.shape[-1]), 1)
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    if form.bits in BITS:
        return f"codes have {form.bits} bits; allowed: 8, 4"
    if form.nibbles.startswith("rows") or form.arithmetic not in ("sub_mul", "output"):
        return f"nibbles are {form.nibbles!r} and arithmetic is {form.arithmetic!r}; allowed: no rows; sub_mul, output"
    if not all(part is None or part.is_contiguous() for part in (codes, scale, zero)):
        return "codes, scale or zero point are not contiguous"
    if codes.data_ptr() % 16:
        return "codes do not start at a multiple of 16 bytes"
    if reason := rows_no_layout(x.reshape(-1, x.shape[-1])[:1], codes, scale, zero, lut, form):
        return reason
    return None if (tile_of(codes, form) or 0) >= 32 else f"groups of {form.group} do not fill the tiles"


@triton.jit
def _arrange(x, out, K: tl.constexpr, PER_BYTE: tl.constexpr, HIGH_FIRST: tl.constexpr, RUN: tl.constexpr,
             SWAPPED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) // ((K + BLOCK - 1) // BLOCK)
    at = tl.program_id(0) % ((K + BLOCK - 1) // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    half = at // (TILE * PER_BYTE // 2)
    side = at // (TILE // 2) % PER_BYTE
    within = at % (TILE // 2)  # 16 s + 8 h + 2 t + e: lane t's word s has two pairs h
    word, lane = within // 16, within // 2 % 4
    byte = within // 8 % 2 * 2 + within % 2
    if SWAPPED:
        byte = byte // 2 + byte % 2 * 2
    byte += half // 2 * TILE + lane * (TILE // 4) + half % 2 * (TILE // 8) + word * 4
    if HIGH_FIRST:
        side = 1 - side
    if PER_BYTE == 1:
        column = byte
    elif RUN == 0:
        column = 2 * byte + side
    else:
        column = byte // RUN * (2 * RUN) + byte % RUN + side * RUN
    start = row.to(tl.int64) * K
    tl.store(out + start + at, tl.load(x + start + column, at < K), at < K)


def arranged(x: Tensor, codes: Tensor, form: Format, tile: int, early: bool = False) -> Tensor:
    """x [M, K], contiguous, with its columns in the order in which the kernel's lanes have those of the weight."""
    m, k = x.shape
    out = torch.empty_like(x)
    block = 512
    constants = {
        "K": k, "PER_BYTE": 8 // form.bits, "HIGH_FIRST": form.nibbles.endswith("high"), "RUN": run_of(codes, form),
        "SWAPPED": order(form) == (0, 2, 1, 3), "TILE": tile, "BLOCK": block, "EARLY": early, "num_warps": 4,
    }  # fmt: skip
    launch(_arrange, m * -(-k // block), [x, out], constants)
    return out


@triton.jit
def _add(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, inside)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * size.to(tl.int64) + at, inside)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def _layout(tile: int) -> Any:
    """Of the codes' bytes [64, tile]: tile / 4 side by side a lane, of two rows."""
    bits = [[0, 1 << i] for i in range((tile // 4).bit_length() - 1)]
    lanes = [[0, tile // 4], [0, tile // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([*bits, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, tile])


def constants(x: Tensor, codes: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
              chosen: Config) -> dict[str, Any]:  # fmt: skip
    """The kernel's constants, but for Triton's own options."""
    _, k = weight_shape(codes, form)
    tile = tile_of(codes, form, chosen.tile)
    assert tile is not None
    name = _NAMES[x.dtype]
    converted, operands = convert(form, name, _zeros(x, zero, form))
    pairs = {FP16: "f16x2", BF16: "bf16x2"}[name]
    grouped = form.group < k
    return {
        "BITS": form.bits, "TABLE": form.kind == "lut16", "CONVERT": converted, "CONVERT_OPERANDS": operands,
        "MULTIPLY": f"mul.rn.{pairs} $0, $2, $4; mul.rn.{pairs} $1, $3, $5;",
        "SCALED": "after" if not grouped else "same" if form.compute == _DTYPES[x.dtype] else "wide",
        "HIGH_FIRST": form.nibbles.endswith("high"), "RUN": run_of(codes, form), "K": k, "ROWS": form.rows,
        "GROUP": min(form.group, k), "COMPUTE": getattr(gl, form.compute), "ZEROS": _zeros(x, zero, form),
        "BIASED": bias is not None, "DTYPE": getattr(gl, _DTYPES[x.dtype]), "CODES": _layout(tile),
        "HALVES": _layout(tile // 2), "TEAMS": chosen.teams, "BLOCK_M": chosen.block_m, "TILE": tile,
        "STAGES": stages_that_fit(chosen, tile, form.bits), "PARTS": chosen.parts, "EARLY": chosen.early,
        "REGISTERS": registers(chosen)[1],
    }  # fmt: skip


def _descriptor(x: Tensor, rows: int, lanes: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.uint8 if x.dtype == torch.uint8 else getattr(gl, _DTYPES[x.dtype])
    layout = gl.NVMMASharedLayout.get_default_for([rows, lanes], dtype)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, lanes], layout)


def tiled_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    chosen: Config | None = None,
) -> Tensor:  # fmt: skip
    """The product for inputs that `supports` takes."""
    n, k = weight_shape(codes, form)
    flat = x.reshape(-1, k).contiguous()
    m = flat.shape[0]
    chosen = chosen or config(m, n, k, form)
    known = constants(flat, codes, zero, bias, form, chosen)
    out = flat.new_empty(m, n)
    sums = out if chosen.parts == 1 else flat.new_empty(chosen.parts, m, n, dtype=torch.float32)
    read = codes.view(torch.uint8).view(n, -1)
    with on_device_of(x):
        ordered = arranged(flat, codes, form, known["TILE"], chosen.early)
        width = known["TILE"] * 4 // form.bits
        arguments = [_descriptor(ordered, chosen.block_m, width), _descriptor(read, 64, known["TILE"]), scale,
                     scale if zero is None else zero, scale if lut is None else lut, scale if bias is None else bias,
                     sums, m, n]  # fmt: skip
        options = {**known, "num_warps": 4, "maxnreg": registers(chosen)[0], "launch_pdl": chosen.early}
        grid = -(-m // chosen.block_m) * -(-n // (64 * chosen.teams)) * chosen.parts
        launch(kernel, grid, arguments, options)
        if sums is not out:
            block = 1024
            launch(_add, -(-out.numel() // block), [sums, out, out.numel()],
                   {"PARTS": chosen.parts, "BLOCK": block, "num_warps": 4})  # fmt: skip
    return out.view(*x.shape[:-1], n)
