"""What a quantised weight means: its parts, its format, and `decode`, the plain torch that turns them into numbers.

    weight[n, k] = (q[n, k] - offset - zero[n // rows, k // group]) * scale[n // rows, k // group]

and its relatives (`arithmetic`), where q is an integer, an 8-bit float, or an entry of a table of 16. Nothing is
repacked: the codes are read where they lie, so a weight that is written to later is read as it is then.

Parts, whatever library they come from:
- codes: [N, ...] of any strides. 8 bits: the dimensions behind N have K elements together, of int8, uint8 or an 8-bit
  float. 4 bits: K / 2 uint8 (`nibbles` says which two weights share one; for "rows" there are N / 2 rows of K bytes).
  2, 3, 5, 6 bits: uint8, the last dimension a block whose planes `_bit_planes` describes.
- scale: [ceil(N / rows), ceil(K / group)], float32, float16 or bfloat16.
- zero: as scale, floating point or integer, or None.
- lut: [16], floating point, for kind "lut16"; else None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._bit_planes import BITS, check_blocks, check_layout, unpack_planes

KINDS = ("int", "uint", "fp8_e4m3", "fp8_e5m2", "lut16")
NIBBLES = ("low", "high", "half", "half_high", "rows", "rows_high")
ARITHMETIC = ("sub_mul", "mul_add", "mul_sub", "output")
COMPUTE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Format(NamedTuple):
    """How the parts of a quantised weight are to be read; `dequant_linear` takes the fields one by one.

    Attributes:
        bits: of a code, 8 or 4; or 2, 3, 5, 6, for kind "uint".
        kind: "int" (two's complement), "uint", "fp8_e4m3", "fp8_e5m2", or "lut16": an index into `lut`.
        rows: rows of the weight that share a scale: 1, N (per tensor), 128 (blocks).
        group: columns that share a scale: K (per row), 128, 64, 32.
        offset: an integer subtracted from integer codes: 8 for codes 0..15 that stand for -8..7.
        nibbles: of 4-bit codes: "low" has column 2j in the low half of byte j and 2j + 1 in the high half. "half":
            in each run of P bytes, P the last dimension of the codes, the low halves are P columns and the high ones
            the P after them. "rows": the low half of byte [n, k] is row n and the high one row n + N / 2. "high",
            "half_high", "rows_high" the same with the high half first. 8-bit codes have "low"; those of 2, 3, 5, 6
            bits name their planes: "4x64+2x32".
        arithmetic: "sub_mul" (q - zero) * scale; "mul_add" q * scale + zero; "mul_sub" q * scale - zero; "output":
            the weight is q, and the product's result is multiplied by the scale of its column.
        compute: the type that each step is rounded to, scale and zero first; then the weight is cast to x's.
    """

    bits: int = 8
    kind: str = "int"
    rows: int = 1
    group: int = 1
    offset: int = 0
    nibbles: str = "low"
    arithmetic: str = "sub_mul"
    compute: str = "float32"


def check_format(form: Format) -> None:
    """Raises ValueError, naming the field, its value and what is allowed."""
    spread = form.bits in BITS
    kinds, nibbles = (("uint",), (form.nibbles,)) if spread else (KINDS, NIBBLES)
    bits = sorted((4, 8, *BITS))
    for name, allowed in (("bits", bits), ("kind", kinds), ("nibbles", nibbles), ("arithmetic", ARITHMETIC),
                          ("compute", tuple(COMPUTE))):  # fmt: skip
        if getattr(form, name) not in allowed:
            raise ValueError(f"{name} is {getattr(form, name)!r}; allowed: {', '.join(map(str, allowed))}")
    if form.rows < 1 or form.group < 1:
        raise ValueError(f"rows and group are {form.rows} and {form.group}; allowed: 1 and more")
    if spread:
        check_layout(form.bits, form.nibbles)
    if form.bits == 8 and form.nibbles != "low":
        raise ValueError(f"nibbles is {form.nibbles!r}; allowed for 8 bits: low")
    if (form.kind == "lut16" and form.bits != 4) or (form.kind in _FP8 and form.bits != 8):
        raise ValueError(f"bits is {form.bits} for kind {form.kind!r}; allowed: 4 for lut16, 8 for 8-bit floats")
    if form.offset and form.kind not in ("int", "uint"):
        raise ValueError(f"offset is {form.offset} for kind {form.kind!r}; allowed: 0")


def weight_shape(codes: Tensor, form: Format) -> tuple[int, int]:
    """[N, K] of the weight."""
    n, inner = codes.shape[0], 1
    for size in codes.shape[1:]:
        inner *= size
    if form.bits == 8:
        return n, inner
    if form.bits in BITS:
        return n, inner * 8 // form.bits
    return (2 * n, inner) if form.nibbles.startswith("rows") else (n, 2 * inner)


def check_parts(codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format) -> None:
    """Raises ValueError unless the parts are what the format says, naming the argument and what is allowed."""
    check_format(form)
    if form.bits != 8:
        types: tuple[torch.dtype, ...] = (torch.uint8,)
    else:
        types = (_FP8[form.kind],) if form.kind in _FP8 else (torch.int8,) if form.kind == "int" else (torch.uint8,)
    if codes.dtype not in types or codes.dim() < 2:
        raise ValueError(f"codes are {codes.dtype}{list(codes.shape)}; allowed: {types[0]}[N, ...]")
    if form.bits in BITS:
        check_blocks(codes, form.nibbles)
    n, k = weight_shape(codes, form)
    shape = (-(-n // form.rows), -(-k // form.group))
    if tuple(scale.shape) != shape or scale.dtype not in COMPUTE.values():
        raise ValueError(f"scale is {scale.dtype}{list(scale.shape)}; allowed: a float of 16 or 32 bits, {list(shape)}")
    if zero is not None and tuple(zero.shape) != shape:
        raise ValueError(f"zero.shape is {list(zero.shape)}; allowed: {list(shape)}")
    if (zero is None) and form.arithmetic in ("mul_add", "mul_sub"):
        raise ValueError(f"zero is None; allowed for arithmetic {form.arithmetic!r}: a tensor")
    if form.arithmetic == "output" and (zero is not None or shape[1] != 1 or form.rows not in (1, n)):
        raise ValueError("arithmetic is 'output'; allowed: for one scale a row, or one in all, and no zero")
    if (lut is not None) != (form.kind == "lut16") or (lut is not None and tuple(lut.shape) != (16,)):
        raise ValueError(f"lut is {None if lut is None else list(lut.shape)}; allowed: [16] for lut16, else None")


def unpacked(codes: Tensor, form: Format) -> Tensor:
    """The codes, one an element: [N, K]; those of less than 8 bits as uint8, or int8 for kind "int"."""
    if form.bits == 8:
        return codes.flatten(1)
    if form.bits in BITS:
        return unpack_planes(codes, form.nibbles)
    halves = [codes & 15, codes >> 4]
    if form.nibbles.endswith("high"):
        halves.reverse()
    where = form.nibbles.removesuffix("_high")
    if where == "rows":
        whole = torch.cat(halves).flatten(1)
    elif where == "half":
        whole = torch.cat(halves, -1).flatten(1)
    else:
        whole = torch.stack([half.flatten(1) for half in halves], -1).flatten(1)
    if form.kind == "int":
        return ((whole ^ 8).to(torch.int8)) - 8
    return whole


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, lut: Tensor | None, form: Format, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`, in the arithmetic of its source; without the scale for arithmetic "output".

    Raises:
        ValueError: when the parts are not what the format says.
    """
    check_parts(codes, scale, zero, lut, form)
    compute = COMPUTE[form.compute]
    q = unpacked(codes, form)
    if lut is not None:
        q = lut.to(compute)[q.int()]
    elif form.offset:
        q = (q.int() - form.offset).to(compute)
    else:
        q = q.to(compute)
    if form.arithmetic == "output":
        return q.to(dtype)
    scale = _spread(scale.to(compute), form, q.shape)
    offset = None if zero is None else _spread(zero.to(compute), form, q.shape)
    if form.arithmetic == "sub_mul":
        weight = q * scale if offset is None else (q - offset) * scale
    else:
        assert offset is not None
        weight = q * scale + offset if form.arithmetic == "mul_add" else q * scale - offset
    return weight.to(dtype)


def _spread(values: Tensor, form: Format, shape: torch.Size) -> Tensor:
    """One value a group as one value a weight (or one a row or column, which broadcast)."""
    for dim, size in ((0, form.rows), (1, form.group)):
        if values.shape[dim] != 1 and size != 1:
            values = values.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return values
