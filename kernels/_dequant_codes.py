"""Codes of 8 and 4 bits as fp16 or bf16, four bytes a step, in PTX (sm_80 and later; 8-bit floats sm_89).

A number of few bits is put into the mantissa of a power of two, and that power subtracted: two cheap instructions for
two weights, where a conversion of integers runs at a quarter of their rate. All results are exact. A zero point is
subtracted from them in the same type.

Of 4-bit codes, a byte has two weights: there are two results, of the low and of the high halves. The elements of a step
come in the order `order`: integers 0, 2, 1, 3, as one mask then takes two of them from a word. Sums over them need no
other order if the activations have the same. Where the four bytes are not of one row, they have to be as they lie.

The idea is that of FasterTransformer's and Marlin's converters; see also "Who Says Elephants Can't Run" (Kim, 2022).
"""

from __future__ import annotations

import functools
import struct

from .packed_weight import Format

FP16, BF16 = "fp16", "bf16"


def order(form: Format, natural: bool = False) -> tuple[int, int, int, int]:
    """Which of four bytes each element of a step comes from; `natural`: as they lie in it, for an instruction more."""
    return (0, 2, 1, 3) if form.bits == 4 and form.kind != "lut16" and not natural else (0, 1, 2, 3)


def _pair(value: float, dtype: str) -> str:
    """Two of a number in `dtype`, as an immediate; the number has to be exact."""
    bits = struct.unpack("<H", struct.pack("<e", value))[0] if dtype == FP16 else _upper(value)
    return f"0x{bits:04x}{bits:04x}"


