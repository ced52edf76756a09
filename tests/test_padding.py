"""Padded batches and sliding windows of unmodified models: attention without the S x S mask, and the same results."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from harness import Rewriter, compare, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

PATTERN = "masked_attention"
WINDOW = {"sliding_window": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", models._GROUPED),
    "GPTNeoX": ("GPTNeoXForCausalLM", models._SIZES),
    "Mistral": ("MistralForCausalLM", {**models._GROUPED, **WINDOW}),
    "Qwen2": ("Qwen2ForCausalLM", {**models._GROUPED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "Gemma3": (
        "Gemma3ForCausalLM",
        {**models._GROUPED, **WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "BERT": ("BertModel", models._SIZES),
    "ModernBERT": (
        "ModernBertModel",
        {**models._SIZES, "local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
}
ENCODERS = ("BERT", "ModernBERT")


def build(name: str, **changes: Any) -> nn.Module:
    import transformers

    cls, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)
    return model(model.config_class(**{**sizes, **changes})).eval()


def padded(name: str, side: str, length: int = 10, pads: tuple[int, ...] = (3, 0)) -> dict[str, Any]:
    """Keyword arguments with `pads` padded tokens in each batch, on the left or on the right."""
    inputs = models.inputs("Llama", batch=len(pads), length=length)
    mask = torch.ones_like(inputs["input_ids"])
    for row, pad in enumerate(pads):
        mask[row, length - pad :] = 0
    mask = mask.flip(1) if side == "left" else mask
    if name in ENCODERS:
        inputs.pop("use_cache")
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_agree_forward_and_backward(name: str, side: str) -> None:
    result = compare(build(name), kwargs=padded(name, side), draws=1)
    assert result.fused(PATTERN) == 2, result.reasons
    assert not result.problems, result.reasons


@pytest.mark.parametrize("name", ["Mistral", "Gemma3", "ModernBERT"])
def test_windows_without_padding_agree(name: str) -> None:
    inputs = padded(name, "left")
    inputs.pop("attention_mask")
    result = compare(build(name), kwargs=inputs, draws=1)
    assert result.fused(PATTERN) >= 1, result.reasons
    assert not result.problems, result.reasons


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_rotation_is_still_fused_before_it(name: str) -> None:
    result = compare(build(name), kwargs=padded(name, "left"), draws=1, grad=False)
    assert (result.fused(PATTERN), result.fused("norm_qkv_rope_attention")) == (2, 2), result.reasons


def test_a_mask_with_sizes_of_its_own_is_cut_to_the_batch() -> None:
    """A second compilation gives the mask other symbols than the tokens; gathering relates them by no guard."""
    model, rewriter, inputs = build("BERT"), Rewriter(), padded("BERT", "left")
    compiled = rewritten(model, rewriter, dynamic=True)
    compiled(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=1e-5)
    assert len(rewriter.graphs) == 2
    assert rewriter.report.counts()[PATTERN] == {"fused": 4}, str(rewriter.report)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "BERT"])
def test_one_dynamic_graph_serves_every_length_and_padding(name: str) -> None:
    model, rewriter = build(name), Rewriter()
    compiled = rewritten(model, rewriter, dynamic=True)
    with torch.no_grad():
        for length, side, pads in (
            (10, "left", (3, 0)),
            (13, "right", (0, 7)),
            (9, "left", (0, 0)),
            (9, "right", (8, 2)),
        ):
            inputs = padded(name, side, length, pads)
            expected, found = model(**inputs)[0], compiled(**inputs)[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(rewriter.graphs) == 1
    assert rewriter.report.counts()[PATTERN] == {"fused": 2}, str(rewriter.report)


def test_queries_without_a_key_are_zero_in_both() -> None:
    """Left padding: the first rows keep no key; the model's results there agree too."""
    inputs = padded("Llama", "left", pads=(10, 4))
    result = compare(build("Llama"), kwargs=inputs, draws=1)
    assert result.fused(PATTERN) == 2 and not result.problems, result.reasons


def _calls(rewriter: Rewriter, name: str) -> int:
    (graph,) = rewriter.graphs
    return sum(name in str(node.target) for node in graph.graph.nodes)


def test_layers_share_what_is_computed_of_the_padding() -> None:
    from torch_fuse import Options

    def model(q: Tensor, m: Tensor) -> Tensor:
        for _ in range(3):
            keep = torch.arange(q.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
            q = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep & m.bool()[:, None, None])
        return q

    q, m = torch.randn(2, 9, 2, 8).transpose(1, 2), torch.ones(2, 9, dtype=torch.long)
    rewriter = Rewriter(Options(kernels="auto", on_error="raise"))
    pattern = _pattern()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pattern), "check", lambda *_: None)
        found = rewritten(model, rewriter)(q, m)
    torch.testing.assert_close(found, model(q, m))
    assert _calls(rewriter, "torch_fuse.masked_attention") == 3
    assert _calls(rewriter, "torch_fuse.key_range") == 1


def _pattern() -> Any:
    from torch_fuse.rewrite.registry import patterns

    return patterns()[PATTERN]


def _attends(change: Any) -> Any:
    def model(q: Tensor, m: Tensor) -> Tensor:
        keep = m.bool()[:, None, None]
        first = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)
        change(m)
        return nn.functional.scaled_dot_product_attention(first, q, q, attn_mask=keep)

    return model


