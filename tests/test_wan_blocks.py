"""Wan's block in the numerics of its implementations: what fires, what is left and why, and that all of it agrees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import wan_blocks
from harness import Rewriter, compare, rewritten
from torch import Tensor, nn

ROTATED = ("norm_qkv_rope_attention", "fused", "rms_full norm, RoPE on 16 of 16 lanes (interleaved)")
WIDE = ("norm_qkv_rope_attention", "kept", "it is computed in float64 from lower precision, which no kernel does")
SINGLE = (
    "norm_qkv_rope_attention", "missed",
    "the samples of query or key are computed one by one and joined: they may be rotated",
)  # fmt: skip
CROSS = (
    "norm_qkv_rope_attention", "kept", "query or key is normalised and not rotated: Inductor does that in one kernel",
)  # fmt: skip
NORMS = [
    ("gated_residual_norm", "fused", "no term, 1 x LayerNorm, modulated"),
    ("gated_residual_norm", "fused", "one term with a gate, 1 x LayerNorm"),
    ("gated_residual_norm", "fused", "one term, 1 x LayerNorm, modulated"),
]
SUM = ("attention_skip", "kept", "layer_norm_1 follows: the sum goes into one kernel with the norm")
LOWERED = ("attention_skip", "missed", "the projection computes in another type than its operands' (autocast)")
ONE_KERNEL = ("combine", "kept", "Inductor fuses it into one kernel; no registered fusion takes it further")
SCALED = (
    "attention_skip", "kept",
    "flatten_2 is no result of a linear layer that nothing else reads: Inductor fuses the sum into one kernel",
)  # fmt: skip

EXPECTED = {
    "diffusers": [ROTATED, CROSS, *NORMS, SUM],
    "diffusers_complex": [ROTATED, CROSS, *NORMS, SUM],
    "original_autocast": [SINGLE, CROSS, *NORMS, LOWERED],
    "rounded_gate": [ROTATED, CROSS, *NORMS, SUM],
    "per_token": [ROTATED, CROSS, *NORMS, SUM],
    "image_to_video": [ROTATED, CROSS, CROSS, *NORMS, SUM, ONE_KERNEL],
    "adapter": [ROTATED, CROSS, CROSS, *NORMS, SUM, SCALED],
    "gated_output": [ROTATED, CROSS, *NORMS, ONE_KERNEL],
}
IN_FP32 = {("diffusers_complex", ROTATED): WIDE, ("original_autocast", LOWERED): SUM}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", wan_blocks.BLOCKS)
def test_every_site_is_fused_or_left_for_a_reason_and_results_and_gradients_agree(
    name: str, dtype: torch.dtype
) -> None:
    result = compare(wan_blocks.build(name, dtype), wan_blocks.inputs(name, dtype), draws=1)
    found = [(s.pattern, s.status, s.reason) for s in result.report.sites if "gelu" not in s.pattern]
    expected = EXPECTED[name]
    if dtype == torch.float32:
        expected = [IN_FP32.get((name, site), site) for site in expected]
    assert sorted(found) == sorted(expected), result.reasons
    assert not result.problems


@pytest.mark.parametrize("name", ["diffusers", "diffusers_complex", "rounded_gate", "per_token"])
def test_one_dynamic_graph_serves_all_batches_and_lengths(name: str) -> None:
    rewriter, model = Rewriter(), wan_blocks.build(name)
    compiled = rewritten(model, rewriter, dynamic=True)
    with torch.no_grad():
        for batch, tokens in ((2, 12), (3, 7), (4, 20)):
            inputs = wan_blocks.inputs(name, batch=batch, tokens=tokens)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=2e-5, rtol=1e-4)
    assert len(rewriter.report.graphs) == 1
    assert rewriter.report.counts()["gated_residual_norm"] == {"fused": 3}, str(rewriter.report)


# -- a rotation in float64 ---------------------------------------------------------------------------------------------


class Rotated(nn.Module):
    """Attention with a rotation in float64, and a norm that may be in float64 as well."""

    def __init__(self, wide_norm: bool = False) -> None:
        super().__init__()
        self.qk, self.wide_norm = nn.Linear(32, 64), wide_norm
        self.weight = nn.Parameter(torch.rand(16) + 0.5)

    def rotated(self, x: Tensor, table: Tensor) -> Tensor:
        wide = x.double() if self.wide_norm else x
        normed = F.rms_norm(wide, (16,), self.weight.to(wide.dtype), 1e-6)
        pairs = torch.view_as_complex(normed.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k = self.qk(x).unflatten(-1, (4, 16)).transpose(1, 2).chunk(2, 1)
        mixed = F.scaled_dot_product_attention(self.rotated(q, table), self.rotated(k, table), k)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("dtype", "wide_norm", "status"),
    [(torch.bfloat16, False, "fused"), (torch.float16, False, "fused"), (torch.float32, False, "kept"),
     (torch.bfloat16, True, "kept"), (torch.float64, True, "fused")],
)  # fmt: skip
def test_a_rotation_in_float64_is_fused_where_its_result_is_rounded_to_16_bits_or_all_is_in_float64(
    dtype: torch.dtype, wide_norm: bool, status: str
) -> None:
    torch.manual_seed(0)
    angles = torch.arange(6)[:, None] / 10 ** torch.arange(8.0, dtype=torch.float64)
    table = torch.polar(torch.ones_like(angles), angles)
    result = compare(Rotated(wide_norm).to(dtype), (torch.randn(2, 6, 32).to(dtype).requires_grad_(), table))
    assert [s.status for s in result.report.sites if s.kind == "attention"] == [status], result.reasons
    assert not result.problems


def test_all_layers_share_one_table_in_float32() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Rotated() for _ in range(2))

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, table)
            return x

    rewriter = Rewriter()
    table = torch.polar(torch.ones(6, 8).double(), torch.rand(6, 8).double())
    rewritten(Layers().bfloat16(), rewriter)(torch.randn(2, 6, 32).bfloat16(), table)
    (graph,) = rewriter.graphs
    floats = [node for node in graph.graph.nodes if node.target == "float"]
    assert rewriter.report.counts()["norm_qkv_rope_attention"] == {"fused": 2} and len(floats) == 1


# -- a sum, and the norm behind it, on two sides of autocast -----------------------------------------------------------


class AcrossAutocast(nn.Module):
    """x + gate * y and LayerNorm, each with autocast on or off."""

    def __init__(self, of_sum: bool, of_norm: bool) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.gate = nn.Parameter(torch.randn(32))
        self.of_sum, self.of_norm = of_sum, of_norm

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.project(y)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.of_sum):
                x = x + y * self.gate
            with torch.autocast("cpu", torch.bfloat16, enabled=self.of_norm):
                return x, self.norm(x).bfloat16()


@pytest.mark.parametrize("of_norm", [False, True])
@pytest.mark.parametrize("of_sum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_and_its_norm_are_one_kernel_whether_or_not_autocast_changes_between(
    of_sum: bool, of_norm: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(2, 5, 32).to(dtype).requires_grad_() for _ in range(2))
    model = AcrossAutocast(of_sum, of_norm)
    if not of_norm:
        model.norm.to(torch.promote_types(dtype, torch.float32))
    result = compare(model, (x, y))
    assert result.fused("gated_residual_norm") == 1, result.reasons
    assert not result.problems


def test_a_change_of_grad_mode_between_a_sum_and_its_norm_still_keeps_them_apart() -> None:
    class Detached(AcrossAutocast):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                x = x + self.project(y) * self.gate
            return x, self.norm(x)

    result = compare(Detached(False, False), (torch.randn(2, 5, 32).requires_grad_(), torch.randn(2, 5, 32)))
    assert result.fused("gated_residual_norm") == 0 and not result.problems
    assert "autocast or grad mode changes inside the region" in result.reasons


# -- casts to another tensor's type ------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["sum", "skip"])
def test_a_scale_cast_to_the_type_of_the_sum_that_it_modulates_is_not_computed_of_it(of: str) -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            total = x + self.project(y)
            scale = scale.type_as(total if of == "sum" else x)
            return total, F.layer_norm(total, (32,)) * (1 + scale) + 0.0 * scale

    torch.manual_seed(0)
    x, y = (torch.randn(2, 5, 32).bfloat16().requires_grad_() for _ in range(2))
    result = compare(Modulated().bfloat16(), (x, y, torch.randn(2, 1, 32).requires_grad_()))
    notes = [s.reason for s in result.report.sites if s.pattern == "gated_residual_norm"]
    assert notes == ["one term, 1 x LayerNorm, modulated"] and not result.problems


def test_a_cast_to_a_type_computed_of_values_that_are_written_to_keeps_the_type_and_not_the_values() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        y = y.half()
        cast = x.type_as(y)
        y.mul_(2)
        return cast + y

    result = compare(model, (torch.randn(3, 4), torch.randn(3, 4)), grad=False)
    assert not result.problems
    assert not [node for graph in result.graphs for node in graph.graph.nodes if node.target == "type_as"]


def test_a_cast_inside_of_a_function_transform_costs_a_graph_no_fusion() -> None:
    class Mapped(Rotated):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            x = torch.vmap(lambda sample: (2 * sample.float()).type_as(sample))(x)
            return super().forward(x, table)

    torch.manual_seed(0)
    table = torch.polar(torch.ones(6, 8).double(), torch.rand(6, 8).double())
    result = compare(Mapped().bfloat16(), (torch.randn(2, 6, 32).bfloat16(), table), grad=False)
    assert result.fused("norm_qkv_rope_attention") == 1, result.reasons
    assert not result.problems
