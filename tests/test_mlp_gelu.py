"""GELUs are recognised however they are written, and taken over where they stand between two linear layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from torch import nn

from torch_fuse import Options
from torch_fuse.graph.activation import gelus
from torch_fuse.kernels._ops import INTERPRETED
from torch_fuse.patterns.mlp_gelu import _GELUS, _NOT_GELUS, MIN_ELEMENTS, MlpGelu
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns
from torch_fuse.rewrite.view import GraphView


class Mlp(nn.Module):
    def __init__(self, middle, width: int = 12) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(8, width), nn.Linear(width, 8), middle

    def forward(self, x):
        return self.middle(self.up(x), self.down)


def recognised(f, dtype: torch.dtype = torch.float32) -> list:
    """The GELUs in the graph of a function of one tensor."""
    found = []

    def backend(gm, example_inputs):
        found.extend(gelus(GraphView(gm).nodes))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend)(torch.randn(3, 4, dtype=dtype))
    return found


@pytest.mark.parametrize("name", _GELUS)
def test_a_spelling_is_one_gelu_of_the_graphs_input(name: str) -> None:
    (found,) = recognised(_GELUS[name])
    assert found.input.op == "placeholder"
    assert found.approximate == ("none" if "erf" in name else "tanh")
    torch.testing.assert_close(
        F.gelu(x := torch.randn(100), approximate=found.approximate), _GELUS[name](x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", [name for name in _NOT_GELUS if not name.startswith(("second", "other_n", "dropped"))])
def test_what_is_no_gelu_is_none(name: str) -> None:
    assert recognised(_NOT_GELUS[name]) == []


@pytest.mark.parametrize(
    "name", ["GELUActivation", "NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"]
)
def test_transformers_own_spellings(name: str) -> None:
    from transformers import activations

    assert len(recognised(getattr(activations, name)())) == 1


def test_quick_gelu_of_transformers_is_none() -> None:
    from transformers.activations import QuickGELUActivation

    assert recognised(QuickGELUActivation()) == []


def test_a_cast_inside_belongs_to_the_gelu_only_where_the_result_is_cast_back() -> None:
    (back,) = recognised(lambda x: F.gelu(x.float()).to(torch.bfloat16), torch.bfloat16)
    assert back.input.op == "placeholder"
    (wide,) = recognised(lambda x: F.gelu(x.float()), torch.bfloat16)
    assert wide.input.op != "placeholder"
    assert recognised(lambda x: F.gelu(x).float(), torch.bfloat16)[0].node.target is torch._C._nn.gelu
    narrowed = recognised(lambda x: F.gelu(x.to(torch.bfloat16)).float())
    assert [found.input.op for found in narrowed] == ["call_method"], "bfloat16's rounding of x is not skipped"


MIDDLES = {
    "other user of the input": lambda x, down: down(F.gelu(x)) + x.mean(),
    "other user of the result": lambda x, down: down(y := F.gelu(x)) + y.mean(),
    "result of the graph": lambda x, down: (down(y := F.gelu(x)), y),
    "in place": lambda x, down: down(F.gelu(x).mul_(2)),
    "gated": lambda x, down: down(F.gelu(x) * x),
    "dropout": lambda x, down: down(F.dropout(F.gelu(x), 0.5)),
    "sum before": lambda x, down: down(F.gelu(x + 1)),
    "no linear behind": lambda x, down: F.gelu(x).sum() + down(x),
    "weight of the next": lambda x, down: F.linear(down.weight, F.gelu(x.flatten(0, -2))),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_with_other_neighbours_it_is_left_to_inductor_in_silence(name: str) -> None:
    rewriter = Rewriter()
    rewritten(Mlp(MIDDLES[name]), rewriter)(torch.randn(2, 5, 8))
    assert not [site for site in rewriter.report.sites if site.pattern == "mlp_gelu"]


def test_two_linears_may_read_the_result() -> None:
    result = compare(Mlp(lambda x, down: down(y := F.gelu(x)) + F.linear(y, down.weight)), [torch.randn(2, 5, 8)])
    assert result.fused("mlp_gelu") == 1 and not result.problems


@pytest.mark.parametrize("name", [example.name for example in MlpGelu().near_misses()])
def test_near_misses_are_not_fused(name: str) -> None:
    (example,) = (example for example in MlpGelu().near_misses() if example.name == name)
    model, inputs = example.make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    assert ("mlp_gelu", "fused") not in rewriter.statuses


def tiny(name: str) -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    if name == "gptj":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "vocab_size": 40, "n_positions": 16}
        return GPTJForCausalLM(GPTJConfig(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
             "intermediate_size": 64, "max_position_embeddings": 16}  # fmt: skip
    if name == "phi":
        return PhiForCausalLM(PhiConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


@pytest.mark.parametrize(("name", "note"), [("neox", "erf"), ("gptj", "tanh"), ("phi", "tanh")])
def test_unmodified_models_fire_and_agree_with_their_gradients(name: str, note: str) -> None:
    model, options = tiny(name), Options(kernels="reference", on_error="raise", only=("mlp_gelu",))
    result = compare(model, [torch.randint(0, 40, (2, 9))], {"use_cache": False}, options=options, draws=1)
    assert result.fused("mlp_gelu") == 2, result.reasons
    assert {site.reason for site in result.report.sites if site.status == "fused"} == {note}
    assert not result.problems


def decision(model: nn.Module, x: torch.Tensor) -> tuple[str, str, str]:
    """Status, reason and op of the only GELU of a model, with kernels where they win; the fused graph is not run."""
    sites = []

    def backend(gm, example_inputs):
        outcome = rewrite(gm, Options(on_error="raise", only=("mlp_gelu",)), patterns())
        sites.extend(site for site in outcome.report.sites if site.pattern == "mlp_gelu")
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    (site,) = sites
    return site.status, site.reason, site.op


def plain(x, down):
    return down(F.gelu(x))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_without_a_gpu_it_is_kept() -> None:
    status, reason, _ = decision(Mlp(plain), torch.randn(4, 8))
    assert (status, reason) == ("kept", "the kernel cannot run: Triton has no backend for device 'cpu'")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_where_the_kernel_runs_large_ones_are_fused_and_small_ones_kept(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("torch_fuse.kernels.gelu.no_triton", lambda x: None)
    rows = 64
    large, small = (Mlp(plain, width).to(dtype) for width in (MIN_ELEMENTS // rows, MIN_ELEMENTS // rows - 1))
    x = torch.randn(rows, 8, dtype=dtype)
    assert decision(large, x) == ("fused", "erf", "torch_fuse::gelu")
    status, reason, _ = decision(small, x)
    assert status == "kept" and reason == "1048512 elements: bound by the launch; it pays from 1048576 on"
    status, reason, _ = decision(large.float(), x.float())
    assert status == "kept" and "torch.float32" in reason
