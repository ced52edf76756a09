"""Which kernels `dequant_linear` runs: a few rows go to `_dequant_ring` or `_dequant_rows`, some to `_dequant_tiled`;
for more the weight is written out.

The product's library reads a weight that was just written from L2 in part, so writing it out costs less than it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from . import _dequant_columns as columns
from . import _dequant_decode as written
from . import _dequant_ring as ring
from . import _dequant_rows as few
from . import _dequant_tiled as tiled
from ._gemv_common import activated
from .packed_weight import COMPUTE, Format, weight_shape


class Crossover(NamedTuple):
    """Rows of x up to which a way of reading the codes in the product is the fastest one.

    Attributes:
        rows: all of a row's warps by themselves (`_dequant_rows`), where tiles could be used, too.
        rows_alone: the same where they could not, and the weight would be written out.
        tiled: tiles (`_dequant_tiled`), against writing the weight out.
    """

    rows: int
    rows_alone: int
    tiled: int


# By bits of a code, of benchmarks/results/dequant_linear.jsonl (8 and 64 rows, 256 and 512): what
# benchmarks/bench_dequant_linear.py --crossover makes of its rows.
CROSSOVER = {8: Crossover(16, 32, 512), 4: Crossover(16, 32, 256)}
# Of codes in planes of bits, as of 4 bits; not measured.
PLANES = Crossover(16, 32, 0)
# Rows of x up to which, and weights of 4 bits from which on, the persistent kernel is taken where it can be
# (benchmarks/results/dequant_ring.jsonl): 14336 x 4096 in 14.1 us instead of 17.9 (one row) and 16.5 instead of 18.3
# (eight), but 10240 x 2560 in 8.7 instead of 7.6, and int8 is slower at both.
RING_ROWS, RING_SIZE = 8, 48 << 20
# Rows of x up to which the op is measured to beat Inductor on sm_90: behind these, writing 4-bit weights out changed
# since it was measured.
MEASURED_ROWS = 256


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why there is no kernel for these, or None."""
    return written.supports(x, codes, scale, zero, lut, form)


def unmeasured_rows(rows: int | None) -> str | None:
    """Why a number of rows of x, None where it is not static, is not like those measured to win, or None."""
    if rows is None:
        return f"the number of rows is not static; measured to win for 1 to {MEASURED_ROWS}"
    return None if 1 <= rows <= MEASURED_ROWS else f"{rows} rows; measured to win for 1 to {MEASURED_ROWS}"


def unmeasured(codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format) -> str | None:
    """Why a weight is not like those measured to win with few rows of x, or None."""
    if few.MISSING:
        return few.MISSING
    _, k = weight_shape(codes, form)
    int8 = form.bits == 8 and form.kind == "int" and form.group >= k and zero is None
    int4 = form.bits == 4 and form.kind in ("int", "uint") and form.nibbles == "low" and form.group % 128 == 0
    if not (int8 or int4) or form.rows != 1 or form.arithmetic != "sub_mul":
        return "not measured to win for this format, only for int8 per row and int4 (low nibbles) in groups of 128"
    if k % 16 or few.tile_of(codes, form) is None:
        return f"K = {k} does not fill the tiles of what is measured to win"
    if not all(part is None or part.is_contiguous() for part in (codes, scale, zero)):
        return "not measured to win: codes, scale or zero point are not contiguous"
    return None


def has_epilogue(rows: int | None) -> bool:
    """Whether an activation costs no launch of its own: for a few rows, whose number is known."""
    return rows is not None and 0 < rows <= min(each.rows for each in CROSSOVER.values())


def run(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """`dequant_linear` of inputs that `supports` takes, contiguous."""
    rows = x.numel() // max(x.shape[-1], 1)
    up_to = CROSSOVER.get(form.bits, PLANES)
    n, k = weight_shape(codes, form)
    if 0 < rows <= RING_ROWS and form.bits == 4 and n * k >= RING_SIZE:
        kernel = ring.kernel_for(x, codes, scale, zero, bias, form, activation)
        if not isinstance(kernel, str):
            return ring.ring_linear(kernel, x, codes, scale, zero, bias)
    if 0 < rows <= up_to.rows and few.supports(x, codes, scale, zero, lut, form) is None:
        return few.rows_linear(x, codes, scale, zero, lut, bias, form, activation=activation)
    if 0 < rows <= up_to.tiled and tiled.supports(x, codes, scale, zero, lut, form) is None:
        return activated(tiled.tiled_linear(x, codes, scale, zero, lut, bias, form), activation)
    if 0 < rows <= up_to.rows_alone and few.supports(x, codes, scale, zero, lut, form) is None:
        return few.rows_linear(x, codes, scale, zero, lut, bias, form, activation=activation)
    if columns.supports(x, codes, scale, zero, lut, form) is None:
        return columns.columns_linear(x, codes, scale, zero, bias, form, activation=activation)
    weight = written.decode_on_device(codes, scale, zero, lut, form, x.dtype)
    if form.arithmetic != "output":
        return activated(F.linear(x, weight, bias), activation)
    out = (F.linear(x, weight) * scale.flatten().to(COMPUTE[form.compute])).to(x.dtype)
    return activated(out if bias is None else out + bias, activation)
