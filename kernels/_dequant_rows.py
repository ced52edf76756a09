"""A few rows times a weight of codes, for `dequant_linear`: what the Gluon kernel takes, and its launch.

The weight is the product's operand of 16 rows, read where it lies, and one launch does all: WARPS warps share BLOCK_N
of its rows and take their columns in turns. A zero point is subtracted in x's dtype, scales multiply sums in fp32. A
matrix instruction needs 16 columns of a row at least, all of one scale, hence the least group. What is added to codes
times scale (GGUF's Q4_K has such an offset) multiplies sums of x instead, in fp32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._bit_planes import BITS
from ._dequant_codes import BF16, FP16, convert, convert_planes, order, reorder, split
from ._dequant_layout import bytes_in_row, bytes_of, from_aligned, run_of, strides
from ._dequant_planes import High, halves
from ._dequant_rows_kernel import MISSING, gl, kernel
from ._gemv_common import activated
from ._ops import INTERPRETED, launch, no_triton, on_device_of
from .packed_weight import COMPUTE, Format, weight_shape

MAX_ROWS = 64
LEAST = 16  # bytes of a tile
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


def tile_of(codes: Tensor, form: Format, most: int = 128) -> int | None:
    """Bytes of a row that a step takes, of one scale (for each half of "half") and in pieces of 4 bytes; or None."""
    _, k = weight_shape(codes, form)
    run, where = run_of(codes, form), bytes_of(codes)
    if where is None:
        return None
    columns = 2 if form.bits == 4 and run == 0 else 1  # side by side, of a byte
    tile = most
    while tile >= LEAST:
        one_scale = form.group >= k or form.group % (columns * tile) == 0
        pieces = where.span % tile == 0 or (where.span % 4 == 0 and tile % where.span == 0)
        if bytes_in_row(codes, form) % tile == 0 and one_scale and (run or 0) % tile == 0 and pieces:
            return tile
        tile //= 2
    return None


def nibbles_of(codes: Tensor, form: Format) -> tuple[Tensor, Format, High | None]:
    """Codes of 4 or 8 bits as they are; those in planes as their lower halves, and where the higher bits lie."""
    return (codes, form, None) if form.bits not in BITS else halves(codes, form) or (codes, form, None)


def config(m: int, n: int, k: int, form: Format) -> Config:
    """benchmarks/bench_dequant_linear.py --sweep tries others."""
    n //= 2 if form.nibbles.startswith("rows") else 1
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
    if form.arithmetic in ("mul_add", "mul_sub") and form.group >= k:
        return f"arithmetic is {form.arithmetic!r} with one group a row; allowed: sub_mul, output"
    high: High | None = None
    if form.bits in BITS:
        codes, form, high = nibbles_of(codes, form)
        if high is None:
            return f"codes of {form.bits} bits lie as {form.nibbles!r}; allowed: 4 bits and the others in one byte"
        if zero is not None and form.arithmetic == "sub_mul":
            return "codes in planes and a zero point"
    most = 64 if high is not None else 16 if form.bits == 4 else 255
    if abs(form.offset) > (100 if form.bits == 8 and form.kind == "int" else most):
        return f"offset is {form.offset}, not exact in 16 bits"
    if zero is not None and lut is not None:
        return "a table of 16 and a zero point"
    if lut is not None and not lut.is_contiguous():
        return "the table is not contiguous"
    if any(part is not None and _length(part) >= 1 << 31 for part in (codes, scale, zero)):
        return "what belongs to a row lies further apart than 32 bits count"
    if k % 16 or codes.shape[0] == 0:
        return f"the weight is {list(weight_shape(codes, form))}; allowed: multiples of 16 columns"
    if tile_of(codes, form, _most(128, high)) is None:
        return (f"{form.bits}-bit codes {form.nibbles!r} {list(codes.shape)} with strides {list(codes.stride())} and "
                f"groups of {form.group} do not fill the tiles")  # fmt: skip
    return None


def _most(tile: int, high: High | None) -> int:
    """The most bytes of a tile: its higher bits lie side by side."""
    return tile if high is None else math.gcd(tile, high.run)


def _length(part: Tensor) -> int:
    """Elements from the first to the last one of a row."""
    return sum((size - 1) * stride for size, stride in zip(part.shape[1:], part.stride()[1:], strict=True))


def _zeros(x: Tensor, zero: Tensor | None, form: Format) -> int:
    """How many numbers of x's dtype a zero point is: two where it may have more bits."""
    if zero is None or form.arithmetic != "sub_mul":
        return 0
    return 1 if x.dtype in (zero.dtype, COMPUTE[form.compute]) or zero.dtype in (torch.uint8, torch.int8) else 2


