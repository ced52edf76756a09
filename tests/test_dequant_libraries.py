"""Layers of quantisation libraries, where they are installed, are recognised as they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import REFERENCE, Rewriter, rewritten
from torch import Tensor, nn

N, K = 64, 256


def check(layer: nn.Module, executor: Any = "eager") -> None:
    """A layer is fused, and gives what it gave up to the last bits of its sums."""
    x = torch.randn(3, K).bfloat16()
    rewriter = Rewriter(REFERENCE, executor)
    with torch.no_grad():
        wanted = layer(x)
        found = rewritten(layer, rewriter)(x)
    assert rewriter.statuses == {("dequant_linear", "fused")}, str(rewriter.report)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_torchao(kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    configs = {
        "int8": quantization.Int8WeightOnlyConfig,
        "fp8": quantization.Float8WeightOnlyConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.granularity.PerGroup(32)
        ),
    }
    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    quantization.quantize_(model, configs[kind]())
    check(model, "aot_eager")


@pytest.mark.parametrize("bits", [8, 4])
def test_hqq(bits: int) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = quantize.HQQLinear(nn.Linear(K, N), config, compute_dtype=torch.bfloat16, device="cpu")
    quantize.HQQLinear.set_backend(quantize.HQQBackend.PYTORCH)
    check(layer)


def blocks(kind: str) -> Tensor:
    """Random blocks of a GGUF type, with finite scales."""
    bytes_a_block = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q4_K": 144}[kind]
    weights = 256 if kind == "Q4_K" else 32
    raw = torch.randint(0, 256, (N * K // weights, bytes_a_block)).to(torch.uint8)
    scale = (torch.rand(raw.shape[0], 1) / 64).half().view(torch.uint8)
    raw[:, :2] = scale
    if kind in ("Q4_1", "Q4_K"):
        raw[:, 2:4] = scale
    return raw.view(N, -1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_gguf_layers_of_diffusers(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    layer = utils.GGUFLinear(K, N, True, torch.bfloat16, "cpu")
    layer.weight = utils.GGUFParameter(blocks(kind), quant_type=getattr(gguf.GGMLQuantizationType, kind))
    layer.bias = nn.Parameter(torch.randn(N).bfloat16(), requires_grad=False)
    check(layer)
