"""Tiny encoders, vision and speech models, and attention as timm writes it, for benchmarks/coverage.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

B = 2


def _ids(length: int) -> Tensor:
    return torch.randint(3, 128, (B, length), generator=torch.Generator().manual_seed(1))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _text(length: int) -> dict[str, Any]:
    return {"input_ids": _ids(length)}


def _image(length: int) -> dict[str, Any]:
    return {"pixel_values": _random(B, 3, 32, 32)}


def _pair(length: int) -> dict[str, Any]:
    return {"input_ids": _ids(length), "decoder_input_ids": _ids(length), "use_cache": False}


_VISION = {"image_size": 32, "patch_size": 8}

# Class in transformers, configuration beside the common sizes, inputs for a length.
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "BERT": ("BertModel", {}, _text),
    "RoBERTa": ("RobertaModel", {}, _text),
    "DistilBERT": ("DistilBertModel", {}, _text),
    "ELECTRA": ("ElectraModel", {}, _text),
    "MPNet": ("MPNetModel", {}, _text),
    "DeBERTa": ("DebertaModel", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _text),
    "DeBERTa-v2": ("DebertaV2Model", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _text),
    "ModernBERT": ("ModernBertModel", {}, _text),
    "NomicBERT": ("NomicBertModel", {}, _text),
    "ViT": ("ViTModel", _VISION, _image),
    "DINOv2": ("Dinov2Model", _VISION, _image),
    "DINOv3": ("DINOv3ViTModel", _VISION, _image),
    "SigLIP": ("SiglipVisionModel", _VISION, _image),
    "CLIP vision": ("CLIPVisionModel", _VISION, _image),
    "CLIP text": ("CLIPTextModel", {}, _text),
    "Whisper": (
        "WhisperModel", {"max_source_positions": 20, "num_mel_bins": 16},
        lambda n: {"input_features": _random(B, 16, 40), "decoder_input_ids": _ids(n), "use_cache": False},
    ),
    "T5": ("T5Model", {}, _pair),
    "BART": ("BartModel", {}, _pair),
    "Wav2Vec2": (
        "Wav2Vec2Model", {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3],
                          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
                          "num_conv_pos_embedding_groups": 4},
        lambda n: {"input_values": _random(B, 50 * n)},
    ),
}  # fmt: skip


class TimmAttention(nn.Module):
    """Attention as timm's vision transformers write it where SDPA is off."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(64, 192), nn.Linear(64, 64), fused

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * (c // 4) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every model by name, with the function that builds its case."""
    for name in MODELS:
        yield name, partial(_case, name)
    for fused in (True, False):
        yield f"timm attention, {'SDPA' if fused else 'written out'}", partial(_timm, fused)


def _timm(fused: bool) -> Any:
    from coverage_measure import Case

    torch.manual_seed(0)
    return Case(TimmAttention(fused).eval(), lambda n: {"x": _random(B, n, 64)}, "sdpa" if fused else "eager")


def _case(name: str) -> Any:
    import transformers
    from coverage_lm import enlarge, tiny_config
    from coverage_measure import Case

    cls, changes, inputs = MODELS[name]
    model_class = getattr(transformers, cls)
    config = tiny_config(model_class.config_class, changes)
    torch.manual_seed(0)
    model = model_class(config).eval()
    enlarge(model)
    return Case(model, inputs, getattr(config, "_attn_implementation", "") or "", "input_ids" in inputs(4))
