"""Decoding with a static cache: every model's steps are recognised, agree with eager's, and leave the same cache."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from harness import Rewriter, rewritten
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache

from torch_fuse import Options
from torch_fuse.kernels import linear_residual_gemv, norm_linear_gemv
from torch_fuse.patterns import decode_norm_linear

OPS = ("decode_attention", "decode_norm_linear", "decode_linear_residual")
LAYERS = 2
# Fused sites a layer, in the order of OPS.
EXPECTED = {
    "GPTNeoX": (1, 1, 1),
    "Llama": (1, 2, 2),
    "Qwen3": (1, 2, 2),
    "Phi": (1, 1, 1),
    "StableLM": (1, 2, 2),
    "OLMo2": (1, 0, 0),
    "Cohere": (1, 0, 1),  # a LayerNorm of its own, in fp32
    "Falcon": (1, 1, 0),  # adds in place
}


def prefilled(model: nn.Module, ids: Tensor, size: int = 32) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=size)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def contents(cache: StaticCache) -> list[Any]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values, layer.cumulative_length)]


def same_steps(model: nn.Module, step: Any, batch: int, new: int, prompts: tuple[int, ...], steps: int = 3) -> None:
    """Takes steps with caches of several prompts in turn, and compares logits and caches with eager's."""
    given = [models.inputs("Llama", batch=batch, length=length)["input_ids"] for length in prompts]
    pairs = [(prefilled(model, ids), prefilled(model, ids)) for ids in given]
    tokens = torch.randint(0, 97, (steps, len(pairs), batch, new), generator=torch.Generator().manual_seed(3))
    for i in range(steps):
        for j, (mine, theirs) in enumerate(pairs):
            with torch.no_grad():
                found = step(tokens[i, j], past_key_values=mine).logits
                wanted = model(tokens[i, j], past_key_values=theirs).logits
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(contents(mine), contents(theirs), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_models_step_is_recognised_and_agrees(name: str) -> None:
    model = models.build(name)
    rewriter = Rewriter()
    same_steps(model, rewritten(model, rewriter), batch=2, new=1, prompts=(7,))
    counts = rewriter.report.counts()
    found = tuple(counts.get(op, {}).get("fused", 0) for op in OPS)
    assert found == tuple(LAYERS * n for n in EXPECTED[name]), rewriter.report


@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (1, 5), (2, 4)])
@pytest.mark.parametrize("name", ["GPTNeoX", "Llama"])
def test_several_rows_and_two_caches_in_turn(name: str, batch: int, new: int) -> None:
    model = models.build(name)
    rewriter = Rewriter()
    same_steps(model, rewritten(model, rewriter), batch, new, prompts=(9, 4))
    assert ("decode_attention", "fused") in rewriter.statuses, rewriter.report
    assert ("decode_norm_linear", "fused") in rewriter.statuses, rewriter.report


@pytest.mark.parametrize(("batch", "new"), [(1, 1), (2, 3)])
def test_norms_of_query_and_key_are_done_in_the_op(batch: int, new: int) -> None:
    model = models.build("Qwen3")
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:  # ones would hide a weight that is taken for another
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    rewriter = Rewriter(Options(kernels="reference", on_error="raise", disable=("decode_stack",)))
    same_steps(model, rewritten(model, rewriter), batch, new, prompts=(5,), steps=2)
    nodes = [node for graph in rewriter.graphs for node in graph.graph.nodes]
    calls = [node for node in nodes if "decode_attention" in str(node.target)]
    assert calls and all(call.args[-3] is not None and call.args[-2] == 1e-6 for call in calls), rewriter.report


