"""Quantised formats as libraries compute them, written anew: each is understood, bit for bit, and what only looks like
one is left alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines quantized_decomposed
import torch.nn.functional as F
from harness import REFERENCE, Rewriter, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dequant import PATTERN, Packed, form_of, run
from torch import Tensor, nn

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


# Tensor subclasses and operators of libraries.


class Castable(Packed):
    """A packed weight that is cast before the product, as torchao's NF4 is."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return (args[0].codes.float() * args[0].scale).to(kwargs["dtype"])
        return super().__torch_dispatch__(func, types, args, kwargs)


class CastLayer(nn.Module):
    def __init__(self, read_again: bool = False) -> None:
        super().__init__()
        codes = torch.randint(-128, 128, (N, K)).to(torch.int8)
        self.weight = nn.Parameter(Castable(codes, torch.rand(N, 1)), requires_grad=False)
        self.read_again = read_again

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight) * (weight.sum() if self.read_again else 1)


@pytest.mark.parametrize("read_again", [False, True])
def test_a_tensor_subclass_that_is_cast_before_the_product_is_read_by_its_parts(read_again: bool) -> None:
    layer, x, rewriter = CastLayer(read_again), torch.randn(3, K).bfloat16(), Rewriter(REFERENCE, "aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(rewritten(layer, rewriter)(x), layer(x), rtol=2e-2, atol=1)
    assert rewriter.statuses == {(PATTERN, "kept" if read_again else "fused")}, str(rewriter.report)


def test_an_operator_that_reads_codes_itself_is_kept_with_its_name() -> None:
    def packed(m: Any, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm.default(x, m.q, m.s)

    q = torch.randint(-128, 128, (32, 64)).to(torch.int8)
    module = Quantised(packed, q=q, s=torch.rand(32).bfloat16())
    kept_right(module, torch.randn(2, 64).bfloat16(), "_weight_int8pack_mm reads the codes itself")


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="the library defines the operator")
def test_quantos_operator_is_spelled_out_as_it_is_defined() -> None:
    library = torch.library.Library("quanto", "DEF")
    library.define("qbytes_mm(Tensor A, Tensor B, Tensor scales) -> Tensor")
    library.impl("qbytes_mm", lambda x, q, s: x @ (s * q.to(s.dtype)).t(), "CompositeExplicitAutograd")

    class Product(Packed):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                return torch.ops.quanto.qbytes_mm(args[0], args[1].codes, args[1].scale)
            return super().__torch_function__(func, types, args, kwargs)

    layer, x, rewriter = nn.Linear(K, N, bias=False), torch.randn(3, K), Rewriter(REFERENCE)
    codes = torch.randint(-128, 128, (N, K)).to(torch.int8)
    layer.weight = nn.Parameter(Product(codes, torch.rand(N, 1)), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(layer, rewriter)(x), layer(x))
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)
