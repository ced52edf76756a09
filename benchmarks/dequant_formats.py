"""Quantised weights as libraries lay them out, and as their users dequantise them: for bench_dequant_linear.

Each layout has a format, tensors as they are stored, their parts (views, or small tensors computed from them), and the
linear layer as it is written where no kernel reads the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.kernels.packed_weight import Format, decode

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Stored = tuple[Tensor | None, ...]
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


class Layout(NamedTuple):
    """`stored(n, k, device)`, `parts(n, k, *stored)` and `linear(x, n, *stored)` of a format."""

    form: Format
    stored: Callable[..., Stored]
    parts: Callable[..., Parts]
    linear: Callable[..., Tensor]


def layouts(k: int) -> dict[str, Layout]:
    """All layouts for K columns, those that matter most first."""
    plain = {
        "int8": Format(8, "int", 1, k, compute="float16"),
        "int4_g128_zero": Format(4, "uint", 1, 128, compute="float16"),
        "fp8": Format(8, "fp8_e4m3", 1, k, compute="float16"),
        "nf4": Format(4, "lut16", 1, 64, nibbles="high", compute="float16"),
        "int4_g128": Format(4, "uint", 1, 128, 8, compute="float16"),
        "int4_g32": Format(4, "uint", 1, 32, 8, compute="float16"),
    }
    halves = Format(4, "uint", 1, 64, 0, "rows_high", compute="float16")
    found = {
        "q8_0": Layout(Format(8, "int", 1, 32, compute="float16"), _q8_0, _q8_0_parts, _q8_0_linear),
        "q4_k": Layout(Format(4, "uint", 1, 32, 0, "half", "mul_sub", "float16"), _q4_k, _q4_k_parts, _q4_k_linear),
        "gptq": Layout(Format(4, "uint", 1, 128, compute="float16"), _gptq, _gptq_parts, _gptq_linear),
        "q6_k": Layout(Format(6, "uint", 1, 16, 32, "4x64+2x32", compute="float16"), _q6_k, _q6_k_parts, _q6_k_linear),
        "q5_k": Layout(
            Format(5, "uint", 1, 32, 0, "1x32+4x32", "mul_sub", "float16"), _q5_k, _q5_k_parts, _q5_k_linear
        ),
        "q4_0": Layout(Format(4, "uint", 1, 32, 8, "half", compute="float16"), _q4_0, _q4_0_parts, _q4_0_linear),
        "hqq_halves": Layout(halves, _hqq, _hqq_parts, _hqq_linear),
        "int8_columns": Layout(plain["int8"], _columns, _columns_parts, _columns_linear),
    }
    return {**{name: _contiguous(name, form) for name, form in plain.items()}, **found}


def _bytes(*shape: int, device: str) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _scales(*shape: int, device: str) -> Tensor:
    return (torch.rand(shape, device=device) + 0.5).mul(0.01).half()


def _contiguous(name: str, form: Format) -> Layout:
    def stored(n: int, k: int, device: str) -> Stored:
        groups = (n, -(-k // form.group))
        codes = _bytes(n, k * form.bits // 8, device=device)
        if name == "fp8":
            codes = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
        elif name == "int8":
            codes = codes.view(torch.int8)
        zero = torch.randint(4, 12, groups, device=device).half() if name.endswith("zero") else None
        return codes, _scales(*groups, device=device), zero, torch.tensor(NF4, device=device) if name == "nf4" else None

    def linear(x: Tensor, n: int, *parts: Tensor) -> Tensor:
        return F.linear(x, decode(*parts, form, x.dtype))

    return Layout(form, stored, lambda n, k, *parts: parts, linear)  # type: ignore[arg-type, return-value]


def _blocks(n: int, count: int, heads: int, codes: int, device: str) -> tuple[Tensor]:
    raw = _bytes(n, count, codes, device=device)
    raw[..., : 2 * heads] = _scales(n, count, heads, device=device).view(torch.uint8)
    return (raw.view(n, -1),)


def _halved(q: Tensor, count: int, run: int) -> Tensor:
    shifts = torch.tensor([0, 4], dtype=torch.uint8, device=q.device).reshape(1, 1, 2, 1)
    return ((q.reshape(count, -1, 1, run) >> shifts) & 0x0F).reshape(count, -1)


def _q8_0(n: int, k: int, device: str) -> Stored:
    return _blocks(n, k // 32, 1, 34, device)


def _q8_0_parts(n: int, k: int, raw: Tensor) -> Parts:
    blocks = raw.view(n, -1, 34)
    return blocks[..., 2:].view(torch.int8), blocks[..., :2].view(torch.float16)[..., 0], None, None


def _q8_0_linear(x: Tensor, n: int, raw: Tensor) -> Tensor:
    d, q = torch.split(raw.reshape(-1, 34), [2, 32], dim=1)
    return F.linear(x, (d.view(torch.float16) * q.view(torch.int8)).reshape(n, -1).to(x.dtype))


def _q4_0(n: int, k: int, device: str) -> Stored:
    return _blocks(n, k // 32, 1, 18, device)


def _q4_0_parts(n: int, k: int, raw: Tensor) -> Parts:
    blocks = raw.view(n, -1, 18)
    return blocks[..., 2:], blocks[..., :2].view(torch.float16)[..., 0], None, None


def _q4_0_linear(x: Tensor, n: int, raw: Tensor) -> Tensor:
    d, q = torch.split(raw.reshape(-1, 18), [2, 16], dim=1)
    q = _halved(q, q.shape[0], 16).to(torch.int8) - 8
    return F.linear(x, (d.view(torch.float16) * q).reshape(n, -1).to(x.dtype))


def _q4_k(n: int, k: int, device: str) -> Stored:
    return _blocks(n, k // 256, 2, 144, device)


def _q4_k_scales(d: Tensor, dmin: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [blocks, 8] from six bits each in twelve bytes."""
    low, mins, rest = packed.reshape(-1, 3, 4).unbind(1)
    scale = torch.cat([low & 0x3F, (rest & 0x0F) | ((low >> 2) & 0x30)], -1)
    offset = torch.cat([mins & 0x3F, (rest >> 4) | ((mins >> 2) & 0x30)], -1)
    return d.view(torch.float16) * scale, dmin.view(torch.float16) * offset


