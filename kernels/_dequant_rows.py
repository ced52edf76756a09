"""A few rows times a weight of codes, for `dequant_linear`: what the Gluon kernel takes, and its launch.

The weight is the product's operand of 16 rows, read where it lies, and one launch does all: WARPS warps share BLOCK_N
of its rows and take their columns in turns. A zero point is subtracted in x's dtype, scales multiply sums in fp32. A
matrix instruction needs 32 bytes of a row at least, all of one scale, hence the least group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dequant_codes import BF16, FP16, convert, reorder, split
from ._dequant_rows_kernel import MISSING, gl, kernel
from ._gemv_common import activated, launch_options, starts_early
from ._ops import INTERPRETED, launch, no_triton, on_device_of
from .packed_weight import COMPUTE, Format, weight_shape

MAX_ROWS = 64
_NAMES = {torch.float16: FP16, torch.bfloat16: BF16}


class Config(NamedTuple):
    """Rows of the weight in a program, its warps, tiles that are read ahead, steps written out (0: up to ten), and
    programs that share a row's sums (their results are added up by a second launch)."""

    block_n: int = 16
    warps: int = 4
    ahead: int = 2
    unroll: int = 0
    parts: int = 1
    tile: int = 128


def run_of(codes: Tensor, form: Format) -> int | None:
    """Bytes whose low halves lie side by side in a row, 0 where a byte has neighbours, or None for other orders."""
    if form.bits == 8 or form.nibbles in ("low", "high"):
        return 0
    return int(codes.shape[-1]) if form.nibbles in ("half", "half_high") else None


def tile_of(codes: Tensor, form: Format, most: int = 128) -> int | None:
    """Bytes of a row that a step takes: they have one scale (for each half of "half"); or None."""
    _, k = weight_shape(codes, form)
    run = run_of(codes, form)
    if run is None:
        return None
    row_bytes = k * form.bits // 8
    per_group = form.group if form.bits == 8 or run else form.group // 2
    tile = most
    while tile >= 32:
        one_scale = form.group >= k or per_group % tile == 0
        if row_bytes % tile == 0 and one_scale and run % tile == 0:
            return tile
        tile //= 2
    return None


def config(m: int, n: int, k: int, form: Format) -> Config:
    """benchmarks/bench_dequant_linear.py --sweep tries others."""
    block_n = 16 if m <= 16 else 32
    warps = 8 if n // block_n < 512 else 4
    parts = 1
    # less than a program a multiprocessor: else the launches that add the parts up cost more than they save
    while n // block_n * parts < 132 and parts < 4 and k >= 4096 * parts:
        parts *= 2
    return Config(block_n, warps, parts=parts)


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
    least = (8, 9) if form.kind.startswith("fp8") else (8, 0)
    if torch.cuda.get_device_capability(x.device) < least:
        return f"the device is older than sm_{least[0]}{least[1]}"
    return no_layout(x, codes, scale, zero, lut, form)


