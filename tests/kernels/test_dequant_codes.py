"""The instructions that turn codes into 16-bit floats, run by a small interpreter of them, against torch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_fuse.kernels._dequant_codes import BF16, FP16, convert, convert_planes, order, reorder, split
from torch_fuse.kernels.packed_weight import Format, unpacked

DTYPES = {FP16: torch.float16, BF16: torch.bfloat16}
ALL = torch.arange(256, dtype=torch.uint8).repeat(4)[torch.randperm(1024, generator=torch.Generator().manual_seed(0))]


def words(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.uint8).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def halves(word: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] words as [n, 2] elements."""
    return torch.stack([word & 0xFFFF, word >> 16], -1).to(torch.int32).to(torch.uint16).view(dtype)


def joined(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    pool = torch.stack([v >> 8 * i & 255 for v in (a, b) for i in range(4)], -1)
    found = torch.zeros_like(a)
    for i in range(4):
        pick = selector >> 4 * i & 15
        assert (pick < 8).all(), "the sign would be spread"
        found |= pool.gather(-1, pick[:, None])[:, 0] << 8 * i
    return found


def logic(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    found = torch.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found & 0xFFFFFFFF


def in_pairs(dtype: torch.dtype, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: joined(compute(*(halves(a, dtype).double() for a in args)).to(dtype))


STEPS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "prmt.b32": permuted,
    "lop3.b32": logic,
    "sub.rn.f16x2": in_pairs(torch.float16, lambda a, b: a - b),
    "fma.rn.f16x2": in_pairs(torch.float16, lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": in_pairs(torch.bfloat16, lambda a, b, c: a * b + c),
}


def run(program: str, inputs: list[Tensor], results: int) -> list[Tensor]:
    """The results' registers, as words."""
    known = {f"${results + i}": word for i, word in enumerate(inputs)}

    def value(name: str) -> Tensor:
        return known[name] if name in known else torch.full_like(inputs[0], int(name, 0))

    for line in program.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.split(maxsplit=1)
        pair = re.fullmatch(r"\{(\w+), (\w+)\}, (\w+)", rest)
        if pair:
            known[pair[1]], known[pair[2]] = value(pair[3]) & 0xFFFF, value(pair[3]) >> 16
            continue
        target, *args = (part.strip() for part in rest.split(","))
        if name.startswith("cvt.rn.f16x2.e"):
            kind = torch.float8_e4m3fn if "e4m3" in name else torch.float8_e5m2
            data = torch.stack([value(args[0]) & 255, value(args[0]) >> 8], -1).to(torch.uint8)
            known[target] = joined(data.view(kind).half())
        elif name == "cvt.f32.f16":
            known[target] = value(args[0])  # kept as fp16: widening is exact
        elif name == "cvt.rn.bf16x2.f32":
            low, high = (halves(value(a), torch.float16)[:, 0] for a in reversed(args))
            known[target] = joined(torch.stack([low, high], -1).to(torch.bfloat16))
        else:
            known[target] = STEPS[name](*map(value, args))
    return [known[f"${i}"] for i in range(results)]


def elements(registers: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Two registers as [n, 4]."""
    return torch.cat([halves(r, dtype) for r in registers], -1)


FORMATS = [
    Format(8, "int"), Format(8, "uint"), Format(8, "uint", offset=128), Format(8, "int", offset=-5),
    Format(8, "fp8_e4m3"), Format(8, "fp8_e5m2"),
    Format(4, "uint"), Format(4, "uint", offset=8), Format(4, "int"), Format(4, "int", offset=3),
]  # fmt: skip


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.kind}{f.bits}_{f.offset}")
def test_every_code_is_exact(form: Format, dtype: str, natural: bool) -> None:
    typed = {"int": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(
        form.kind, torch.uint8
    )
    codes = ALL if form.bits == 4 else ALL.view(typed)
    results = 16 // form.bits
    program, operands = convert(form, dtype, natural=natural)
    assert operands == ",".join(["=r"] * results + ["r"])
    found = run(program, [words(codes)], results)
    exact = (unpacked(codes[None], form).to(torch.float64) - form.offset).to(DTYPES[dtype])
    columns = exact.view(-1, 4, 8 // form.bits)[:, list(order(form, natural))]
    for part in range(8 // form.bits):
        got = elements(found[2 * part : 2 * part + 2], DTYPES[dtype])
        torch.testing.assert_close(got, columns[..., part], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, step, offset", [(2, 4, 32), (1, 1, 0), (2, 2, 64), (1, 5, 16)])
def test_every_code_of_two_bytes_is_exact(bits: int, step: int, offset: int, dtype: str) -> None:
    program, operands = convert_planes(offset, bits, step, dtype)
    assert operands == ",".join(["=r"] * 4 + ["r"] * 6)
    low, high = ALL.repeat(4), torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    for shift in range(0, 9 - bits - step, bits):
        found = run(program, [words(low), words(high), *[torch.full((1024,), shift)] * 4], 4)
        for part in range(2):
            q = (low >> 4 * part & 15) | (high >> shift + step * part & (1 << bits) - 1) << 4
            wanted = (q.double() - offset).to(DTYPES[dtype]).view(-1, 4)
            assert torch.equal(elements(found[2 * part : 2 * part + 2], DTYPES[dtype]), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_of_a_table_is_found(dtype: str) -> None:
    form = Format(4, "lut16")
    table = torch.randn(16).to(DTYPES[dtype])
    bits = table.view(torch.int16).to(torch.int64) & 0xFFFF
    planes = [
        sum((bits[4 * w + i] >> 8 * plane & 255) << 8 * i for i in range(4)) for plane in range(2) for w in range(4)
    ]
    program, _ = convert(form, dtype)
    copies = [torch.full((256,), int(p)) for p in planes for _ in range(4)]
    found = run(program, [words(ALL), *copies], 4)
    exact = table[unpacked(ALL[None], form).int()].view(-1, 4, 2)
    for part in range(2):
        assert torch.equal(elements(found[2 * part : 2 * part + 2], DTYPES[dtype]), exact[..., part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [Format(4, "uint"), Format(8, "uint")], ids=["4", "8"])
def test_a_zero_point_is_subtracted_as_in_torch(form: Format, dtype: str) -> None:
    kind = DTYPES[dtype]
    results = 16 // form.bits
    zero = torch.rand(256, 8 // form.bits).mul(9).to(kind)  # of the low and of the high halves
    program, operands = convert(form, dtype, zeros=1)
    assert operands.count("=") == results and operands.count(",") == 2 * results
    copies = [joined(zero[:, [part, part]]) for part in range(8 // form.bits) for _ in range(2)]
    found = run(program, [words(ALL), *copies], results)
    exact = unpacked(ALL[None], form).to(kind).view(-1, 4, 8 // form.bits)[:, list(order(form))] - zero[:, None]
    for part in range(8 // form.bits):
        assert torch.equal(elements(found[2 * part : 2 * part + 2], kind), exact[..., part])


@pytest.mark.parametrize("form", [Format(4, "uint"), Format(4, "lut16")], ids=["integers", "table"])
def test_activations_come_in_the_order_of_the_codes(form: Format) -> None:
    x = torch.arange(1024, dtype=torch.float16)
    pairs = words(x).view(-1, 4)
    program, _ = split(form)
    found = run(program, list(pairs.unbind(-1)), 4)
    expected = x.view(-1, 4, 2)[:, list(order(form))]
    assert torch.equal(elements(found[:2], torch.float16), expected[..., 0])
    assert torch.equal(elements(found[2:], torch.float16), expected[..., 1])


def test_activations_of_halves_come_in_the_order_of_the_codes() -> None:
    x = torch.arange(1024, dtype=torch.float16)
    form = Format(4, "uint", nibbles="half")
    found = run(reorder(form)[0], list(words(x).view(-1, 2).unbind(-1)), 2)
    assert torch.equal(elements(found, torch.float16), x.view(-1, 4)[:, list(order(form))])


def test_instructions_are_written_once_for_all_calls_of_a_format() -> None:
    form = Format(4, "uint", 1, 128)
    assert convert(form, FP16, 1)[0] is convert(form, FP16, 1)[0]
    assert split(form)[0] is split(form)[0] and reorder(form)[0] is reorder(form)[0]
