"""Models of transformers with eager attention: each site is fused, or stays with a reason, and agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Comparison, compare
from torch import nn

PATTERN = "written_out_attention"
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 37, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
_IMAGES = {**_SIZES, "image_size": 8, "patch_size": 2}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2, "sliding_window": 4}
_GEMMA = {**_GROUPED, "attn_logit_softcapping": 1.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTNeoX": ("GPTNeoXModel", _SIZES),
    "Llama": ("LlamaModel", {**_SIZES, "num_key_value_heads": 2}),
    "GPT-J": ("GPTJModel", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": 97}),
    "BERT": ("BertModel", _SIZES),
    "BLOOM": ("BloomModel", {"hidden_size": 32, "n_head": 4, "n_layer": 1, "vocab_size": 97}),
    "MPT": ("MptModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 97, "max_seq_len": 64}),
    "T5": ("T5EncoderModel", {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "d_ff": 37, "vocab_size": 97}),
    "ViT": ("ViTModel", {key: _IMAGES[key] for key in _IMAGES if key not in ("vocab_size", "max_position_embeddings")}),
    "Gemma2": ("Gemma2Model", _GEMMA),
    "VaultGemma": ("VaultGemmaModel", _GEMMA),
    "GptOss": (
        "GptOssModel",
        {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"},
    ),
}
SOFTCAP_SINKS = {"Gemma2": 2, "VaultGemma": 2, "GptOss": 2}  # a layer in a window, and one over all keys


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model with eager attention, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, MODELS[name][0])
    config = cls.config_class(**MODELS[name][1], **({} if name == "MPT" else {"attn_implementation": "eager"}))
    return cls(config).eval().to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model's keyword arguments for two sequences."""
    generator = torch.Generator().manual_seed(1)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(dtype), "return_dict": False}
    cache = {} if name == "T5" else {"use_cache": False}
    return {"input_ids": torch.randint(1, 97, (2, 10), generator=generator), "return_dict": False, **cache}


def padded(name: str) -> dict[str, Any]:
    """The same with four absent tokens in front of the second sequence, whose queries have no key in causal models."""
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    return {**inputs(name), "attention_mask": mask}


def outcomes(result: Comparison) -> list[tuple[str, str]]:
    """Status and reason of each attention."""
    found = (PATTERN, "softcap_sinks_attention")
    return [(site.status, site.reason) for site in result.report.sites if site.pattern in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_agree(name: str, dtype: torch.dtype) -> None:
    result = compare(build(name, dtype), kwargs=inputs(name, dtype), draws=1)
    (outcome, *others) = outcomes(result)
    if name in SOFTCAP_SINKS:
        assert result.fused("softcap_sinks_attention") == SOFTCAP_SINKS[name] == 1 + len(others), result.reasons
        assert any("a causal window of 4" in reason for _, reason in (outcome, *others)), result.reasons
    elif (name, dtype) == ("MPT", torch.bfloat16):  # ALiBi stays float32
        assert outcome == ("missed", "the bias is torch.float32, which SDPA would round to torch.bfloat16")
    else:
        assert outcome[0] == "fused", outcome
    assert not result.problems, result.reasons


@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_padding_of_capped_scores_and_with_sinks_agrees(name: str) -> None:
    for grad in (False, True):
        result = compare(build(name), kwargs=padded(name), draws=1, grad=grad)
        for status, reason in outcomes(result):
            if name == "GptOss":  # whose sinks take the weight of queries without a key
                assert (status, "padding from" in reason) == ("fused", True), reason
            elif grad:
                assert (status, "may exclude every key" in reason) == ("missed", True), reason
            else:
                assert (status, "computed apart" in reason) == ("fused", True), reason
        assert len(outcomes(result)) == 2 and not result.problems, result.reasons


@pytest.mark.parametrize("name", ["GPTNeoX", "BERT", "BLOOM", "MPT", "T5"])
def test_padding_agrees_with_and_without_gradients(name: str) -> None:
    for grad in (False, True):
        result = compare(build(name), kwargs=padded(name), draws=1, grad=grad)
        ((status, reason),) = outcomes(result)
        if grad and name != "MPT":  # MPT replaces scores, the others add to them
            assert (status, "may exclude every key" in reason) == ("missed", True)
        else:
            assert (status, "computed apart" in reason) == ("fused", True)
        assert not result.problems, result.reasons
