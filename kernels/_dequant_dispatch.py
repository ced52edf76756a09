"""Which kernels `dequant_linear` runs: a few rows go to `_dequant_rows`, some to `_dequant_tiled`; for more the weight
is written out.

The product's library reads a weight that was just written from L2 in part, so writing it out costs less than it reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import _dequant_decode as written
from . import _dequant_rows as few
from . import _dequant_tiled as tiled
from .packed_weight import COMPUTE, Format

# Rows of x up to which each way of reading the codes in the product is the faster one, for 8 and 4 bits: all of a row's
# warps by themselves, and tiles. To be measured.
CROSSOVER = {8: (32, 256), 4: (32, 256)}


def supports(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format
) -> str | None:
    """Why there is no kernel for these, or None."""
    return written.supports(x, codes, scale, zero, lut, form)


def run(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, bias: Tensor | None, form: Format
) -> Tensor:
    """`dequant_linear` of inputs that `supports` takes, contiguous."""
    rows = x.numel() // max(x.shape[-1], 1)
    up_to = CROSSOVER[form.bits]
    if 0 < rows <= up_to[0] and few.supports(x, codes, scale, zero, lut, form) is None:
        return few.rows_linear(x, codes, scale, zero, lut, bias, form)
    if 0 < rows <= up_to[1] and tiled.supports(x, codes, scale, zero, lut, form) is None:
        return tiled.tiled_linear(x, codes, scale, zero, lut, bias, form)
    weight = written.decode_on_device(codes, scale, zero, lut, form, x.dtype)
    if form.arithmetic != "output":
        return F.linear(x, weight, bias)
    out = (F.linear(x, weight) * scale.flatten().to(COMPUTE[form.compute])).to(x.dtype)
    return out if bias is None else out + bias
