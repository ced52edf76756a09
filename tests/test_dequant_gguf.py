"""GGUF's types as diffusers and ComfyUI dequantise them, written anew: each is understood, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequant import PATTERN, form_of, run
from test_dequant_formats import exact, kept_right
from torch import Tensor

from torch_fuse.patterns._dequant_examples import Quantised

# GGUF: bytes a block, weights a block, where its halves are. Spelled with slices and stacks, where diffusers has splits
# and shifts by a tensor.


def spread(part: Tensor, bits: int, run: int) -> Tensor:
    """[blocks, bytes] as codes [blocks, columns]: runs of bytes, the lowest bits of a run first."""
    runs = part.reshape(part.shape[0], -1, run)
    mask = 2**bits - 1
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], 2).flatten(1)


def half(b: Tensor, at: int) -> Tensor:
    return b[:, at : at + 2].view(torch.float16)


def six_bit_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    low, middle, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], 1)
    return scale, torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], 1)


def affine(b: Tensor, q: Tensor) -> Tensor:
    scale, least = six_bit_scales(b)
    d, m = half(b, 0) * scale, half(b, 2) * least
    return q.view(-1, 8, 32) * d[:, :, None] - m[:, :, None]


def q8_0(b: Tensor) -> Tensor:
    return half(b, 0) * b[:, 2:].view(torch.int8)


def q4_0(b: Tensor) -> Tensor:
    return half(b, 0) * (spread(b[:, 2:], 4, 16).to(torch.int8) - 8)


def q4_1(b: Tensor) -> Tensor:
    return half(b, 0) * spread(b[:, 4:], 4, 16) + half(b, 2)


def q5_0(b: Tensor) -> Tensor:
    q = spread(b[:, 6:], 4, 16) | (spread(b[:, 2:6], 1, 1) << 4)
    return half(b, 0) * (q.to(torch.int8) - 16)


def q5_1(b: Tensor) -> Tensor:
    return half(b, 0) * (spread(b[:, 8:], 4, 16) | (spread(b[:, 4:8], 1, 1) << 4)) + half(b, 2)


def q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    d, m = half(b, 80) * (scales & 15), half(b, 82) * (scales >> 4)
    return spread(b[:, 16:80], 2, 32).view(-1, 16, 16) * d[:, :, None] - m[:, :, None]


def q3_k(b: Tensor) -> Tensor:
    low = spread(b[:, 96:104], 4, 8) | (spread(b[:, 104:108], 2, 4) << 4)
    d = half(b, 108) * (low.to(torch.int8) - 32)
    q = (spread(b[:, 32:96], 2, 32) | (spread(b[:, :32], 1, 32) << 2)).to(torch.int8) - 4
    return q.view(-1, 16, 16) * d[:, :, None]


def q4_k(b: Tensor) -> Tensor:
    return affine(b, spread(b[:, 16:], 4, 32))


def q5_k(b: Tensor) -> Tensor:
    return affine(b, spread(b[:, 48:], 4, 32) | (spread(b[:, 16:48], 1, 32) << 4))


def q6_k(b: Tensor) -> Tensor:
    d = half(b, 208) * b[:, 192:208].view(torch.int8)
    q = (spread(b[:, :128], 4, 64) | (spread(b[:, 128:192], 2, 32) << 4)).to(torch.int8) - 32
    return q.view(-1, 16, 16) * d[:, :, None]


NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(b: Tensor) -> Tensor:
    table = torch.tensor(NL, dtype=torch.float32, device=b.device)
    return half(b, 0).float() * table[spread(b[:, 2:], 4, 16).int()]


# name: (decoder, bytes a block, weights a block, bits, planes)
GGUF: dict[str, tuple[Callable[[Tensor], Tensor], int, int, int, str | None]] = {
    "Q8_0": (q8_0, 34, 32, 8, None), "Q4_0": (q4_0, 18, 32, 4, None), "Q4_1": (q4_1, 20, 32, 4, None),
    "Q5_0": (q5_0, 22, 32, 5, "1x1+4x16"), "Q5_1": (q5_1, 24, 32, 5, "1x1+4x16"), "Q2_K": (q2_k, 84, 256, 2, "2x32"),
    "Q3_K": (q3_k, 110, 256, 3, "1x32+2x32"), "Q4_K": (q4_k, 144, 256, 4, None),
    "Q5_K": (q5_k, 176, 256, 5, "1x32+4x32"), "Q6_K": (q6_k, 210, 256, 6, "4x64+2x32"),
    "IQ4_NL": (iq4_nl, 18, 32, 4, None),
}  # fmt: skip


def gguf(name: str, n: int, blocks: int, decoder: Callable[[Tensor], Tensor] | None = None) -> tuple[Quantised, int]:
    """A layer of n rows with that many blocks each, with finite scales, and its K."""
    known, size, weights, _, _ = GGUF[name]
    decode, k = decoder or known, blocks * weights
    raw = torch.randint(0, 256, (n * blocks, size)).to(torch.uint8)
    at = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(name, (0, 2) if name[-1] in "1K" else (0,))
    for first in at:
        raw[:, first : first + 2] = (torch.rand(n * blocks, 1) / 64).half().view(torch.uint8)

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, decode(m.q.view(torch.uint8).reshape(-1, size)).reshape(n, k).to(x.dtype))

    return Quantised(forward, q=raw.view(n, -1)), k


@pytest.mark.parametrize("name", GGUF)
def test_each_gguf_type_is_understood_bit_for_bit(name: str) -> None:
    _, _, _, bits, planes = GGUF[name]
    rewriter = exact(*gguf(name, 3, 2))
    assert form_of(rewriter)[0] == bits and (planes is None or form_of(rewriter)[5] == planes)


@settings(max_examples=6)
@given(st.sampled_from(["Q6_K", "Q5_K", "Q5_0", "Q3_K"]), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_planes_of_bits_are_understood_for_any_number_of_rows_and_blocks(
    name: str, n: int, blocks: int, low: bool
) -> None:
    module, k = gguf(name, n, blocks)
    exact(module, k, torch.bfloat16 if low else torch.float32)


def _shifted(b: Tensor) -> Tensor:
    d = half(b, 208) * b[:, 192:208].view(torch.int8)
    q = (spread(b[:, :128], 4, 64) | (spread(b[:, 128:192], 2, 32) << 3)).to(torch.int8) - 32
    return q.view(-1, 16, 16) * d[:, :, None]


def _swapped(b: Tensor) -> Tensor:
    d = half(b, 208) * b[:, 192:208].view(torch.int8)
    q = (spread(b[:, :128], 4, 64) | (spread(torch.cat([b[:, 160:192], b[:, 128:160]], 1), 2, 32) << 4)).to(
        torch.int8
    ) - 32
    return q.view(-1, 16, 16) * d[:, :, None]


def _apart(b: Tensor) -> Tensor:
    d = half(b, 208) * b[:, 192:208].view(torch.int8)
    q = (spread(b[:, :128], 4, 64) | (spread(b[:, 130:194], 2, 32) << 4)).to(torch.int8) - 32
    return q.view(-1, 16, 16) * d[:, :, None]


@pytest.mark.parametrize("decoder", [_shifted, _swapped, _apart])
def test_planes_that_are_put_together_otherwise_are_left_alone(decoder: Callable[[Tensor], Tensor]) -> None:
    module, k = gguf("Q6_K", 3, 1, decoder)
    kept_right(module, torch.randn(2, k), "no known format", "look like codes")


def test_bits_from_two_stored_tensors_are_left_alone() -> None:
    n, k = 4, 256

    def forward(m: Any, x: Tensor) -> Tensor:
        q = spread(m.q[:, :128], 4, 64) | (spread(m.high[:, :64], 2, 32) << 4)
        return F.linear(x, ((q.to(torch.int8) - 32).view(n, -1, 16) * m.s[:, :, None]).view(n, k))

    codes = {
        "q": torch.randint(0, 256, (n, 140)).to(torch.uint8),
        "high": torch.randint(0, 256, (n, 70)).to(torch.uint8),
    }
    kept_right(Quantised(forward, **codes, s=torch.rand(n, 16)), torch.randn(2, k), "look like codes")


def test_blocks_that_are_written_to_after_compilation_count() -> None:
    module, k = gguf("Q6_K", 3, 1)
    other, _ = gguf("Q6_K", 3, 1)
    x = torch.randn(2, k)
    _, rewriter, compiled = run(module, x)
    module.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(compiled(x), other(x))
    assert rewriter.statuses == {(PATTERN, "fused")}
