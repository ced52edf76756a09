"""Quantised formats as libraries compute them, written anew: each is understood, bit for bit, and what only looks like
one is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines quantized_decomposed
import torch.nn.functional as F
from harness import Rewriter
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequant import PATTERN, form_of, run
from torch import Tensor

from torch_fuse.patterns._dequant_examples import Quantised

Spelling = Callable[[Any, Tensor], Tensor]


def exact(module: Quantised, k: int, dtype: torch.dtype = torch.float32) -> Rewriter:
    """Checks that a module fuses and that all bits of its weight stay; the rewriter."""
    x = torch.eye(k).to(dtype)  # each sum has one term: the result is the weight
    with torch.no_grad():
        wanted = module(x)
    found, rewriter, _ = run(module, x)
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)
    assert torch.equal(found, wanted)
    return rewriter


def kept_right(module: Quantised, x: Tensor, *reasons: str) -> None:
    """Checks that a module stays as it is, with a reason, and gives what it gave."""
    found, rewriter, _ = run(module, x)
    assert (PATTERN, "fused") not in rewriter.statuses, str(rewriter.report)
    assert rewriter.report.sites and any(word in str(rewriter.report) for word in reasons), str(rewriter.report)
    with torch.no_grad():
        assert torch.equal(found, module(x))


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


# PT2E: the operators that `convert_pt2e` leaves in a graph.

QD = torch.ops.quantized_decomposed
N, K = 6, 40


def pt2e(forward: Spelling, **buffers: Tensor) -> Quantised:
    known = {"q": torch.randint(-128, 128, (N, K)).to(torch.int8), "s": torch.rand(N) / 64, "z": torch.arange(N) - 3}
    return Quantised(forward, **{**known, **buffers})


PT2E: dict[str, tuple[Spelling, dict[str, Tensor]]] = {
    "channel": (lambda m, x: QD.dequantize_per_channel(m.q, m.s, m.z, 0, -128, 127, torch.int8), {}),
    "channel, no zero": (lambda m, x: QD.dequantize_per_channel(m.q, m.s, None, 0, -127, 127, torch.int8), {}),
    "channel, cast": (
        lambda m, x: QD.dequantize_per_channel(m.q, m.s, m.z, 0, -128, 127, torch.int8, out_dtype=torch.bfloat16), {}
    ),
    "tensor": (lambda m, x: QD.dequantize_per_tensor(m.q, 0.0123, 0, -128, 127, torch.int8), {}),
    "tensor, zero": (lambda m, x: QD.dequantize_per_tensor(m.q, 0.0123, -5, -128, 127, torch.int8), {}),
    "tensor as tensors": (
        lambda m, x: QD.dequantize_per_tensor(m.q, m.s, m.z, -128, 127, torch.int8),
        {"s": torch.tensor(0.01), "z": torch.tensor(3)},
    ),
    "tensor of uint8": (
        lambda m, x: QD.dequantize_per_tensor(m.q, 0.01, 128, 0, 255, torch.uint8),
        {"q": torch.randint(0, 256, (N, K)).to(torch.uint8)},
    ),
    "group": (
        lambda m, x: QD.dequantize_per_channel_group(m.q, m.s, m.z, -8, 7, torch.int8, 8, torch.float32),
        {"s": torch.rand(N, K // 8), "z": torch.zeros(N, K // 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PT2E)
def test_operators_of_pt2e_are_understood_bit_for_bit(name: str) -> None:
    weight, buffers = PT2E[name]
    cast = torch.bfloat16 if "cast" in name else torch.float32
    exact(pt2e(lambda m, x: F.linear(x, weight(m, x)), **buffers), K, cast)


def test_pt2e_scales_of_columns_or_in_float64_are_left_alone() -> None:
    def columns(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, QD.dequantize_per_channel(m.q, m.s, m.z, 1, -128, 127, torch.int8))

    kept_right(pt2e(columns, s=torch.rand(K), z=torch.zeros(K).long()), torch.randn(2, K), "no known format")
    weight = PT2E["channel"][0]
    kept_right(pt2e(lambda m, x: F.linear(x, weight(m, x)), s=torch.rand(N).double()), torch.randn(2, K), "float64")


# 8-bit floats, and codes with a number or nothing for a scale.


def deepseek(m: Any, x: Tensor, size: int = 128) -> Tensor:
    """Blocks of 128 x 128 with a scale each, the last ones cut off."""
    n, k = m.q.shape
    scale = m.s.repeat_interleave(size, 0)[:n].repeat_interleave(size, 1)[:, :k]
    return F.linear(x, (m.q.float() * scale).to(x.dtype))


def deepseek_whole(m: Any, x: Tensor) -> Tensor:
    n, k = m.q.shape
    blocks = m.q.to(torch.float32).view(n // 128, 128, k // 128, 128) * m.s[:, None, :, None]
    return F.linear(x, blocks.reshape(n, k).to(x.dtype))


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@settings(max_examples=6)
@given(st.sampled_from(FP8), st.integers(3, 300), st.integers(3, 300), st.booleans())
def test_blocks_of_8_bit_floats_are_understood_with_their_tails(kind: torch.dtype, n: int, k: int, low: bool) -> None:
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    exact(Quantised(deepseek, q=torch.randn(n, k).to(kind), s=scale), k, torch.bfloat16 if low else torch.float32)


@pytest.mark.parametrize("kind", FP8)
def test_8_bit_floats_with_every_scale_are_understood(kind: torch.dtype) -> None:
    q = torch.randn(256, 384).to(kind)
    exact(Quantised(deepseek_whole, q=q, s=torch.rand(2, 3)), 384)
    q = torch.randn(N, K).to(kind)
    exact(
        Quantised(lambda m, x: F.linear(x, (m.q.float() * m.s).to(x.dtype)), q=q, s=torch.rand(N, 1)), K, torch.bfloat16
    )
    exact(Quantised(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s.to(x.dtype)), q=q, s=torch.rand(())), K)
    exact(Quantised(lambda m, x: F.linear(x, m.q.to(x.dtype)), q=q), K, torch.bfloat16)


def test_blocks_with_the_scales_turned_around_are_left_alone() -> None:
    def turned(m: Any, x: Tensor) -> Tensor:
        blocks = m.q.float().view(2, 128, 2, 128) * m.s.t()[:, None, :, None]
        return F.linear(x, blocks.reshape(256, 256) * m.s.repeat_interleave(128, 0).repeat_interleave(128, 1))

    module = Quantised(turned, q=torch.randn(256, 256).to(torch.float8_e4m3fn), s=torch.rand(2, 2))
    kept_right(module, torch.randn(2, 256), "no known format")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_may_be_the_scale(dtype: torch.dtype) -> None:
    q = torch.randint(-128, 128, (N, K)).to(torch.int8)
    exact(Quantised(lambda m, x: F.linear(x, m.q.to(x.dtype) * 0.0173), q=q), K, dtype)
    exact(Quantised(lambda m, x: x @ (m.q.to(x.dtype) * 0.0173).t(), q=q), K, dtype)


def test_a_division_by_a_number_is_no_scale_unless_it_gives_the_same_bits() -> None:
    q = torch.randint(-128, 128, (N, K)).to(torch.int8)
    kept_right(Quantised(lambda m, x: F.linear(x, m.q.to(x.dtype) / 127.0), q=q), torch.randn(2, K), "no known format")


# Conv1D and products of a matrix that is stored the other way around.


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_stored_with_its_columns_first_is_read_as_it_lies(bias: bool) -> None:
    def conv1d(m: Any, x: Tensor) -> Tensor:
        weight = m.q.to(x.dtype) * m.s
        return torch.addmm(m.b, x.view(-1, x.size(-1)), weight) if bias else torch.matmul(x, weight)

    q = torch.randint(-128, 128, (K, N)).to(torch.int8)
    module, x = Quantised(conv1d, q=q, s=torch.rand(N), b=torch.randn(N)), torch.randn(3, K)
    found, rewriter, _ = run(module, x)
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)
    torch.testing.assert_close(found, module(x))


def test_a_scale_of_the_wrong_axis_of_such_a_weight_is_left_alone() -> None:
    q = torch.randint(-128, 128, (K, K)).to(torch.int8)
    module = Quantised(lambda m, x: x @ (m.q.to(x.dtype) * m.s), q=q, s=torch.rand(K, 1))
    kept_right(module, torch.randn(3, K), "no known format")


# NF4 with scales that are quantised themselves.


def double_quantised(m: Any, x: Tensor) -> Tensor:
    scales = ((m.q_s.view(-1, 16) / m.factor.unsqueeze(-1)).flatten().to(x.dtype) + m.mean).unsqueeze(-1).expand(-1, 8)
    first, second = (m.table[(m.q >> 4).long()] * scales.flatten(), m.table[(m.q & 15).long()] * scales.flatten())
    return F.linear(x, torch.stack([first, second], -1).reshape(16, 32))


def nf4_buffers() -> dict[str, Tensor]:
    return {
        "q": torch.randint(0, 256, (256,)).to(torch.uint8), "q_s": torch.randint(-128, 128, (32,)).to(torch.int8),
        "factor": torch.rand(2) + 1, "mean": torch.rand(()), "table": torch.randn(16),
    }  # fmt: skip


def test_scales_that_are_quantised_are_computed_and_then_read() -> None:
    rewriter = exact(Quantised(double_quantised, **nf4_buffers()), 32)
    assert form_of(rewriter)[1] == "lut16"


def test_one_dequantised_weight_for_several_layers_is_kept_with_the_reason() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        weight = m.q.to(x.dtype) * m.s[:, None]
        return F.linear(x, weight) + F.linear(-2 * x, weight, m.s)

    kept_right(pt2e(both), torch.randn(2, K), "written out anyway")
