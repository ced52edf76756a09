"""The reference decoder against loops over single weights, the op's errors, and its contract with torch."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.kernels.packed_weight import NIBBLES, Format, check_parts, decode, unpacked

op = importlib.import_module("torch_fuse.kernels.dequant_linear")


def place(form: Format, n: int, k: int, shape: tuple[int, int], run: int) -> tuple[int, int, int]:
    """(row and byte of the codes, shift) that hold weight [n, k]."""
    where, first_high = form.nibbles.removesuffix("_high"), form.nibbles.endswith("high")
    if where == "rows":
        half, row, byte = n // (shape[0] // 2), n % (shape[0] // 2), k
    elif where == "half":
        half, row, byte = (k // run) % 2, n, k // (2 * run) * run + k % run
    else:
        half, row, byte = k % 2, n, k // 2
    return row, byte, 4 * (half ^ first_high)


@pytest.mark.parametrize("nibbles", NIBBLES)
@pytest.mark.parametrize("kind", ["uint", "int"])
def test_a_nibble_is_where_the_format_says(nibbles: str, kind: str) -> None:
    form, shape, run = Format(4, kind, 1, 24, 0, nibbles), (4, 24), 4
    rows = 2 if nibbles.startswith("rows") else 4
    codes = torch.randint(0, 256, (rows, 2 * shape[0] // rows * 12 // 8, run)).to(torch.uint8)
    found, flat = unpacked(codes, form), codes.flatten(1)
    assert tuple(found.shape) == shape
    for n in range(shape[0]):
        for k in range(shape[1]):
            row, byte, shift = place(form, n, k, shape, run)
            q = int(flat[row, byte]) >> shift & 15
            assert int(found[n, k]) == (q - 16 if kind == "int" and q > 7 else q)


LAYOUTS = [(2, "2x8"), (3, "1x2+2x4"), (5, "1x1+4x4"), (5, "4x2+1x4"), (6, "4x8+2x4"), (6, "2x1+4x1")]


@pytest.mark.parametrize("bits, layout", LAYOUTS)
def test_a_bit_of_a_block_is_where_its_plane_says(bits: int, layout: str) -> None:
    n, blocks, weights = 2, 3, 32
    codes = torch.randint(0, 256, (n, blocks, weights * bits // 8)).to(torch.uint8)
    found = unpacked(codes, Format(bits, "uint", 1, 96, 0, layout))
    assert tuple(found.shape) == (n, blocks * weights)
    planes = [tuple(map(int, plane.split("x"))) for plane in layout.split("+")]
    for row, block, column in itertools.product(range(n), range(blocks), range(weights)):
        wanted, start, values = 0, 0, {}
        for count, run in planes:
            per_run = 8 // count * run
            byte = start + column // per_run * run + column % run
            values[count] = int(codes[row, block, byte]) >> (column % per_run // run * count) & (2**count - 1)
            start += weights * count // 8
        for count in sorted(values):  # the widest plane last, at the bottom
            wanted = wanted << count | values[count]
        assert int(found[row, block * weights + column]) == wanted


@pytest.mark.parametrize("bits, layout, size, word", [
    (6, "low", 24, "planes"), (6, "4x8+1x8", 24, "planes"), (4, "2x8+2x8", 16, "allowed"), (6, "3x8+3x8", 24, "planes"),
    (6, "4x8+2x8", 23, "whole runs"), (6, "4x8+2x8", 12, "whole runs"), (5, "1x1+4x0", 20, "planes"),
])  # fmt: skip
def test_planes_that_do_not_fit_are_errors(bits: int, layout: str, size: int, word: str) -> None:
    codes = torch.zeros(2, 1, size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=word):
        check_parts(codes, torch.ones(2, 1), None, None, Format(bits, "uint", 1, 32, 0, layout))


@pytest.mark.parametrize("arithmetic", ["sub_mul", "mul_add", "mul_sub"])
def test_each_step_is_rounded_to_the_type_of_its_source(arithmetic: str) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (5, 20)).to(torch.uint8)
    scale, zero = torch.randn(3, 3).bfloat16(), torch.randn(3, 3).bfloat16() * 100
    form = Format(8, "uint", 2, 8, 0, "low", arithmetic, "bfloat16")
    found = decode(codes, scale, zero, None, form, torch.float32)
    for n in range(5):
        for k in range(20):
            q, s, z = codes[n, k].bfloat16(), scale[n // 2, k // 8], zero[n // 2, k // 8]
            wanted = {"sub_mul": (q - z) * s, "mul_add": q * s + z, "mul_sub": q * s - z}[arithmetic]
            assert found[n, k] == wanted.float()


CODES, SCALE = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
WRONG: dict[str, tuple[tuple[Any, ...], Format, str]] = {
    "bits": ((CODES, SCALE, None, None), Format(7, "int", 1, 8), "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
    "kind": ((CODES, SCALE, None, None), Format(8, "float", 1, 8), "kind is 'float'"),
    "nibbles of bytes": ((CODES, SCALE, None, None), Format(8, "int", 1, 8, 0, "high"), "nibbles is 'high'"),
    "signs": ((CODES, SCALE, None, None), Format(8, "uint", 1, 8), "codes are torch.int8"),
    "grid": ((CODES, SCALE, None, None), Format(8, "int", 1, 4), r"allowed: .*\[4, 2\]"),
    "scale type": ((CODES, SCALE.double(), None, None), Format(8, "int", 1, 8), "scale is torch.float64"),
    "zero": ((CODES, SCALE, torch.ones(4), None), Format(8, "int", 1, 8), r"zero.shape is \[4\]"),
    "no zero": ((CODES, SCALE, None, None), Format(8, "int", 1, 8, 0, "low", "mul_add"), "zero is None"),
    "table": ((CODES.view(torch.uint8), SCALE, None, None), Format(4, "lut16", 1, 16), "lut is None"),
    "output": ((CODES, SCALE, SCALE, None), Format(8, "int", 1, 8, 0, "low", "output"), "arithmetic is 'output'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_are_not_the_formats_are_refused(name: str) -> None:
    parts, form, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        check_parts(*parts, form)


def layer(arithmetic: str = "sub_mul") -> tuple[Tensor, Tensor, Tensor, Tensor, Format]:
    torch.manual_seed(0)
    codes, scale = torch.randint(-128, 128, (6, 8)).to(torch.int8), torch.rand(6, 1)
    return torch.randn(2, 3, 8), codes, scale, torch.randn(6), Format(8, "int", 1, 8, 0, "low", arithmetic)


@pytest.mark.parametrize("arithmetic", ["sub_mul", "output"])
def test_the_op_keeps_torchs_contract_and_its_gradient_is_the_layers(arithmetic: str) -> None:
    x, codes, scale, bias, form = layer(arithmetic)
    x.requires_grad_()
    bias.requires_grad_()
    torch.library.opcheck(op.dequant_linear, (x, codes, scale, None, None, bias, *form))
    weight = codes.float() * scale
    for found, wanted in zip(
        torch.autograd.grad(op.dequant_linear(x, codes, scale, None, None, bias, *form).sin().sum(), [x, bias]),
        torch.autograd.grad(F.linear(x, weight, bias).sin().sum(), [x, bias]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert op.dequant_linear(x[:0], codes, scale, None, None, bias, *form).shape == (0, 3, 6)


def test_a_gradient_of_the_scale_is_refused_not_lost() -> None:
    x, codes, scale, bias, form = layer()
    with pytest.raises(NotImplementedError, match="no gradient of scale"):
        op.dequant_linear(x, codes, scale.requires_grad_(), None, None, bias, *form)


def test_arguments_that_do_not_fit_are_named() -> None:
    x, codes, scale, bias, form = layer()
    with pytest.raises(ValueError, match=r"x.shape is \(2, 3, 7\); allowed: \[..., 8\]"):
        op.dequant_linear(x[..., :7], codes, scale, None, None, bias, *form)
    with pytest.raises(ValueError, match=r"bias is torch\.float32"):
        op.dequant_linear(x, codes, scale, None, None, bias[:5], *form)
    with pytest.raises(ValueError, match=r"x\.dtype is torch\.int64"):
        op.dequant_linear(x.long(), codes, scale, None, None, None, *form)
