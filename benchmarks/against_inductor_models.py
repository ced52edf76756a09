"""Real widths, heads and head dims of models of every kind, with two layers or so and a small vocabulary.

Random weights. Language models take a prompt of 2048 tokens, encoders a batch of 16, diffusion models 1 to 5 thousand
tokens. `tiny` models are for a CPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from coverage_diffusers import SIZES
from coverage_lm import VOCABULARY, tiny_config
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model and how to call it.

    Attributes:
        cls: its class in transformers or diffusers, with the module where the library does not export it.
        config: what its configuration (diffusers: its constructor) is given, for the real widths.
        inputs: keyword arguments, from the configuration and whether it is tiny; floats are cast to the model's dtype.
        tiny: changes to the configuration that `coverage_lm.tiny_config` (diffusers: SIZES) makes.
    """

    cls: str
    config: dict[str, Any]
    inputs: Callable[[Any, bool], Inputs]
    tiny: dict[str, Any]

    @property
    def library(self) -> str:
        """ "diffusers" or "transformers"."""
        return "diffusers" if self.cls.endswith(("Transformer2DModel", "Transformer3DModel")) else "transformers"

    def build(self, dtype: torch.dtype, tiny: bool) -> tuple[nn.Module, Inputs]:
        """The model in evaluation mode and its inputs, on the default device.

        As `from_pretrained(dtype=...)` does it: what a model has in float32 on purpose, such as frequencies, stays.
        """
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = self._model(tiny).eval()
        finally:
            torch.set_default_dtype(before)
        return model, {name: _cast(value, dtype) for name, value in self.inputs(model.config, tiny).items()}

    def _model(self, tiny: bool) -> nn.Module:
        module, _, name = f"{self.library}.{self.cls}".rpartition(".")
        model_class = getattr(importlib.import_module(module), name)
        if self.library == "transformers":
            config_class = model_class.config_class
            return model_class(tiny_config(config_class, self.tiny) if tiny else config_class(**self.config))
        names = inspect.signature(model_class.__init__).parameters
        sizes = {name: size for name, size in SIZES.items() if name in names}
        return model_class(**(sizes | self.tiny if tiny else self.config))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# -- inputs --------------------------------------------------------------------------------------------------------


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _prompt(config: Any, tiny: bool) -> Inputs:
    return {"input_ids": _ids(1, 32 if tiny else 2048), "use_cache": False}


def _batch(config: Any, tiny: bool) -> Inputs:
    return {"input_ids": _ids(2, 32) if tiny else _ids(16, 512)}


