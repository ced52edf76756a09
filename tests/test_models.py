"""Unmodified models: every attention is fused or refused with a reason, and outputs and gradients stay right.

`fusion_counts.json` locks how many sites of each model are fused, kept and missed. After a change that is meant to
change them: `pytest tests/test_models.py -k counts --update-fusion-counts`, and read the diff.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import models
import pytest
import torch
from harness import Rewriter, compare, fresh_inputs, rewritten

from torch_fuse.kernels import qk_norm_rope

COUNTS = Path(__file__).parent / "fusion_counts.json"
ATTENTIONS = dict.fromkeys(models.MODELS, 2) | {"Wan": 4}  # two layers each; Wan's have cross-attention too


@pytest.mark.parametrize("name", models.MODELS)
def test_every_attention_is_fused_or_refused_with_a_reason_and_the_counts_are_locked(
    name: str, request: pytest.FixtureRequest
) -> None:
    rewriter = Rewriter()
    with torch.no_grad():
        rewritten(models.build(name), rewriter)(**models.inputs(name))
    sites = rewriter.report.sites
    assert len({site.node for site in sites if site.kind == "attention"}) >= ATTENTIONS[name]
    assert all(site.reason and site.location for site in sites)
    assert not [graph.error for graph in rewriter.report.graphs if graph.error]
    locked = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if request.config.getoption("--update-fusion-counts"):
        locked[name] = rewriter.report.counts()
        COUNTS.write_text(json.dumps(dict(sorted(locked.items())), indent=2) + "\n")
    assert rewriter.report.counts() == locked[name], str(rewriter.report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", models.MODELS)
def test_outputs_and_gradients_agree(name: str, dtype: torch.dtype) -> None:
    model = models.build(name).to(dtype)
    result = compare(model, kwargs=models.inputs(name, dtype=dtype), draws=1)
    assert result.fused("norm_qkv_rope_attention") >= 2, result.reasons
    assert not result.problems


@pytest.mark.parametrize("name", models.MODELS)
def test_one_dynamic_graph_serves_all_batches_and_lengths(name: str) -> None:
    model, rewriter = models.build(name), Rewriter()
    compiled = rewritten(copy.deepcopy(model), rewriter, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 10), (3, 17), (5, 33)):
            inputs = models.inputs(name, batch, length)
            expected, found = model(**fresh_inputs(inputs))[0], compiled(**fresh_inputs(inputs))[0]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if name in ("GPTNeoX", "Llama", "Wan"):
        assert len(rewriter.report.graphs) == _graphs_without_rewriting(name)
    assert rewriter.report.counts().get("norm_qkv_rope_attention", {}).get("fused", 0) >= 2, str(rewriter.report)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "OLMo2", "Wan"])
def test_dynamic_shapes_lose_nothing_that_static_shapes_find(name: str) -> None:
    found = []
    for dynamic in (False, True):
        rewriter = Rewriter()
        with torch.no_grad():
            rewritten(models.build(name), rewriter, dynamic=dynamic)(**models.inputs(name))
        found.append([s for s in rewriter.report.sites if s.kind == "attention"])
    static, dynamic_sites = found
    assert [(s.pattern, s.status) for s in dynamic_sites] == [(s.pattern, s.status) for s in static]
    # With dynamic=True, Dynamo makes an input of every float attribute: a norm's epsilon is no constant then.
    for before, after in zip(static, dynamic_sites, strict=True):
        assert after.reason == before.reason or "its epsilon is no constant" in after.reason


def _graphs_without_rewriting(name: str) -> int:
    """How many graphs Dynamo makes of the same calls when nothing is rewritten."""
    seen = []

    def count(gm: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        seen.append(gm)
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(models.build(name), backend=count, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 10), (3, 17), (5, 33)):
            compiled(**fresh_inputs(models.inputs(name, batch, length)))
    return len(seen)


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Wan"])
def test_training_mode_agrees(name: str) -> None:
    model = models.build(name).train()
    result = compare(model, kwargs=models.inputs(name), draws=1, executor="aot_eager")
    assert result.fused("norm_qkv_rope_attention") >= 2, result.reasons
    assert not result.problems


@pytest.mark.parametrize("name", ["Qwen3", "Wan"])
def test_one_token_agrees(name: str) -> None:
    result = compare(models.build(name), kwargs=models.inputs(name, batch=1, length=1), draws=1, grad=False)
    assert not result.problems, result.reasons


def test_padding_is_not_taken_for_a_causal_mask() -> None:
    model, inputs = models.build("Llama"), models.inputs("Llama")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    result = compare(model, kwargs={**inputs, "attention_mask": mask}, draws=1, grad=False)
    assert result.fused("causal_mask") == 0
    assert result.fused("norm_qkv_rope_attention") == 2, result.reasons
    assert not result.problems


def test_a_sliding_window_is_not_taken_for_a_causal_mask() -> None:
    torch.manual_seed(0)
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**models._GROUPED, sliding_window=4)
    result = compare(MistralForCausalLM(config).eval(), kwargs=models.inputs("Llama"), draws=1, grad=False)
    assert result.fused("causal_mask") == 0
    assert result.fused("norm_qkv_rope_attention") == 2, result.reasons
    assert not result.problems


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_written_out_is_recognised_like_a_call(implementation: str) -> None:
    model = models.build("Llama", attn_implementation=implementation)
    result = compare(model, kwargs=models.inputs("Llama"), draws=1, grad=False)
    assert result.fused("norm_qkv_rope_attention") == 2, result.reasons
    assert not result.problems


def test_inductor_compiles_a_rewritten_model_forward_and_backward_for_changing_lengths() -> None:
    """The smallest whole model, through the real backend, with the two lengths that make Dynamo generalise."""
    import torch_fuse

    model = models.build("Llama", num_hidden_layers=1, intermediate_size=32)
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    compiled = torch.compile(model, backend="fuse", dynamic=True, options={"kernels": "reference", "on_error": "raise"})
    for length in (10, 14):
        inputs = models.inputs("Llama", length=length)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            logits = run(**inputs)[0]
            logits.square().sum().backward()
            results.append([logits.detach(), *[p.grad.clone() for p in model.parameters()]])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    report = torch_fuse.reports()
    assert len(report.graphs) <= 2  # torch itself compiles a second one for the second backward
    assert report.counts()["norm_qkv_rope_attention"] == {"fused": len(report.graphs)}


def test_layers_share_the_tables() -> None:
    """Given a view for each layer, Inductor computes the tables for each."""
    rewriter = Rewriter()
    rewritten(models.build("Llama", num_hidden_layers=4), rewriter)(**models.inputs("Llama"))
    calls = [node for graph in rewriter.graphs for node in graph.graph.nodes if node.target is qk_norm_rope.reference]
    assert len(calls) == 4
    assert len({call.args[4] for call in calls}) == len({call.args[5] for call in calls}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPTNeoX", "Phi", "StableLM", "GPT-J"])
def test_partial_embeddings_are_rotated_where_they_lie_in_inference(name: str, dtype: torch.dtype) -> None:
    model = models.build(name).to(dtype).requires_grad_(False)
    result = compare(model, kwargs=models.inputs(name), draws=1, grad=False)
    assert not result.problems
    sites = [site for site in result.report.sites if site.pattern == "norm_qkv_rope_attention"]
    assert {(site.status, site.op) for site in sites} == {("fused", "torch_fuse::partial_rope")}


def test_with_gradients_query_and_key_are_written_anew() -> None:
    result = compare(models.build("GPTNeoX"), kwargs=models.inputs("GPTNeoX"), draws=1)
    assert not result.problems
    sites = [site for site in result.report.sites if site.pattern == "norm_qkv_rope_attention"]
    assert {(site.status, site.op) for site in sites} == {("fused", "torch_fuse::qk_norm_rope")}
