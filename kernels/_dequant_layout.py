"""Where a weight's codes lie in memory, for kernels that read them there whatever library laid them out.

GGUF's blocks have a scale of two bytes before the codes of 32 weights, so a row of codes is pieces of 32 bytes, 34
apart; GPTQ's words of eight columns lie N words apart, and neighbours in memory are neighbouring rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .packed_weight import Format, weight_shape


class Bytes(NamedTuple):
    """Byte b of row n of codes lies at n * row + b // span * between + b % span."""

    span: int
    between: int
    row: int


def bytes_of(codes: Tensor) -> Bytes | None:
    """Where codes [N, ...] of one byte an element lie, or None when that takes more than three numbers to say."""
    merged: list[tuple[int, int]] = [(1, 1)]
    for size, stride in zip(reversed(codes.shape[1:]), reversed(codes.stride()[1:]), strict=True):
        inner, step = merged[-1]
        if size == 1:
            continue
        if inner == 1:
            merged[-1] = size, stride
        elif stride == inner * step:
            merged[-1] = inner * size, step
        else:
            merged.append((size, stride))
    if merged[0][1] != 1:
        merged.insert(0, (1, 1))
    if len(merged) > 2:
        return None
    return Bytes(merged[0][0], merged[1][1] if len(merged) == 2 else 0, codes.stride(0))


def from_aligned(codes: Tensor) -> tuple[Tensor, int]:
    """Codes as a tensor that starts at the multiple of 16 bytes before them, and how many bytes before that is.

    Compilers know nothing else of an address than that it is a multiple of 16.
    """
    lead = codes.data_ptr() % 16
    if lead > codes.storage_offset():
        return codes, 0
    return codes.as_strided((1,), (1,), codes.storage_offset() - lead), lead


def strides(values: Tensor) -> tuple[int, int]:
    """Strides of scales or zero points [rows, groups], 0 where there is only one."""
    return tuple(0 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True))  # type: ignore[return-value]


def run_of(codes: Tensor, form: Format) -> int | None:
    """Bytes whose low halves lie side by side in a row, 0 where a byte has neighbours, or None for two rows a byte."""
    if form.bits == 8 or form.nibbles in ("low", "high"):
        return 0
    return int(codes.shape[-1]) if form.nibbles in ("half", "half_high") else None


def bytes_in_row(codes: Tensor, form: Format) -> int:
    """Bytes of codes in a row of them, which is two rows of the weight for nibbles "rows"."""
    _, k = weight_shape(codes, form)
    return k if form.bits == 8 or form.nibbles.startswith("rows") else k // 2
