"""The models whose decoding steps `decode.py` takes, with random weights of the real sizes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import PYTHIA, pythia

import torch_fuse

# Geometry of Llama-3-8B and Qwen3-4B, as their configurations give it.
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("Llama", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }),
    "qwen3-4b": ("Qwen3", {
        "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }),
}  # fmt: skip
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 128, "vocab_size": 503, "max_position_embeddings": 64}  # fmt: skip


class Start(NamedTuple):
    """A model in front of a step: `rewind` takes the cache back to its `prompt` tokens."""

    model: torch.nn.Module
    cache: Any
    token: torch.Tensor
    prompt: int
    size: int
    rewind: Callable[[], None]


class Step(NamedTuple):
    """A token of a model with `prompt` tokens in a cache for `size`."""

    model: str
    prompt: int
    size: int
    dtype: torch.dtype = torch.float16


STEPS = {
    "pythia-160m-512": Step("pythia-160m", 512, 1024),
    "pythia-2.8b-512": Step("pythia-2.8b", 512, 1024),
    "pythia-2.8b-1900": Step("pythia-2.8b", 1900, 2048),
    "llama-3-8b-512": Step("llama-3-8b", 512, 1024, torch.bfloat16),
    "qwen3-4b-512": Step("qwen3-4b", 512, 1024, torch.bfloat16),
}


def build(name: str, dtype: torch.dtype, device: str, dry: bool = False) -> torch.nn.Module:
    """A model by name; with `dry` a tiny one of its architecture."""
    if name in PYTHIA:
        return pythia("tiny" if dry else name, dtype, device)
    import transformers

    cls, sizes = GROUPED[name]
    if dry:
        sizes = {**sizes, **_SMALL, **({"head_dim": 16} if "head_dim" in sizes else {})}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 8 billion weights in fp32 first would be twice the memory
    try:
        with torch.device(device):
            model = getattr(transformers, f"{cls}ForCausalLM")(getattr(transformers, f"{cls}Config")(**sizes))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def start(name: str, dry: bool) -> Start:
    """The model of a step with its prompt in a static cache."""
    from transformers import StaticCache

    given = STEPS[name]
    prompt, size = (20, 32) if dry else (given.prompt, given.size)
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", given.dtype)
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    gc.collect()
    torch.cuda.empty_cache()
    model = build(given.model, dtype, device, dry)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    cache = StaticCache(config=model.config, max_cache_len=size)
    model(ids, past_key_values=cache)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    return Start(model, cache, ids[:, :1].clone(), prompt, size, rewind)


def ways(model: torch.nn.Module, dry: bool) -> dict[str, Callable[[], Callable[..., Any]]]:
    """What makes the step's functions, by name: a graph is compiled only when its turn has come.

    "ops" is fuse without `decode_stack`: a few launches a layer; with "early" they begin before the one in front ends.
    """
    options: dict[str, Any] = {"kernels": "reference"} if dry else {}

    def compiled(**more: Any) -> Callable[[], Callable[..., Any]]:
        return lambda: torch.compile(model, fullgraph=True, backend="fuse", options={**options, **more})

    return {
        "eager": lambda: model,
        "fuse": compiled(),
        "ops": compiled(disable=["decode_stack"]),
        "ops_early": compiled(disable=["decode_stack"], early_launch=True),
        "inductor": lambda: torch.compile(model, fullgraph=True),
    }


def streamed_bytes(model: torch.nn.Module, cache: Any, prompt: int) -> int:
    """What a token has to read: all weights but the embedding, of which it reads a row, and the live cache."""
    read = {id(p): p for p in model.parameters() if p is not model.get_input_embeddings().weight}
    head = model.get_output_embeddings().weight
    read[id(head)] = head  # also where it is the embedding
    live = sum(2 * layer.keys[:, :, :prompt].numel() * layer.keys.element_size() for layer in cache.layers)
    return sum(p.numel() * p.element_size() for p in read.values()) + live