def no_layout(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why the kernel cannot read these tensors, on any device, or None."""
    _, k = weight_shape(codes, form)
    rows = x.numel() // max(int(x.shape[-1]), 1)
    if x.dtype not in _NAMES:
        return f"dtype is {x.dtype}; allowed: fp16, bf16"
    if not 1 <= rows <= MAX_ROWS:
        return f"there are {rows} rows; allowed: 1 to {MAX_ROWS}"
    if form.arithmetic not in ("sub_mul", "output"):
        return f"arithmetic is {form.arithmetic!r}; allowed: sub_mul, output"
    if abs(form.offset) > (100 if form.bits == 8 and form.kind == "int" else 16 if form.bits == 4 else 255):
        return f"offset is {form.offset}, not exact in 16 bits"
    if zero is not None and lut is not None:
        return "a table of 16 and a zero point"
    parts = (codes, scale, *(() if zero is None else (zero,)), *(() if lut is None else (lut,)))
    if not all(part.is_contiguous() for part in parts):
        return "codes, scale or zero point are not contiguous"
    if codes.data_ptr() % 16 or k % 16:
        return "codes do not start at a multiple of 16 bytes, or a row is no multiple of 16"
    if tile_of(codes, form) is None:
        return f"{form.bits}-bit codes {form.nibbles!r} with groups of {form.group} and K = {k} do not fill the tiles"
    return None


def _zeros(x: Tensor, zero: Tensor | None, form: Format) -> int:
    """How many numbers of x's dtype a zero point is: two where it may have more bits."""
    if zero is None:
        return 0
    return 1 if x.dtype in (zero.dtype, COMPUTE[form.compute]) or zero.dtype in (torch.uint8, torch.int8) else 2


def constants(x: Tensor, codes: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format, chosen: Config,
              activation: str = "none", early: bool = False) -> dict[str, Any]:  # fmt: skip
    """The kernel's constants, but for Triton's own options."""
    _, k = weight_shape(codes, form)
    rows = x.numel() // k
    tile = tile_of(codes, form, chosen.tile)
    assert tile is not None
    blocks = k * form.bits // 8 // tile
    turns = -(-blocks // chosen.warps)
    steps = -(-turns // chosen.parts)
    most = min(steps, chosen.unroll or 10)
    unroll = next(u for u in range(most, 0, -1) if steps % u == 0)
    if chosen.parts == 1 and unroll < most / 2:  # steps past the end add nothing; with parts they are the next one's
        unroll = most
    name, run = _NAMES[x.dtype], run_of(codes, form)
    converted, operands = convert(form, name, _zeros(x, zero, form))
    halves, halves_operands = reorder(form) if run and form.kind != "lut16" else split(form)
    return {
        "BITS": form.bits, "TABLE": form.kind == "lut16", "CONVERT": converted, "CONVERT_OPERANDS": operands,
        "SPLIT": halves, "SPLIT_OPERANDS": halves_operands, "HIGH_FIRST": form.nibbles.endswith("high"), "RUN": run,
        "K": k, "ROWS": form.rows, "GROUP": min(form.group, k), "COMPUTE": getattr(gl, form.compute),
        "ZEROS": _zeros(x, zero, form), "BIASED": bias is not None, "DTYPE": getattr(gl, name.replace("fp", "float")
        .replace("bf", "bfloat")), "BLOCK_M": max(8, 1 << (rows - 1).bit_length()), "BLOCK_N": chosen.block_n,
        "TILE": tile, "WARPS": chosen.warps, "PARTS": chosen.parts, "AHEAD": min(chosen.ahead, unroll - 1),
        "UNROLL": unroll, "ACTIVATION": activation if chosen.parts == 1 else "none", "EARLY": early,
    }  # fmt: skip


def rows_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    chosen: Config | None = None, activation: str = "none", early: bool = False,
) -> Tensor:  # fmt: skip
    """The product for inputs that `supports` takes, through an activation of `_gemv_common.ACTIVATIONS`.

    early: the launch may begin before the one before it has ended, which then writes nothing that is read but x.
    """
    n, k = weight_shape(codes, form)
    flat = x.reshape(-1, k).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    chosen = chosen or config(flat.shape[0], n, k, form)
    early = starts_early(x, early)
    known = constants(flat, codes, zero, bias, form, chosen, activation, early)
    words = flat.view(torch.int32) if form.bits == 4 and known["RUN"] == 0 else flat
    # 8-bit floats go through the registers of bytes: Triton's own type would be converted by it
    integers = codes.view(torch.int8) if form.kind.startswith("fp8") else codes
    alone = chosen.parts == 1
    out = flat.new_empty(flat.shape[0], n) if alone else flat.new_empty(
        chosen.parts, flat.shape[0], n, dtype=torch.float32)  # fmt: skip
    grid = -(-n // chosen.block_n) * chosen.parts
    arguments = [words, integers, scale, scale if zero is None else zero, scale if lut is None else lut,
                 scale if bias is None else bias, out, flat.shape[0], n]  # fmt: skip
    with on_device_of(x):
        launch(kernel, grid, arguments, {**known, "num_warps": chosen.warps, **launch_options(early)})
    if not alone:
        out = activated(out.sum(0), activation).to(x.dtype)
    return out.view(*x.shape[:-1], n)
