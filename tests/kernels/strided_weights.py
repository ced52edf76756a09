"""Quantised weights as libraries lay them out: views of one tensor of blocks, words along K, two rows a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_fuse.kernels.packed_weight import Format, check_parts

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
__all__ = ["STRIDED", "Parts", "strided"]

STRIDED: dict[str, Format] = {
    "q8_0": Format(8, "int", 1, 32, compute="float16"),
    "q4_0": Format(4, "uint", 1, 32, 8, "half", compute="float16"),
    "q4_k": Format(4, "uint", 1, 32, 0, "half", "mul_sub"),
    "q6_k": Format(6, "uint", 1, 16, 32, "4x64+2x32", compute="float16"),
    "q5_k": Format(5, "uint", 1, 32, 0, "1x32+4x32", "mul_sub"),
    "gptq": Format(4, "uint", 1, 128, 8, compute="float16"),
    "gptq_zeros": Format(4, "uint", 1, 128, compute="float16"),
    "hqq_halves": Format(4, "uint", 1, 64, 0, "rows_high", compute="float16"),
    "rows_alone": Format(4, "int", 1, 4096, 0, "rows"),
    "nf4_rows": Format(4, "lut16", 1, 64, 0, "rows"),
    "columns": Format(8, "int", 1, 4096, compute="float16"),
    "columns_groups": Format(8, "uint", 1, 32, 128, compute="float16"),
    "bytes_along_k": Format(4, "uint", 1, 32, 8),
    "slice": Format(8, "uint", 1, 64, 128),
}


def _bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def _halves(*shape: int, seed: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).half()


def _blocks(n: int, count: int, before: int, codes: int) -> tuple[Tensor, Tensor]:
    """Blocks [n, count, before + codes], each beginning with halves, and these [n, count, before / 2]."""
    raw = _bytes(n, count, before + codes, seed=0)
    raw[..., :before] = _halves(n, count, before // 2, seed=1).view(torch.uint8)
    return raw, raw[..., :before].view(torch.float16)


def strided(name: str, n: int, k: int, device: str = "cpu") -> tuple[Format, Parts]:
    """`STRIDED[name]` for a weight [n, k], and random parts of one, where the library has them."""
    form = STRIDED[name]._replace(group=min(STRIDED[name].group, k))
    groups = -(-k // form.group)
    lut = zero = None
    scale = _halves(n, groups, seed=1)
    if name == "q8_0":
        raw, head = _blocks(n, k // 32, 2, 32)
        codes, scale = raw[..., 2:].view(torch.int8), head[..., 0]
    elif name == "q4_0":
        raw, head = _blocks(n, k // 32, 2, 16)
        codes, scale = raw[..., 2:], head[..., 0]
    elif name == "q4_k":
        raw, _ = _blocks(n, k // 256, 16, 128)
        codes = raw[..., 16:].unflatten(-1, (4, 32))
        zero = 8 * _halves(n, groups, seed=2)
    elif name == "q6_k":
        codes = _bytes(n, k // 256, 210, seed=0)[..., :192]
    elif name == "q5_k":
        raw, _ = _blocks(n, k // 256, 16, 160)
        codes = raw[..., 16:]
        zero = 8 * _halves(n, groups, seed=2)
    elif name.startswith("gptq"):
        codes = _bytes(k // 8, n, 4, seed=0).permute(1, 0, 2)
        scale = _halves(groups, n, seed=1).t()
        if name == "gptq_zeros":
            zero = _bytes(groups, n, seed=2).bitwise_and(15).t()
    elif form.nibbles.startswith("rows"):
        codes = _bytes(n // 2, k, seed=0)
        if form.kind == "lut16":
            lut = torch.randn(16).sort().values
        elif name == "hqq_halves":
            zero = 8 * _halves(n, groups, seed=2)
    elif name == "columns":
        codes = _bytes(k, n, seed=0).view(torch.int8).t()
    elif name == "columns_groups":
        codes = _bytes(k, n, seed=0).t()
        scale, zero = _halves(groups, n, seed=1).t(), _bytes(groups, n, seed=2).view(torch.int8).t()
    elif name == "bytes_along_k":
        codes = _bytes(k // 2, n, seed=0).t()
    else:
        codes = _bytes(n + 1, k + 5, seed=0)[1:, 3 : k + 3]
    found = codes, scale, zero, lut
    if device != "cpu":  # views stay views
        found = tuple(None if part is None else _moved(part, device) for part in found)  # type: ignore[assignment]
    check_parts(*found, form)
    return form, found


def _moved(part: Tensor, device: str) -> Tensor:
    memory = torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage()).to(device)  # type: ignore[call-overload]
    return memory.view(part.dtype).as_strided(part.shape, part.stride(), part.storage_offset())