def _padded(config: Any, tiny: bool) -> Inputs:
    given = _batch(config, tiny)
    batch, length = given["input_ids"].shape
    lengths = torch.linspace(length // 4, length, batch).long()
    return given | {"attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def _image(config: Any, tiny: bool) -> Inputs:
    return {"pixel_values": torch.randn(2 if tiny else 16, 3, config.image_size, config.image_size)}


def _speech(config: Any, tiny: bool) -> Inputs:
    return {"input_features": torch.randn(2 if tiny else 16, config.num_mel_bins, 2 * config.max_source_positions)}


def _text(width: int, length: int, tiny: bool, batch: int = 1) -> Tensor:
    return torch.randn(batch, 7, 32) if tiny else torch.randn(batch, length, width)


def _time(batch: int = 1) -> Tensor:
    return torch.full((batch,), 500.0)


def _latent(channels: int, size: int, tiny: bool) -> Tensor:
    return torch.randn(1, 4, 8, 8) if tiny else torch.randn(1, channels, size, size)


def _wan(config: Any, tiny: bool) -> Inputs:
    video = torch.randn(1, 4, 2, 4, 4) if tiny else torch.randn(1, 16, 3, 60, 104)
    return {"hidden_states": video, "timestep": _time(), "encoder_hidden_states": _text(4096, 512, tiny)}


def _flux(config: Any, tiny: bool) -> Inputs:
    side, text = (4, 7) if tiny else (64, 512)
    rows = torch.arange(side * side)
    ids = torch.stack([torch.zeros_like(rows), rows // side, rows % side], -1).float()
    return {
        "hidden_states": torch.randn(1, side * side, 4 if tiny else 64), "timestep": _time() / 1000,
        "encoder_hidden_states": _text(4096, text, tiny), "pooled_projections": torch.randn(1, 32 if tiny else 768),
        "img_ids": ids, "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


def _sd3(config: Any, tiny: bool) -> Inputs:
    return {
        "hidden_states": _latent(16, 128, tiny), "encoder_hidden_states": _text(4096, 333, tiny), "timestep": _time(),
        "pooled_projections": torch.randn(1, 32 if tiny else 2048),
    }  # fmt: skip


def _pixart(config: Any, tiny: bool) -> Inputs:
    text = _text(4096, 120, tiny)
    mask = torch.ones(text.shape[:2])
    mask[:, text.shape[1] // 2 :] = 0
    return {
        "hidden_states": _latent(4, 128, tiny), "encoder_hidden_states": text, "timestep": _time().long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": mask,
    }  # fmt: skip


def _dit(config: Any, tiny: bool) -> Inputs:
    batch, size = (2, 8) if tiny else (4, 64)
    return {"hidden_states": torch.randn(batch, 4, size, size), "timestep": _time(batch).long(),
            "class_labels": torch.arange(batch)}  # fmt: skip


def _ltx(config: Any, tiny: bool) -> Inputs:
    frames, height, width = (2, 2, 2) if tiny else (8, 16, 24)
    text = _text(4096, 128, tiny)
    return {
        "hidden_states": torch.randn(1, frames * height * width, 4 if tiny else 128), "encoder_hidden_states": text,
        "timestep": _time(), "encoder_attention_mask": torch.ones(text.shape[:2]), "num_frames": frames,
        "height": height, "width": width,
    }  # fmt: skip


# -- models --------------------------------------------------------------------------------------------------------


def _lm(cls: str, config: dict[str, Any], layers: int = 2, tiny: dict[str, Any] | None = None) -> Entry:
    """A causal language model with two layers; configurations name their sizes as they like."""
    gpt = "n_embd" in config
    common = {"vocab_size": 1024, "n_layer" if gpt else "num_hidden_layers": layers}
    return Entry(cls, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | common | config, _prompt, tiny or {})


def _sizes(hidden: int, heads: int, intermediate: int, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    found = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate}
    return found | ({} if kv_heads is None else {"num_key_value_heads": kv_heads}) | more


_BERT = {"vocab_size": 1024, "num_hidden_layers": 3}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_VISION = {"image_size": 32, "patch_size": 8}
_DIFFUSION_LAYERS = {"num_layers": 2}

MODELS: dict[str, Entry] = {
    # Decoders; 1 x 2048 tokens.
    "llama-3-8b": _lm("LlamaForCausalLM", _sizes(4096, 32, 14336, 8)),
    "gpt2-xl": _lm("GPT2LMHeadModel", {"n_embd": 1600, "n_head": 25, "n_positions": 2048}, 3),
    "gemma2-9b": _lm("Gemma2ForCausalLM", _sizes(3584, 16, 14336, 8, head_dim=256, sliding_window=1024, **_BOTH)),
    "qwen3-8b": _lm("Qwen3ForCausalLM", _sizes(4096, 32, 12288, 8, head_dim=128)),
    "phi-2": _lm("PhiForCausalLM", _sizes(2560, 32, 10240, partial_rotary_factor=0.4)),
    "opt-2.7b": _lm(
        "OPTForCausalLM", {"hidden_size": 2560, "num_attention_heads": 32, "ffn_dim": 10240,
                           "word_embed_proj_dim": 2560, "max_position_embeddings": 2048},
    ),
    "gpt-j-6b": _lm("GPTJForCausalLM", {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}),
    "gpt-neo-2.7b": _lm(
        "GPTNeoForCausalLM", {"hidden_size": 2560, "num_heads": 20, "num_layers": 2, "window_size": 256,
                              "attention_types": [[["global", "local"], 1]]},
        tiny={"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_hidden_layers": 2},
    ),
    "gemma3-4b": _lm("Gemma3ForCausalLM", _sizes(2560, 8, 10240, 4, head_dim=256, sliding_window=1024, **_BOTH)),
    "phi3-mini": _lm("Phi3ForCausalLM", _sizes(3072, 32, 8192, 32, sliding_window=2047)),
    "falcon-7b": _lm(
        "FalconForCausalLM", {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True,
                              "parallel_attn": True, "bias": False, "new_decoder_architecture": False},
        tiny={"num_kv_heads": 1},
    ),
    "olmo2-7b": _lm("Olmo2ForCausalLM", _sizes(4096, 32, 11008, 32)),
    "cohere-aya-8b": _lm("CohereForCausalLM", _sizes(4096, 32, 14336, 8)),
    "stablelm-2-1.6b": _lm("StableLmForCausalLM", _sizes(2048, 32, 5632, 32, partial_rotary_factor=0.25), 3),
    "mistral-7b-window": _lm("MistralForCausalLM", _sizes(4096, 32, 14336, 8, sliding_window=1024)),
    "bloom-7b": _lm("BloomForCausalLM", {"hidden_size": 4096, "n_head": 32, "n_layer": 2}),
    # Encoders; batch 16.
    "bert-large-padded": Entry("BertModel", _BERT | _sizes(1024, 16, 4096), _padded, {}),
    "roberta-base": Entry(
        "RobertaModel", _BERT | _sizes(768, 12, 3072, max_position_embeddings=514, pad_token_id=1), _batch, {}
    ),
    "vit-large": Entry("ViTModel", _sizes(1024, 16, 4096, num_hidden_layers=3, image_size=224), _image, _VISION),
    "clip-vision-large": Entry(
        "CLIPVisionModel", _sizes(1024, 16, 4096, num_hidden_layers=3, image_size=224, patch_size=14), _image, _VISION
    ),
    "whisper-large-encoder": Entry(
        "models.whisper.modeling_whisper.WhisperEncoder",
        {"d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
         "encoder_layers": 2, "vocab_size": 1024, "pad_token_id": 0},
        _speech, {"max_source_positions": 20, "num_mel_bins": 16},
    ),
    "t5-large-encoder": Entry(
        "T5EncoderModel", {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 4096, "num_layers": 3,
                           "vocab_size": 1024}, _batch, {},
    ),
    # Diffusion transformers.
    "wan-1.3b": Entry(
        "WanTransformer3DModel", {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
        | _DIFFUSION_LAYERS, _wan, {},
    ),
    "flux": Entry("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": False}, _flux,
                  {"guidance_embeds": False}),
    "sd3-medium": Entry(
        "SD3Transformer2DModel", {"sample_size": 128, "in_channels": 16, "out_channels": 16, "num_attention_heads": 24,
                                  "attention_head_dim": 64, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
        | _DIFFUSION_LAYERS, _sd3, {},
    ),
    "pixart": Entry(
        "PixArtTransformer2DModel",
        {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096} | _DIFFUSION_LAYERS, _pixart,
        {"num_embeds_ada_norm": 1000, "norm_num_groups": 4, "out_channels": 8, "cross_attention_dim": 48},
    ),
    "dit-xl": Entry(
        "DiTTransformer2DModel", {"sample_size": 64} | _DIFFUSION_LAYERS, _dit,
        {"attention_head_dim": 16, "norm_num_groups": 4, "num_embeds_ada_norm": 10, "sample_size": 8},
    ),
    "ltx": Entry("LTXVideoTransformer3DModel", _DIFFUSION_LAYERS, _ltx, {"cross_attention_dim": 48}),
}  # fmt: skip
