"""Which kernels `dequant_linear` runs: a few rows go to `_dequant_ring` or `_dequant_rows`, some to `_dequant_tiled`;
for more the weight is written out.

The product's library reads a weight that was just written from L2 in part, so writing it out costs less than it reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import _dequant_decode as written
from . import _dequant_ring as ring
from . import _dequant_rows as few
from . import _dequant_tiled as tiled
from .packed_weight import COMPUTE, Format, weight_shape

# Rows of x up to which each way of reading the codes in the product is the faster one, for 8 and 4 bits: all of a row's
# warps by themselves, and tiles (benchmarks/results/dequant_linear.jsonl; 8 and 64 rows, 256 and 512).
CROSSOVER = {8: (16, 512), 4: (16, 256)}
# Rows of x up to which the persistent kernel is taken where it can be: none, as long as it is not measured.
RING_ROWS = 0
# Rows of x up to which the op is measured to beat Inductor on sm_90.
MEASURED_ROWS = 512


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


def run(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format,
    activation: str = "none", early: bool = False,
) -> Tensor:  # fmt: skip
    """`dequant_linear` of inputs that `supports` takes, contiguous."""
    rows = x.numel() // max(x.shape[-1], 1)
    up_to = CROSSOVER[form.bits]
    if 0 < rows <= RING_ROWS:
        kernel = ring.kernel_for(x, codes, scale, zero, bias, form, activation, early)
        if not isinstance(kernel, str):
            return ring.ring_linear(kernel, x, codes, scale, zero, bias, early)
    if 0 < rows <= up_to[0] and few.supports(x, codes, scale, zero, lut, form) is None:
        return few.rows_linear(x, codes, scale, zero, lut, bias, form)
    if 0 < rows <= up_to[1] and tiled.supports(x, codes, scale, zero, lut, form) is None:
        return tiled.tiled_linear(x, codes, scale, zero, lut, bias, form)
    weight = written.decode_on_device(codes, scale, zero, lut, form, x.dtype)
    if form.arithmetic != "output":
        return F.linear(x, weight, bias)
    out = (F.linear(x, weight) * scale.flatten().to(COMPUTE[form.compute])).to(x.dtype)
    return out if bias is None else out + bias
