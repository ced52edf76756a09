"""Tiny, randomly initialised models of transformers and diffusers, unmodified; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 97, "n_positions": 64}
_FALCON = {name: size for name, size in _SIZES.items() if name not in ("intermediate_size", "max_position_embeddings")}

LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTNeoX": ("GPTNeoXForCausalLM", _SIZES),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "Phi": ("PhiForCausalLM", _SIZES),
    "GPT-J": ("GPTJForCausalLM", _GPTJ),
    "Falcon": ("FalconForCausalLM", _FALCON),
    "OLMo2": ("Olmo2ForCausalLM", _GROUPED),
    "Cohere": ("CohereForCausalLM", _GROUPED),
    "StableLM": ("StableLmForCausalLM", _GROUPED),
}
MODELS = [*LANGUAGE_MODELS, "Wan"]


def build(name: str, **changes: Any) -> nn.Module:
    """A model by name, in evaluation mode, always with the same parameters."""
    torch.manual_seed(0)
    if name == "Wan":
        from diffusers import WanTransformer3DModel

        sizes = {
            "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 32,
        }  # fmt: skip
        return WanTransformer3DModel(**{**sizes, **changes}).eval()
    import transformers

    cls, sizes = LANGUAGE_MODELS[name]
    model = getattr(transformers, cls)
    return model(model.config_class(**{**sizes, **changes})).eval()


def inputs(name: str, batch: int = 2, length: int = 10, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A model's keyword arguments for `batch` sequences of about `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    if name == "Wan":  # patches of 1 x 2 x 2
        frames = max(length // 4, 1)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 4, 4, generator=generator).to(dtype).requires_grad_(),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator).to(dtype),
            "return_dict": False,
        }
    ids = torch.randint(0, 97, (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False, "return_dict": False}