def _q4_k_parts(n: int, k: int, raw: Tensor) -> Parts:
    scale, offset = _q4_k_scales(*torch.split(raw.reshape(-1, 144), [2, 2, 12, 128], dim=1)[:3])
    codes = raw.view(n, -1, 144)[..., 16:].unflatten(-1, (4, 32))
    return codes, scale.view(n, -1), offset.view(n, -1), None


def _q4_k_linear(x: Tensor, n: int, raw: Tensor) -> Tensor:
    d, dmin, packed, q = torch.split(raw.reshape(-1, 144), [2, 2, 12, 128], dim=1)
    scale, offset = _q4_k_scales(d, dmin, packed)
    q = _halved(q, q.shape[0], 32).reshape(q.shape[0], -1, 32)
    return F.linear(x, (scale[..., None] * q - offset[..., None]).reshape(n, -1).to(x.dtype))


def _spread(part: Tensor, bits: int, run: int) -> Tensor:
    """Codes [blocks, columns] of a plane: runs of bytes, the lowest bits of a run first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device).view(-1, 1)
    return ((part.unflatten(-1, (-1, 1, run)) >> shifts) & (2**bits - 1)).flatten(1)


def _q5_k(n: int, k: int, device: str) -> Stored:
    return _blocks(n, k // 256, 2, 176, device)


def _q5_k_parts(n: int, k: int, raw: Tensor) -> Parts:
    scale, offset = _q4_k_scales(*torch.split(raw.reshape(-1, 176), [2, 2, 12, 160], dim=1)[:3])
    return raw.view(n, -1, 176)[..., 16:], scale.view(n, -1), offset.view(n, -1), None


def _q5_k_linear(x: Tensor, n: int, raw: Tensor) -> Tensor:
    d, dmin, packed, high, low = torch.split(raw.reshape(-1, 176), [2, 2, 12, 32, 128], dim=1)
    scale, offset = _q4_k_scales(d, dmin, packed)
    q = (_spread(low, 4, 32) | (_spread(high, 1, 32) << 4)).unflatten(-1, (-1, 32))
    return F.linear(x, (scale[..., None] * q - offset[..., None]).reshape(n, -1).to(x.dtype))


def _q6_k(n: int, k: int, device: str) -> Stored:
    raw = _bytes(n, k // 256, 210, device=device)
    raw[..., 208:] = (_scales(n, k // 256, 1, device=device) / 64).view(torch.uint8)
    return (raw.view(n, -1),)


def _q6_k_parts(n: int, k: int, raw: Tensor) -> Parts:
    blocks = raw.view(n, -1, 210)
    scale = blocks[..., 208:].view(torch.float16) * blocks[..., 192:208].view(torch.int8)
    return blocks[..., :192], scale.flatten(1), None, None


def _q6_k_linear(x: Tensor, n: int, raw: Tensor) -> Tensor:
    low, high, scales, d = torch.split(raw.reshape(-1, 210), [128, 64, 16, 2], dim=1)
    q = (_spread(low, 4, 64) | (_spread(high, 2, 32) << 4)).to(torch.int8) - 32
    scale = d.view(torch.float16) * scales.view(torch.int8)
    return F.linear(x, (scale[..., None] * q.unflatten(-1, (-1, 16))).reshape(n, -1).to(x.dtype))


def _gptq(n: int, k: int, device: str) -> Stored:
    return (
        torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device=device),
        _scales(k // 128, n, device=device),
        torch.randint(-(2**31), 2**31, (k // 128, n // 8), dtype=torch.int32, device=device),
    )


def _gptq_zeros(zeros: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=zeros.device)
    return (torch.bitwise_right_shift(zeros.unsqueeze(2), shifts) & 0xF).reshape(zeros.shape[0], -1)


def _gptq_parts(n: int, k: int, q: Tensor, scale: Tensor, zeros: Tensor) -> Parts:
    codes = q.view(torch.uint8).unflatten(-1, (n, 4)).permute(1, 0, 2)
    return codes, scale.t(), _gptq_zeros(zeros).t(), None


def _gptq_linear(x: Tensor, n: int, q: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)
    codes = (torch.bitwise_right_shift(q.unsqueeze(1), shifts.view(1, 8, 1)) & 0xF).reshape(-1, 128, n)
    return x @ (scale.unsqueeze(1) * (codes - _gptq_zeros(zeros).unsqueeze(1))).reshape(-1, n)


def _hqq(n: int, k: int, device: str) -> Stored:
    groups = n * k // 64
    zero = torch.randint(4, 12, (groups, 1), device=device).half()
    return _bytes(groups // 2, 64, device=device), _scales(groups, 1, device=device), zero


def _hqq_parts(n: int, k: int, q: Tensor, scale: Tensor, zero: Tensor) -> Parts:
    return q.view(n // 2, k), scale.view(n, -1), zero.view(n, -1), None


def _hqq_linear(x: Tensor, n: int, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    rows = q.shape[0]
    weight = torch.empty((2 * rows, q.shape[1]), dtype=x.dtype, device=q.device)
    weight[:rows] = (q & 0b11110000) >> 4
    weight[rows:] = q & 0b00001111
    return F.linear(x, ((weight - zero) * scale).reshape(n, -1))


def _columns(n: int, k: int, device: str) -> Stored:
    """As Conv1D has its weight, [K, N]."""
    return _bytes(k, n, device=device).view(torch.int8), _scales(n, device=device)


def _columns_parts(n: int, k: int, q: Tensor, scale: Tensor) -> Parts:
    return q.t(), scale.view(n, 1), None, None


def _columns_linear(x: Tensor, n: int, q: Tensor, scale: Tensor) -> Tensor:
    return x @ (q.to(x.dtype) * scale)