def test_inductor_takes_the_step_as_it_is() -> None:
    """The first layer's count is read by the mask and the tables, which Inductor may compute after it has changed.

    The op writes to the caches themselves, as CUDA graphs need: no result has the size of one.
    """
    model = models.build("Llama", intermediate_size=32)
    torch._dynamo.reset()
    options = {"kernels": "reference", "on_error": "raise", "disable": ["decode_stack"]}
    step = torch.compile(model, backend="fuse", fullgraph=True, options=options)
    _, codes = run_and_get_code(lambda: same_steps(model, step, batch=1, new=1, prompts=(5,)))
    code = "\n".join(codes)
    assert code.count("torch.ops.torch_fuse.decode_attention.default(") == LAYERS
    config = model.config
    shape = (1, config.num_key_value_heads, 32, config.hidden_size // config.num_attention_heads)
    assert f", {shape}, " in code
    assert f"empty_strided_cpu({shape}" not in code


def test_a_step_is_measured_in_16_bits_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.fx.Graph()
    half, full = graph.placeholder("half"), graph.placeholder("full")
    half.meta["example_value"], full.meta["example_value"] = torch.empty(1, 16).half(), torch.empty(1, 16)
    assert "cpu" in (decode_norm_linear.unmeasured(half) or "")
    monkeypatch.setattr(decode_norm_linear, "not_hopper", lambda device: None)
    assert decode_norm_linear.unmeasured(half) is None
    assert "torch.float32" in (decode_norm_linear.unmeasured(full) or "")


def test_a_prefill_is_left_alone() -> None:
    model = models.build("Llama")
    rewriter = Rewriter()
    ids = models.inputs("Llama", batch=1, length=12)["input_ids"]
    mine, theirs = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        for cache in (mine, theirs):  # allocates the caches
            model(ids[:, :1], past_key_values=cache)
        found = rewritten(model, rewriter)(ids, past_key_values=mine).logits
        torch.testing.assert_close(found, model(ids, past_key_values=theirs).logits)
    assert not {(op, "fused") for op in OPS} & rewriter.statuses


@pytest.mark.parametrize(
    ("cache", "changes", "reason"),
    [("dynamic", {}, "a new tensor at each step"), ("static", {"sliding_window": 8}, "a full sliding window moves")],
)
def test_a_cache_that_is_not_appended_to_has_its_reason(cache: str, changes: dict[str, Any], reason: str) -> None:
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    sizes = {**models.LANGUAGE_MODELS["Llama"][1], "num_hidden_layers": 1, "sliding_window": None, **changes}
    torch.manual_seed(0)
    model, rewriter = MistralForCausalLM(MistralConfig(**sizes)).eval(), Rewriter()
    make = DynamicCache if cache == "dynamic" else lambda config: StaticCache(config=config, max_cache_len=32)
    mine, theirs = make(config=model.config), make(config=model.config)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        for each in (mine, theirs):
            model(ids, past_key_values=each)
        found = rewritten(model, rewriter)(ids[:, :1], past_key_values=mine).logits
        torch.testing.assert_close(found, model(ids[:, :1], past_key_values=theirs).logits)
    (site,) = [site for site in rewriter.report.sites if site.pattern == "decode_attention"]
    assert site.status == "kept" and reason in site.reason, rewriter.report


def test_caches_of_other_sizes_are_recognised_too() -> None:
    model = models.build("Llama")
    rewriter = Rewriter()
    step = rewritten(model, rewriter)
    ids = models.inputs("Llama", batch=1, length=6)["input_ids"]
    for size in (16, 24, 40):
        mine, theirs = (prefilled(model, ids, size) for _ in range(2))
        with torch.no_grad():
            found = step(ids[:, :1], past_key_values=mine).logits
            torch.testing.assert_close(found, model(ids[:, :1], past_key_values=theirs).logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(contents(mine), contents(theirs), atol=2e-5, rtol=2e-5)
    assert len(rewriter.report.graphs) == 2
    assert rewriter.report.counts()["decode_attention"] == {"fused": 2 * LAYERS}, rewriter.report


class Product(nn.Module):
    """A linear layer behind a norm, whose input or weight is made in the one or other way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.linear = how, nn.LayerNorm(16), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weight_written_before":
            self.linear.weight.mul_(1.0)
        h = x if self.how == "input_of_the_graph" else x[:, :1] if self.how == "view_of_an_input" else x * 2
        weight = self.linear.weight * 1 if self.how == "weight_computed" else self.linear.weight
        y = nn.functional.linear(self.norm(h), weight, self.linear.bias)
        if self.how == "weight_written_after":
            self.linear.weight.mul_(1.0)
        return y


@pytest.mark.parametrize(
    ("how", "early"),
    [
        ("computed", True),
        ("input_of_the_graph", False),
        ("view_of_an_input", False),
        ("weight_computed", False),
        ("weight_written_before", False),
        ("weight_written_after", False),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_weights_are_read_early_where_nothing_of_the_graph_writes_them(how: str, early: bool, asked: bool) -> None:
    rewriter = Rewriter(Options(kernels="reference", early_launch=asked, on_error="raise"))
    with torch.no_grad():
        rewritten(Product(how), rewriter)(torch.randn(2, 1, 16))
    calls = [node for node in rewriter.graphs[0].graph.nodes if node.target is norm_linear_gemv.reference]
    assert [call.args[-1] for call in calls] == [early and asked], rewriter.report


def test_every_layer_of_a_model_may_launch_early() -> None:
    model = models.build("GPTNeoX")
    options = Options(kernels="reference", early_launch=True, on_error="raise", disable=("decode_stack",))
    rewriter = Rewriter(options)
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(5,), steps=1)
    references = (norm_linear_gemv.reference, linear_residual_gemv.reference)
    calls = [node for node in rewriter.graphs[0].graph.nodes if node.target in references]
    assert [call.args[-1] for call in calls] == [True] * 2 * LAYERS