def _upper(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    assert bits & 0xFFFF == 0, value
    return bits >> 16


def _statements(registers: str, lines: list[str]) -> str:
    return "{ " + (f".reg .b32 {registers}; " if registers else "") + " ".join(f"{line};" for line in lines) + " }"


def _integers(signed: bool, offset: int, dtype: str) -> list[str]:
    """Four integers w as a, b, of two elements each."""
    if dtype == FP16:  # 1024 + q + 128, or 1024 + q
        lines = ["xor.b32 w, w, 0x80808080"] if signed else []
        return [
            *lines, "prmt.b32 a, w, 0x64646464, 0x4140", "prmt.b32 b, w, 0x64646464, 0x4342",
            f"mov.b32 u, {_pair(1024 + offset + 128 * signed, dtype)}", "sub.rn.f16x2 a, a, u", "sub.rn.f16x2 b, b, u",
        ]  # fmt: skip
    lines = [] if signed else ["xor.b32 w, w, 0x80808080"]
    lines += [
        "prmt.b32 a, w, 0x43434343, 0x4140",
        "prmt.b32 b, w, 0x43434343, 0x4342",
        f"mov.b32 u, {_pair(-1, dtype)}",
    ]
    for r in "ab":  # 128 + the low seven bits, less 128, or less 256 for a negative one
        lines += [f"and.b32 v, {r}, 0xff80ff80", f"and.b32 {r}, {r}, 0xff7fff7f", f"fma.rn.bf16x2 {r}, v, u, {r}"]
    rest = (0 if signed else 128) - offset
    if rest:
        lines += [f"mov.b32 u, {_pair(1, dtype)}", f"mov.b32 v, {_pair(rest, dtype)}"]
        lines += [f"fma.rn.bf16x2 {r}, {r}, u, v" for r in "ab"]
    return lines


def _floats(kind: str, dtype: str) -> list[str]:
    """Four 8-bit floats w as a, b."""
    if kind == "fp8_e5m2" and dtype == FP16:  # the upper half of an fp16
        return ["prmt.b32 a, w, 0, 0x1404", "prmt.b32 b, w, 0, 0x3424"]
    source = "e4m3x2" if kind == "fp8_e4m3" else "e5m2x2"
    lines = [".reg .b16 l, h", "mov.b32 {l, h}, w", f"cvt.rn.f16x2.{source} a, l", f"cvt.rn.f16x2.{source} b, h"]
    if dtype == BF16:
        lines += [".reg .f32 f, g"]
        for r in "ab":
            lines += [f"mov.b32 {{l, h}}, {r}", "cvt.f32.f16 f, l", "cvt.f32.f16 g, h", f"cvt.rn.bf16x2.f32 {r}, g, f"]
    return lines


def _nibbles(signed: bool, offset: int, dtype: str, natural: bool) -> list[str]:
    """Eight integers w as a, b (the low halves of the bytes) and c, d (the high halves)."""
    flip = 8 if signed else 0
    less = offset + flip
    # two bytes each in s and v, which have them in the places where a mask takes two codes
    lines = ["prmt.b32 s, w, 0, 0x4140", "prmt.b32 v, w, 0, 0x4342"] if natural else ["mov.b32 s, w", "shr.u32 v, w, 8"]
    if dtype == FP16:  # 1024 + q, and 1024 + 16 q from where the high half lies
        low, high = f"0x{0x6400 + flip:04x}{0x6400 + flip:04x}", f"0x{0x6400 + 16 * flip:04x}{0x6400 + 16 * flip:04x}"
        return [
            *lines,
            f"lop3.b32 a, s, 0x000f000f, {low}, 0x6a", f"lop3.b32 b, v, 0x000f000f, {low}, 0x6a",
            f"lop3.b32 c, s, 0x00f000f0, {high}, 0x6a", f"lop3.b32 d, v, 0x00f000f0, {high}, 0x6a",
            f"mov.b32 u, {_pair(1024 + less, dtype)}", "sub.rn.f16x2 a, a, u", "sub.rn.f16x2 b, b, u",
            f"mov.b32 u, {_pair(1 / 16, dtype)}", f"mov.b32 v, {_pair(-64 - less, dtype)}",
            "fma.rn.f16x2 c, c, u, v", "fma.rn.f16x2 d, d, u, v",
        ]  # fmt: skip
    magic = f"0x{0x4300 + flip:04x}{0x4300 + flip:04x}"  # 128 + q
    lines += ["mov.b32 a, s", "mov.b32 b, v", "shr.u32 c, s, 4", "shr.u32 d, v, 4",
              f"mov.b32 u, {_pair(1, dtype)}", f"mov.b32 v, {_pair(-128 - less, dtype)}"]  # fmt: skip
    lines += [f"lop3.b32 {r}, {r}, 0x000f000f, {magic}, 0x6a" for r in "abcd"]
    return lines + [f"fma.rn.bf16x2 {r}, {r}, u, v" for r in "abcd"]


def _entries(first: int) -> list[str]:
    """Eight indices w through a table of 16, as a, b (low halves of the bytes) and c, d (high halves).

    The lower bytes of the table's entries are in four operands, the upper ones in four more, from operand `first` on
    (an operand of 32 bits has four registers, all alike). A byte permutation looks four entries up in 8; another one
    picks between the table's two halves by the index's highest bit.
    """
    lines = ["and.b32 u, w, 0x77777777", "shr.u32 v, w, 1", "lop3.b32 v, v, 0x44444444, 0x32103210, 0xea"]
    for half in range(2):
        if half:
            lines += ["shr.u32 u, u, 16", "shr.u32 v, v, 16"]
        for plane, at in (("l", first), ("h", first + 16)):
            lines += [f"prmt.b32 s, ${at}, ${at + 4}, u", f"prmt.b32 t, ${at + 8}, ${at + 12}, u",
                      f"prmt.b32 {plane}{half}, s, t, v"]  # fmt: skip
    for r, half, pick in (("a", 0, "0x6240"), ("b", 1, "0x6240"), ("c", 0, "0x7351"), ("d", 1, "0x7351")):
        lines.append(f"prmt.b32 {r}, l{half}, h{half}, {pick}")
    return lines


@functools.cache
def convert(form: Format, dtype: str, zeros: int = 0, natural: bool = False) -> tuple[str, str]:
    """The instructions for four bytes of codes to `dtype` (FP16 or BF16), and the constraints of their operands.

    Results: four weights as two registers, or two times four of 4-bit codes. Operands: the bytes; then `zeros` zero
    points for each result, subtracted one after the other; or the eight words of a table (see `_entries`).
    """
    names = "ab" if form.bits == 8 else "abcd"
    first = len(names)
    if form.kind == "lut16":
        body = _entries(first + 1)
    elif form.kind.startswith("fp8"):
        body = _floats(form.kind, dtype)
    elif form.bits == 8:
        body = _integers(form.kind == "int", form.offset, dtype)
    else:
        body = _nibbles(form.kind == "int", form.offset, dtype, natural)
    if zeros and dtype == BF16:
        body.append(f"mov.b32 u, {_pair(-1, dtype)}")
    for zero in range(zeros):
        for i, r in enumerate(names):
            z = f"${first + 1 + first * zero + i}"
            body.append(f"sub.rn.f16x2 {r}, {r}, {z}" if dtype == FP16 else f"fma.rn.bf16x2 {r}, {z}, u, {r}")
    lines = [f"mov.b32 w, ${first}", *body, *(f"mov.b32 ${i}, {r}" for i, r in enumerate(names))]
    inputs = 1 + first * zeros + (32 if form.kind == "lut16" else 0)
    return _statements("a, b, c, d, s, t, u, v, w, l0, l1, h0, h1", lines), ",".join(["=r"] * first + ["r"] * inputs)


@functools.cache
def convert_planes(offset: int, bits: int, step: int, dtype: str) -> tuple[str, str]:
    """The same of codes of which the lower four bits are in halves of bytes, and `bits` higher ones in other bytes.

    Operands: four bytes of halves; four of the others; which of their bits belong to the low halves (a number for each
    byte, all alike). Those of the high halves are `step` bits further. Elements are as they lie.
    """
    mask = f"0x{((1 << bits) - 1 << 4) * 0x01010101:08x}"
    lines = ["mov.b32 w, $4", "shr.u32 s, $5, $6", "shl.b32 t, s, 4"]
    lines.append(f"shl.b32 u, s, {4 - step}" if step < 4 else f"shr.u32 u, s, {step - 4}")
    lines += ["and.b32 v, w, 0x0f0f0f0f", "shr.u32 w, w, 4", "and.b32 w, w, 0x0f0f0f0f"]
    lines += [f"lop3.b32 v, t, {mask}, v, 0xea", f"lop3.b32 w, u, {mask}, w, 0xea"]
    magic, power = ("0x64646464", 1024) if dtype == FP16 else ("0x43434343", 128)  # power + q
    for r, source, pick in (("a", "v", "0x4140"), ("b", "v", "0x4342"), ("c", "w", "0x4140"), ("d", "w", "0x4342")):
        lines.append(f"prmt.b32 {r}, {source}, {magic}, {pick}")
    if dtype == FP16:
        lines += [f"mov.b32 u, {_pair(power + offset, dtype)}", *(f"sub.rn.f16x2 {r}, {r}, u" for r in "abcd")]
    else:
        lines += [f"mov.b32 u, {_pair(1, dtype)}", f"mov.b32 s, {_pair(-power - offset, dtype)}"]
        lines += [f"fma.rn.bf16x2 {r}, {r}, u, s" for r in "abcd"]
    lines += [f"mov.b32 ${i}, {r}" for i, r in enumerate("abcd")]
    return _statements("a, b, c, d, s, t, u, v, w", lines), ",".join(["=r"] * 4 + ["r"] * 6)


@functools.cache
def split(form: Format, natural: bool = False) -> tuple[str, str]:
    """Instructions for four pairs of activations: their even ones as $0, $1, their odd ones as $2, $3, in `order`."""
    a, b, c, d = (f"r{i}" for i in order(form, natural))
    lines = [f"mov.b32 r{i}, ${4 + i}" for i in range(4)]
    lines += [f"prmt.b32 $0, {a}, {b}, 0x5410", f"prmt.b32 $1, {c}, {d}, 0x5410",
              f"prmt.b32 $2, {a}, {b}, 0x7632", f"prmt.b32 $3, {c}, {d}, 0x7632"]  # fmt: skip
    return _statements("r0, r1, r2, r3", lines), "=r,=r,=r,=r,r,r,r,r"


@functools.cache
def reorder(form: Format) -> tuple[str, str]:
    """Instructions for four activations, $2 and $3, as $0 and $1 in `order`."""
    assert order(form) == (0, 2, 1, 3)
    lines = ["mov.b32 a, $2", "mov.b32 b, $3", "prmt.b32 $0, a, b, 0x5410", "prmt.b32 $1, a, b, 0x7632"]
    return _statements("a, b", lines), "=r,=r,r,r"
