"""Example inputs for a model, from its config and the signature of its `forward`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import typer
from torch.utils._pytree import tree_map_only

_TEXT_TOKENS = 16
_TEXT_WIDTHS = (
    "text_dim", "joint_attention_dim", "cap_feat_dim", "caption_channels", "cross_attention_dim",
    "text_embed_dim",
)  # fmt: skip


def example_inputs(model: torch.nn.Module, batch: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments for one forward pass, on the model's device and in its dtype.

    Args:
        model: a transformers or diffusers model.
        batch: sequences, images or videos.
        tokens: length of a text, or the number of latent tokens.

    Raises:
        typer.BadParameter: when the model takes something this does not know how to make.
    """
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    # diffusers keeps a model's config as a mapping, transformers as an object
    maker = _diffusion if isinstance(getattr(model, "config", None), Mapping) else _transformer
    inputs = maker(model, batch, tokens)
    names = inspect.signature(model.forward).parameters
    missing = [
        name
        for name, p in names.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in inputs
    ]
    if missing or not inputs:
        raise typer.BadParameter(
            f"{type(model).__name__} takes {', '.join(missing) or 'inputs'} that this command cannot make; "
            "allowed: models of text, of images, and diffusion transformers. "
            "For others call torch_fuse.explain(model, *args) in Python",
            param_hint="MODEL",
        )
    return tree_map_only(torch.Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), inputs)


def _transformer(model: torch.nn.Module, batch: int, tokens: int) -> dict[str, Any]:
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    inputs: dict[str, Any] = {}
    if "input_ids" in names:
        limit = getattr(text, "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit < tokens:
            raise typer.BadParameter(
                f"{tokens}; allowed: 1 to {limit}, the model's longest context", param_hint="--tokens"
            )
        inputs["input_ids"] = torch.randint(3, text.vocab_size, (batch, tokens))
    elif "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", tokens)
        inputs["input_features"] = torch.randn(batch, config.num_mel_bins, frames)
    # models that generate take a text alone, two-tower models need both
    if "pixel_values" in names and not ("input_ids" in names and _generates(model)):
        vision = getattr(config, "vision_config", config)
        side = vision.image_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        inputs["pixel_values"] = torch.randn(batch, getattr(vision, "num_channels", 3), height, width)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(3, text.vocab_size, (batch, tokens))
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs if len(inputs) > ("use_cache" in inputs) else {}


def _generates(model: Any) -> bool:
    return hasattr(model, "can_generate") and model.can_generate()


def _grid(tokens: int) -> tuple[int, int]:
    rows = max(1, math.isqrt(tokens))
    return rows, max(1, tokens // rows)


def _diffusion(model: torch.nn.Module, batch: int, tokens: int) -> dict[str, Any]:
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    rows, columns = _grid(tokens)
    channels, patch = config["in_channels"], config.get("patch_size", 1)
    inputs: dict[str, Any] = {"timestep": torch.full((batch,), 500)}
    if "img_ids" in names:
        inputs["hidden_states"] = torch.randn(batch, rows * columns, channels)
        inputs["img_ids"] = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
        inputs["txt_ids"] = torch.zeros(_TEXT_TOKENS, 3)
    elif isinstance(patch, (tuple, list)) and len(patch) == 3:
        inputs["hidden_states"] = torch.randn(batch, channels, patch[0], rows * patch[1], columns * patch[2])
    elif isinstance(config.get("patch_size_t"), int) and isinstance(patch, int) and "num_frames" not in names:
        inputs["hidden_states"] = torch.randn(batch, channels, config["patch_size_t"], rows * patch, columns * patch)
    elif "sample" in names:
        inputs["sample"] = torch.randn(batch, channels, 32, 32)
    elif isinstance(patch, int) and "img_shapes" not in names and "num_frames" not in names:
        inputs["hidden_states"] = torch.randn(batch, channels, rows * patch, columns * patch)
    if "encoder_hidden_states" in names:
        width = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), None)
        if width is not None:
            inputs["encoder_hidden_states"] = torch.randn(batch, _TEXT_TOKENS, width)
    mask = names.get("encoder_attention_mask")
    if mask is not None and mask.default is mask.empty:
        inputs["encoder_attention_mask"] = torch.ones(batch, _TEXT_TOKENS, dtype=torch.bool)
    if "class_labels" in names and "encoder_hidden_states" not in names:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    if "pooled_projections" in names and config.get("pooled_projection_dim"):
        inputs["pooled_projections"] = torch.randn(batch, config["pooled_projection_dim"])
    if "guidance" in names and config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((batch,), 3.5)
    if "added_cond_kwargs" in names:
        inputs["added_cond_kwargs"] = {"resolution": torch.ones(batch, 2), "aspect_ratio": torch.ones(batch, 1)}
    inputs["return_dict"] = False
    return inputs if {"hidden_states", "sample"} & inputs.keys() else {}