def constants(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, form: Format,
              chosen: Config, lead: int = 0, activation: str = "none") -> dict[str, Any]:  # fmt: skip
    """The kernel's constants, but for Triton's own options. `lead`: see `from_aligned`, of `nibbles_of` the codes."""
    codes, form, high = nibbles_of(codes, form)
    _, k = weight_shape(codes, form)
    rows = x.numel() // k
    tile, where = tile_of(codes, form, _most(chosen.tile, high)), bytes_of(codes)
    assert tile is not None and where is not None
    blocks = bytes_in_row(codes, form) // tile
    turns = -(-blocks // chosen.warps)
    steps = -(-turns // chosen.parts)
    most = min(steps, chosen.unroll or 10)
    unroll = next(u for u in range(most, 0, -1) if steps % u == 0)
    if chosen.parts == 1 and unroll < most / 2:  # steps past the end add nothing; with parts they are the next one's
        unroll = most
    name, run = _NAMES[x.dtype], run_of(codes, form)
    natural = tile < 32 or high is not None  # four bytes of a lane are of two rows if they are less than 32
    if high is None:
        converted, operands = convert(form, name, _zeros(x, zero, form), natural)
    else:
        converted, operands = convert_planes(form.offset, high.bits, high.step, name)
    if form.bits == 4 and run == 0:
        arranged, arranged_operands = split(form, natural)
    elif order(form, natural) == (0, 1, 2, 3):
        arranged, arranged_operands = "", ""
    else:
        arranged, arranged_operands = reorder(form)
    apart = codes.shape[0] if run is None else 0
    two_scales = apart > 0 or bool(run and form.group < k and form.group % (2 * run))
    scale_n, scale_k = strides(scale)
    zero_n, zero_k = (0, 0) if zero is None else strides(zero)
    return {
        "BITS": form.bits, "TABLE": form.kind == "lut16", "CONVERT": converted, "CONVERT_OPERANDS": operands,
        "SPLIT": arranged, "SPLIT_OPERANDS": arranged_operands, "HIGH_FIRST": form.nibbles.endswith("high"),
        "RUN": run or 0, "HALVES": apart, "SIDES": 2 if two_scales else 1, "K": k, "ROWS": form.rows,
        "GROUP": min(form.group, k), "SCALE_N": scale_n, "SCALE_K": scale_k, "ZERO_N": zero_n, "ZERO_K": zero_k,
        "COMPUTE": getattr(gl, form.compute), "ZEROS": _zeros(x, zero, form),
        "ADDED": {"mul_add": 1, "mul_sub": -1}.get(form.arithmetic, 0), "BIASED": bias is not None,
        "DTYPE": getattr(gl, name.replace("fp", "float").replace("bf", "bfloat")),
        "BLOCK_M": max(8, 1 << (rows - 1).bit_length()), "BLOCK_N": chosen.block_n, "TILE": tile, "SPAN": where.span,
        "BETWEEN": where.between, "ROW": where.row, "LEAD": lead,
        "ALIGNED": math.gcd(tile // 8, where.span, where.between, where.row, lead, 0 if high is None else high.at),
        "HIGH_BITS": 0 if high is None else high.bits, "HIGH_RUN": 0 if high is None else high.run,
        "HIGH_AT": 0 if high is None else high.at, "WARPS": chosen.warps, "PARTS": chosen.parts,
        "AHEAD": min(chosen.ahead, unroll - 1), "UNROLL": unroll,
        "ACTIVATION": activation if chosen.parts == 1 else "none",
    }  # fmt: skip


def rows_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    chosen: Config | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """The product for inputs that `supports` takes, through an activation of `_gemv_common.ACTIVATIONS`."""
    n, k = weight_shape(codes, form)
    flat = x.reshape(-1, k).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    chosen = chosen or config(flat.shape[0], n, k, form)
    read, lead = from_aligned(nibbles_of(codes, form)[0])
    known = constants(flat, codes, scale, zero, bias, form, chosen, lead, activation)
    words = flat.view(torch.int32) if form.bits == 4 and run_of(codes, form) == 0 else flat
    # 8-bit floats go through the registers of bytes: Triton's own type would be converted by it
    integers = read.view(torch.int8) if form.kind.startswith("fp8") else read
    alone = chosen.parts == 1
    out = flat.new_empty(flat.shape[0], n) if alone else flat.new_empty(
        chosen.parts, flat.shape[0], n, dtype=torch.float32)  # fmt: skip
    grid = -(-codes.shape[0] // chosen.block_n) * chosen.parts
    arguments = [words, integers, scale, scale if zero is None else zero, scale if lut is None else lut,
                 scale if bias is None else bias, out, flat.shape[0], n]  # fmt: skip
    with on_device_of(x):
        launch(kernel, grid, arguments, {**known, "num_warps": chosen.warps})
    if not alone:
        out = activated(out.sum(0), activation).to(x.dtype)
    return out.view(*x.shape[:-1], n)
