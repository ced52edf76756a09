"""Codes whose bits lie in several places of a block: GGUF's types of 2, 3, 5 and 6 bits.

A block is the last dimension of the codes, and has its planes behind one another. A plane of b bits in runs of r
bytes holds, in each run, 8 / b runs of r columns: the lowest b bits of the r bytes are the first. The widest plane has
the low bits of the codes, the others follow. A layout names the planes as they lie: "4x64+2x32" (Q6_K) is four bits of
each code in runs of 64 bytes, then two higher ones in runs of 32; "1x32+4x32" (Q5_K) has the highest bit first.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 5, 6)


class Plane(NamedTuple):
    """`bits` of each code, in runs of `run` bytes."""

    bits: int
    run: int


@functools.cache
def planes(layout: str) -> tuple[Plane, ...]:
    """The planes of a layout, as they lie; none when it is no such layout."""
    if re.fullmatch(r"[124]x[1-9]\d*(\+[124]x[1-9]\d*)*", layout) is None:
        return ()
    return tuple(Plane(*map(int, plane.split("x"))) for plane in layout.split("+"))


def check_layout(bits: int, layout: str) -> None:
    """Raises ValueError unless the layout has codes of that many bits."""
    found = planes(layout)
    if sum(plane.bits for plane in found) != bits or len({plane.bits for plane in found}) != len(found):
        raise ValueError(f"nibbles is {layout!r}; allowed for {bits} bits: planes of 1, 2, 4 bits, as '4x64+2x32'")


def check_blocks(codes: Tensor, layout: str) -> None:
    """Raises ValueError unless the codes' last dimension is a block of the layout."""
    size, found = codes.shape[-1], planes(layout)
    weights, rest = divmod(8 * size, sum(plane.bits for plane in found))
    if rest or any(weights % (8 // plane.bits * plane.run) for plane in found):
        raise ValueError(f"codes have blocks of {size} bytes; allowed: whole runs of {layout!r}")


def unpack_planes(codes: Tensor, layout: str) -> Tensor:
    """The codes of [N, ..., block] bytes, one an element: uint8 [N, K]."""
    found = planes(layout)
    weights = 8 * codes.shape[-1] // sum(plane.bits for plane in found)
    parts = torch.split(codes, [weights * plane.bits // 8 for plane in found], -1)
    whole, low = torch.zeros((), dtype=torch.uint8, device=codes.device), 0
    for plane, part in sorted(zip(found, parts, strict=True), key=lambda pair: -pair[0].bits):
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=codes.device).view(-1, 1)
        bits = (part.unflatten(-1, (-1, 1, plane.run)) >> shifts) & (2**plane.bits - 1)
        whole, low = whole | bits.flatten(-3) << low, low + plane.bits
    return whole.flatten(1)