def test_padding_that_is_written_to_between_two_layers_is_not_read_anew() -> None:
    q, m = torch.randn(2, 9, 2, 8).transpose(1, 2), torch.ones(2, 9, dtype=torch.long)
    m[0, 5:] = 0
    rewriter = Rewriter()
    model = _attends(lambda m: m.sub_(1))
    found, expected = rewritten(model, rewriter)(q, m.clone()), model(q, m.clone())
    torch.testing.assert_close(found, expected)
    assert rewriter.report.counts()[PATTERN] == {"fused": 1, "missed": 1}, str(rewriter.report)


@pytest.mark.parametrize("example", list(_pattern().near_misses()), ids=lambda e: e.name)
def test_what_is_no_band_of_kept_keys_is_left_alone(example: Any) -> None:
    result = compare(*example.make(torch.float32), draws=1)
    assert result.fused(PATTERN) == 0, result.reasons


def test_packed_positions_and_chunks_are_refused_with_a_reason() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    inputs = {**models.inputs("Llama", batch=1), "position_ids": positions}
    result = compare(build("Llama"), kwargs=inputs, draws=1, grad=False)
    assert result.fused(PATTERN) == 0 and not result.problems
    reasons = {site.reason for site in result.report.sites if site.status == "missed"}
    assert any("cumsum of something that is not constant" in reason for reason in reasons), reasons


ATOMS = {
    "causal": lambda m, n: _index(m) <= _index(m)[:, None] + n,
    "window": lambda m, n: _index(m) > _index(m)[:, None] - n,
    "near": lambda m, n: (_index(m) - _index(m)[:, None]).abs() < n,
    "keys": lambda m, n: (m != 0)[:, None, None],
    "tokens": lambda m, n: (m > n % 3)[:, None, None],
    "lengths": lambda m, n: (_index(m) < m.sum(1)[:, None])[:, None, None],
    "gathered": lambda m, n: m.bool()[torch.arange(2)[:, None, None, None], _index(m)],
    "first_batch": lambda m, n: m[0].bool(),
    "queries": lambda m, n: m.bool()[:, None, :, None],
    "heads": lambda m, n: m.bool()[None, :, None],
    "same": lambda m, n: m[:, None, :, None] == m[:, None, None],
    "first_keys": lambda m, n: _index(m) < n,
    "one_row": lambda m, n: torch.ones(1, m.shape[1], dtype=torch.bool).tril(n),
    "one_column": lambda m, n: torch.ones(m.shape[1], 1, dtype=torch.bool).triu(-n),
}


def _index(m: Tensor) -> Tensor:
    return torch.arange(m.shape[1])


def _mask(recipe: Any, m: Tensor) -> Tensor:
    how, a, b = recipe
    if not callable(how):
        return ATOMS[how](m, a)
    return how(_mask(a, m), *([] if b is None else [_mask(b, m)]))


LEAVES = st.tuples(st.sampled_from(sorted(ATOMS)), st.integers(-1, 6), st.none())
JOINS = st.sampled_from([torch.logical_and, torch.logical_and, torch.mul, torch.logical_or, torch.logical_xor])
RECIPES = st.recursive(
    LEAVES,
    lambda inner: st.tuples(JOINS, inner, inner) | st.tuples(st.just(torch.logical_not), inner, st.none()),
    max_leaves=4,
)


@settings(max_examples=80)
@given(RECIPES, st.sampled_from(["boolean", "boolean", "inf", "lowest"]), st.integers(0, 2**18 - 1), st.booleans())
def test_whatever_is_padded_or_windowed_nothing_changes(recipe: Any, form: str, bits: int, dynamic: bool) -> None:
    tokens = torch.tensor([bits >> i & 3 for i in range(18)]).view(2, 9)

    def model(q: Tensor, m: Tensor) -> Tensor:
        keep = _mask(recipe, m)
        keep = keep[None] if keep.dim() == 1 else keep
        if form != "boolean":
            low = float("-inf") if form == "inf" else torch.finfo(torch.float32).min
            keep = torch.zeros(keep.shape).masked_fill(~keep, low)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    q, rewriter = torch.randn(2, 9, 2, 4).transpose(1, 2), Rewriter()
    if dynamic:
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(tokens, 1)
    expected = _outcome(model, q, tokens)
    if expected is not None:  # shapes that do not broadcast
        torch.testing.assert_close(rewritten(model, rewriter)(q, tokens), expected)
        assert all(site.reason for site in rewriter.report.sites)


def _outcome(model: Any, *inputs: Tensor) -> Tensor | None:
    try:
        return model(*inputs)
    except RuntimeError:
        return None


@pytest.mark.parametrize("row", ["row", "column"])
def test_a_mask_of_one_row_or_column_is_not_causal(row: str) -> None:
    def model(q: Tensor) -> Tensor:
        shape = (1, 9) if row == "row" else (9, 1)
        keep = torch.ones(shape, dtype=torch.bool).tril(0 if row == "row" else -1)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    q, rewriter = torch.randn(2, 9, 2, 4).transpose(1, 2), Rewriter()
    torch.testing.assert_close(rewritten(model, rewriter)(q), model(q))
    assert not any(site.status == "fused" for site in rewriter.report.sites)
