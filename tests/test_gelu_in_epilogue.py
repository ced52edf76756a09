"""The tanh GELU goes into the product before it where nothing needs the value in between, and says why elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from torch import nn

from torch_fuse import Options
from torch_fuse.patterns._linear_gelu_examples import near_misses
from torch_fuse.patterns.linear_gelu import LinearGelu
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

BOTH = ("linear_gelu", "mlp_gelu")


class Mlp(nn.Module):
    def __init__(self, width: int = 48, hidden: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def reasons(model, *inputs, options: Options | None = None, grad: bool = False) -> list[str]:
    rewriter = Rewriter(options or Options(kernels="reference", on_error="raise", only=("linear_gelu",)))
    with torch.set_grad_enabled(grad):
        rewritten(model, rewriter)(*inputs)
    return [f"{site.status}: {site.reason}" for site in rewriter.report.sites if site.pattern == "linear_gelu"]


@pytest.mark.parametrize("name", [example.name for example in LinearGelu().spellings()])
def test_a_spelling_leaves_neither_gelu_nor_the_value_before_it(name: str) -> None:
    (example,) = (example for example in LinearGelu().spellings() if example.name == name)
    model, inputs = example.make(torch.bfloat16)
    result = compare(model, inputs, grad=False, options=Options(kernels="reference", only=("linear_gelu",)))
    assert result.fused("linear_gelu") == 1 and not result.problems
    (graph,) = result.graphs
    called = [getattr(node.target, "__name__", node.target) for node in graph.graph.nodes if node.op != "placeholder"]
    assert not {"gelu", "tanh", "sigmoid", "addmm", "matmul"}.intersection(called), called
    assert called.count("linear") == 1  # the one behind it


@pytest.mark.parametrize("name", [example.name for example in near_misses("tanh") if example.name != "gradients"])
def test_a_near_miss_does_not_fire_and_agrees(name: str) -> None:
    (example,) = (example for example in LinearGelu().near_misses() if example.name == name)
    result = compare(*example.make(torch.float32), grad=False)
    assert result.fused("linear_gelu") == 0 and not result.problems, result.reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_bias", "kept: the linear layer has no bias, which the epilogue adds"),
        ("bias_a_row", "kept: the bias has shape [10, 24]; the epilogue adds one number a column"),
    ],
)
def test_what_the_epilogue_cannot_do_is_kept_with_the_reason(name: str, reason: str) -> None:
    (example,) = (example for example in LinearGelu().near_misses() if example.name == name)
    model, inputs = example.make(torch.float32)
    assert reasons(model, *inputs) == [reason]


def test_with_gradients_it_is_kept_with_the_reason_and_the_gelu_alone_is_fused() -> None:
    result = compare(Mlp(), [torch.randn(4, 12)])
    sites = [(site.pattern, site.status) for site in result.report.sites if site.pattern in BOTH]
    assert sites == [("linear_gelu", "kept"), ("mlp_gelu", "fused")] and not result.problems
    assert "gradients are wanted" in next(s.reason for s in result.report.sites if s.pattern == "linear_gelu")


def test_without_gradients_the_gelu_is_taken_once() -> None:
    result = compare(Mlp().requires_grad_(False), [torch.randn(4, 12)], grad=False)
    assert [(site.pattern, site.status) for site in result.report.sites if site.pattern in BOTH] == [
        ("linear_gelu", "fused")
    ]


def test_under_autocast_a_weight_of_another_dtype_is_left_alone() -> None:
    model = Mlp().requires_grad_(False)

    def under_autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    assert reasons(under_autocast, torch.randn(4, 12)) == ["kept: input, weight, bias and result differ in dtype"]


def test_sizes_may_be_dynamic_also_in_the_views_of_conv1d() -> None:
    (example,) = (example for example in LinearGelu().spellings() if example.name == "conv1d")
    model, (x,) = example.make(torch.float32)
    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    with torch.no_grad():
        for rows in (5, 9):
            x = torch.randn(2, rows, 8)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(compiled(x), model(x))
    assert ("linear_gelu", "fused") in rewriter.statuses and len(rewriter.graphs) == 1


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def test_an_unmodified_gpt2_fires_and_agrees() -> None:
    torch.manual_seed(0)
    options = Options(kernels="reference", on_error="raise", only=("linear_gelu",))
    result = compare(gpt2().eval(), [torch.randint(0, 40, (2, 9))], {"use_cache": False}, grad=False, options=options)
    assert result.fused("linear_gelu") == 2 and not result.problems, result.reasons


# -- with kernels ----------------------------------------------------------------------------------------------------


def decision(model, x: torch.Tensor, **options) -> str:
    """What becomes of the only site, with kernels where they win; the fused graph is not run."""
    sites = []

    def backend(gm, example_inputs):
        outcome = rewrite(gm, Options(on_error="raise", only=("linear_gelu",), **options), patterns())
        sites.extend(site for site in outcome.report.sites if site.pattern == "linear_gelu")
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    (site,) = sites
    return f"{site.status}: {site.reason}"


def test_without_a_gpu_it_is_kept() -> None:
    assert decision(Mlp(), torch.randn(4, 12), unmeasured=True) == (
        "kept: there is no such epilogue: device is 'cpu'; allowed: 'cuda', which cuBLASLt runs on"
    )


@pytest.fixture
def epilogue(monkeypatch) -> None:
    """As if the CPU had the epilogue."""
    monkeypatch.setattr("torch_fuse.kernels.linear_gelu.supports_device", lambda device: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_fires_from_the_least_number_of_rows_measured(dtype: torch.dtype, epilogue) -> None:
    model, x = Mlp().to(dtype), torch.randn(4, 12, dtype=dtype)
    assert decision(model, x) == "kept: 4 rows: measured to win from 1536 on"
    assert decision(model, x.expand(384, 4, 12).contiguous()) == "fused: weight [48, 12]"
    assert decision(model, x, unmeasured=True) == "fused: weight [48, 12]"
    assert decision(model.float(), x.float(), unmeasured=True) == (
        "kept: there is no such epilogue: dtype is torch.float32; allowed: bfloat16, float16"
    )


def test_where_pytorch_would_not_use_the_epilogue_or_copy_it_is_kept(epilogue) -> None:
    model, x = Mlp().bfloat16(), torch.randn(2, 3, 4, 12).bfloat16()
    for same in (x, x[:1], x[:, :, :1], x[:1, :1], x.flatten(0, 2)[::2]):
        assert decision(model, same, unmeasured=True) == "fused: weight [48, 12]", same.stride()
    assert decision(model, x[:1, :1, :1], unmeasured=True) == (
        "kept: a product of 1 row(s) with a weight [48, 12] has no epilogue"
    )
    for other in (x.transpose(0, 1), x.transpose(-1, -2).contiguous().transpose(-1, -2), x[:, ::2], x[:, :1]):
        assert "it would be copied" in decision(model, other, unmeasured=True), other.stride()
    model.up.bias = nn.Parameter(torch.randn(48, 2).bfloat16()[:, 0])
    assert "the bias has stride 2" in decision(model, x, unmeasured=True)
    model = Mlp().bfloat16()
    model.up.weight = nn.Parameter(torch.randn(48, 24).bfloat16()[:, ::2])
    assert "the weight's strides are (24, 2): it would be copied" in decision(model, x, unmeasured=True)


def test_a_weight_that_decides_itself_what_a_linear_layer_is_stays(epilogue) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Mlp()
    model.up.weight = nn.Parameter(TwoTensor(torch.randn(48, 12), torch.randn(48, 12)), requires_grad=False)
    assert "of a tensor subclass" in decision(model, torch.randn(4, 12), unmeasured=True)
