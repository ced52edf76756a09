"""Decoding with quantised weights: which pattern takes what, activations in the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, rewritten
from test_decode import same_steps
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import dequant_linear
from torch_fuse.kernels.packed_weight import Format, decode

K, N = 32, 48


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight, a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def quantised(module: nn.Module) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantised(child)
    return module


class Block(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(K)
        self.up, self.gate, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)
        quantised(self).requires_grad_(False)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def run(body: Callable[[Any, Tensor], Any], x: Tensor, **options: Any) -> tuple[list[str], Rewriter]:
    """The activation of each op in the only graph, whose results are those of the module."""
    block = Block(body)
    rewriter = Rewriter(Options(kernels="reference", on_error="raise", **options))
    with torch.set_grad_enabled(x.requires_grad):
        wanted = block(x)
        found = rewritten(block, rewriter)(x)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    (graph,) = rewriter.graphs
    ops = [node for node in graph.graph.nodes if node.target is dequant_linear.reference]
    return [node.args[14] if len(node.args) == 15 else "none" for node in ops], rewriter


def test_norms_and_residual_sums_leave_quantised_weights_to_the_op_that_reads_their_codes() -> None:
    found, rewriter = run(lambda m, x: x + m.down(F.gelu(m.up(m.norm(x)))), torch.randn(1, 1, K))
    assert found == ["gelu", "none"]
    assert {("decode_norm_linear", "kept"), ("decode_linear_residual", "kept"), ("dequant_linear", "fused")} <= (
        rewriter.statuses
    )


def test_a_models_step_is_recognised_and_agrees() -> None:
    model = quantised(models.build("GPTNeoX").requires_grad_(False))
    rewriter = Rewriter(Options(kernels="reference", on_error="raise"))
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(5,), steps=1)
    ops = [node for node in rewriter.graphs[0].graph.nodes if node.target is dequant_linear.reference]
    assert [node.args[14:] for node in ops] == [(), (), ("gelu",), ()] * 2 + [()]


ABSORBED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "gelu": (lambda m, x: m.down(F.gelu(m.up(x))), "gelu"),
    "tanh": (lambda m, x: m.down(F.gelu(m.up(x), approximate="tanh")), "gelu_tanh"),
    "written out": (lambda m, x: m.down((lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)))(m.up(x))), "gelu"),
    "silu": (lambda m, x: m.down(F.silu(m.up(x))), "silu"),
    "gated": (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), "none"),
    "read again": (lambda m, x: (lambda y: m.down(F.gelu(y)) + y.sum())(m.up(x)), "none"),
    "returned": (lambda m, x: F.gelu(m.up(x)), "none"),
    "silu in place": (lambda m, x: m.down(F.silu(m.up(x), inplace=True)), "none"),
    "another activation": (lambda m, x: m.down(F.relu(m.up(x))), "none"),
}


@pytest.mark.parametrize("name", ABSORBED)
def test_an_activation_between_two_layers_is_computed_by_the_first(name: str) -> None:
    body, activation = ABSORBED[name]
    found, rewriter = run(body, torch.randn(2, 1, K))
    assert set(found) - {"none"} == {activation} - {"none"}, str(rewriter.report)


@pytest.mark.parametrize(("rows", "grad"), [(300, False), (2, True)])
def test_an_activation_of_many_rows_or_with_a_gradient_is_left_to_others(rows: int, grad: bool) -> None:
    assert dispatch.has_epilogue(1) and not dispatch.has_epilogue(300) and not dispatch.has_epilogue(None)
    found, _ = run(ABSORBED["gelu"][0], torch.randn(rows, 1, K, requires_grad=grad))
    assert found == ["none"] * 2


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_op_with_an_activation_against_float64(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    form = Format(8, "int", 1, K)
    codes, scale = torch.randint(-128, 128, (N, K)).to(torch.int8), torch.rand(N, 1) / 64
    x, bias = torch.randn(3, K).to(dtype), torch.randn(N).to(dtype)
    act = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu, "none": lambda y: y}
    exact = act[activation](x.double() @ decode(codes, scale, None, None, form, torch.float64).T + bias.double())
    theirs = act[activation](F.linear(x, decode(codes, scale, None, None, form, dtype), bias))
    found = dequant_linear.dequant_linear(x, codes, scale, None, None, bias, *form, activation)
    assert (found.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + 1e-6


def test_an_activation_without_a_gradient_and_an_unknown_one_are_refused() -> None:
    form = Format(8, "int", 1, K)
    given = (torch.randn(1, K), torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1), None, None, None, *form)
    with pytest.raises(ValueError, match="activation is 'relu'; allowed: none, gelu"):
        dequant_linear.dequant_linear(*given, "relu")
    given[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient through 'gelu'"):
        dequant_linear.dequant_linear(*given, "gelu")
