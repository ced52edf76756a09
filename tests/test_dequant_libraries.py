"""Layers of quantisation libraries, where they are installed, are recognised as they come, or kept with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import REFERENCE, Rewriter, rewritten
from torch import Tensor, nn

from torch_fuse import inline_layerwise_casting
from torch_fuse.graph import library_ops

N, K = 64, 256


def check(layer: nn.Module, executor: Any = "eager", dtype: torch.dtype = torch.bfloat16) -> Callable[..., Any]:
    """A layer is fused, and gives what it gave up to the last bits of its sums; the compiled layer."""
    x = torch.randn(3, K).to(dtype)
    rewriter = Rewriter(REFERENCE, executor)
    with torch.no_grad():
        wanted = layer(x)
        compiled = rewritten(layer, rewriter)
        found = compiled(x)
    assert rewriter.statuses == {("dequant_linear", "fused")}, str(rewriter.report)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    return compiled


def stays(layer: nn.Module, status: str, reason: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """A layer is left as it is, and the report says why."""
    x, rewriter = torch.randn(3, K).to(dtype), Rewriter(REFERENCE)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(rewritten(layer, rewriter)(x), wanted)
    assert rewriter.statuses == {("dequant_linear", status)}, str(rewriter.report)
    assert reason in rewriter.report.sites[0].reason


def torchao(kind: str, seed: int = 0) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    grouped = quantization.granularity.PerGroup(32)
    configs: dict[str, Callable[[], Any]] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8 groups": lambda: quantization.Int8WeightOnlyConfig(granularity=grouped),
        "fp8": quantization.Float8WeightOnlyConfig,
        "fp8 e5m2": lambda: quantization.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=grouped),
        "int4 zeros": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=grouped, mapping_type=quantization.MappingType.ASYMMETRIC
        ),
        "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig,
    }
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    quantization.quantize_(model, configs[kind]())
    return model


@pytest.mark.parametrize("kind", ["int8", "int8 groups", "fp8", "fp8 e5m2", "int4", "int4 zeros"])
def test_torchao(kind: str) -> None:
    check(torchao(kind), "aot_eager")


def test_torchao_with_quantised_activations_is_left_alone() -> None:
    stays(torchao("int8 activations"), "kept", "quantised activations")


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("change", ["load_state_dict", "assign", "parameter", "in place"])
def test_a_torchao_weight_that_is_changed_after_compilation_counts(kind: str, change: str) -> None:
    model, other = torchao(kind), torchao(kind, seed=1)
    compiled = check(model, "aot_eager")
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif change == "parameter":  # as a merged LoRA that is quantised again
        model[0].weight = other[0].weight
        model[0].bias = other[0].bias
    else:
        for name in model[0].weight.__tensor_flatten__()[0]:
            getattr(model[0].weight, name).copy_(getattr(other[0].weight, name))
        model[0].bias.data.copy_(other[0].bias)
    x = torch.randn(3, K).bfloat16()
    with torch.no_grad():
        wanted = copy.deepcopy(other)(x)
        torch.testing.assert_close(compiled(x), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("cast", [False, True])
def test_torchao_nf4_with_double_quantisation(cast: bool) -> None:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(nf4.to_nf4(torch.randn(2 * N, K).bfloat16(), 32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nf4.linear_nf4(x, self.weight) if cast else nn.functional.linear(x, self.weight)

    check(Layer(), "aot_eager")


def test_a_cast_nf4_weight_that_is_written_to_before_the_product_is_left_alone() -> None:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "other"):
                packed = nf4.to_nf4(torch.randn(2 * N, K).bfloat16(), 32)
                setattr(self, name, nn.Parameter(packed, requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.to(x.dtype)
            self.weight.copy_(self.other)
            return nn.functional.linear(x, weight)

    layer, x, rewriter = Layer(), torch.randn(3, K).bfloat16(), Rewriter(REFERENCE, "aot_eager")
    with torch.no_grad():
        wanted = nn.functional.linear(x, layer.weight.to(x.dtype))
        torch.testing.assert_close(rewritten(layer, rewriter)(x), wanted)
    assert rewriter.statuses == {("dequant_linear", "missed")} and "in place" in rewriter.report.sites[0].reason


def test_a_cast_nf4_weight_that_others_read_too_is_kept() -> None:
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(nf4.to_nf4(torch.randn(2 * N, K).bfloat16(), 32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.to(x.dtype)
            return nn.functional.linear(x, weight) * weight.sum()

    stays(Layer(), "kept", "written out anyway")


@pytest.mark.parametrize("bits", [8, 4])
def test_hqq(bits: int) -> None:
    check(hqq(bits, 1))


@pytest.mark.parametrize("bits, axis, reason", [
    (4, 0, "no known format"), (8, 0, "no known format"), (3, 1, "no tensor of half a byte"),
    (2, 1, "no tensor of half a byte"), (1, 1, "no tensor of half a byte"),
])  # fmt: skip
def test_hqq_with_groups_down_the_columns_or_of_few_bits_is_left_alone(bits: int, axis: int, reason: str) -> None:
    stays(hqq(bits, axis), "missed", reason)


def hqq(bits: int, axis: int) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    layer: nn.Module = quantize.HQQLinear(nn.Linear(K, N), config, compute_dtype=torch.bfloat16, device="cpu")
    quantize.HQQLinear.set_backend(quantize.HQQBackend.PYTORCH)
    return layer


GGUF = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


@pytest.mark.parametrize("kind", GGUF)
def test_gguf_layers_of_diffusers(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    type_ = getattr(gguf.GGMLQuantizationType, kind)
    weights, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = torch.randint(0, 256, (N * K // weights, size)).to(torch.uint8)
    for at in GGUF[kind]:  # finite scales
        blocks[:, at : at + 2] = (torch.rand(blocks.shape[0], 1) / 64).half().view(torch.uint8)
    layer = utils.GGUFLinear(K, N, True, torch.float32, "cpu")
    layer.weight = utils.GGUFParameter(blocks.view(N, -1), quant_type=type_)
    layer.bias = nn.Parameter(torch.zeros(N), requires_grad=False)
    compiled = check(layer, dtype=torch.float32)
    with torch.no_grad():  # the decoder's weight, bit for bit
        assert torch.equal(compiled(torch.eye(K)), utils.dequantize_gguf_tensor(layer.weight).float().t())


@pytest.mark.parametrize("kind", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
def test_quanto_of_one_byte(kind: str) -> None:
    check(quanto(kind), "aot_eager")


def test_quantos_product_is_only_spelled_out_where_it_computes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quanto("qint8")
    monkeypatch.setattr(library_ops, "_is_as_spelled", lambda *args: False)
    stays(model, "missed", "quanto.qbytes_mm")


def test_quanto_of_less_than_a_byte_is_left_alone() -> None:
    stays(quanto("qint2"), "missed", "tensor subclass of tensor subclasses")


def quanto(kind: str) -> nn.Module:
    library = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    library.quantize(model, weights=getattr(library, kind))
    library.freeze(model)
    return model


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_of_4_bits_reads_codes_by_itself(double: bool) -> None:
    library = pytest.importorskip("bitsandbytes")
    layer = library.nn.Linear4bit(K, N, compute_dtype=torch.bfloat16, compress_statistics=double, quant_type="nf4")
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    stays(layer.to("cpu").bfloat16().requires_grad_(False), "kept", "bitsandbytes::gemm_4bit reads the codes itself")


def test_bitsandbytes_of_8_bits_is_left_alone() -> None:
    library = pytest.importorskip("bitsandbytes")
    layer = library.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    stays(layer.to("cpu").requires_grad_(False), "missed", "not known to compute the same", torch.float16)


def test_pt2e() -> None:
    pytest.importorskip("torchao")
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    x = (torch.randn(3, K),)
    model = torch.export.export(nn.Sequential(nn.Linear(K, N)).eval(), x).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(model, quantizer)
    prepared(*x)
    check(pt2e.convert_pt2e(prepared), dtype=torch.float32)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_of_diffusers(storage: torch.dtype) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K), nn.Conv1d(3, 3, 1)).bfloat16()
    model.requires_grad_(False)
    hooks.apply_layerwise_casting(model, storage_dtype=storage, compute_dtype=torch.bfloat16)
    x = torch.randn(3, K).bfloat16()
    wanted = model(x)
    assert inline_layerwise_casting(model) == 2
    assert torch.equal(model(x), wanted) and model[0].weight.dtype == storage
    check(model[:3])
    assert model[0].weight.dtype == storage and inline_layerwise_casting(nn.Linear(2, 2)) == 0
