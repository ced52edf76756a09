"""Tiny transformers of diffusers, with inputs, for benchmarks/coverage.py."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

B, TEXT = 2, 7


def _sized(size: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), size)


# Sizes by the names that constructors give them; only those that a constructor has are set.
SIZES: dict[str, Any] = {
    **_sized(2, """
        num_attention_heads num_heads n_heads num_cross_attention_heads"""),
    **_sized(24, """
        attention_head_dim head_dim cross_attention_head_dim linear_head_dim"""),
    **_sized(2, """
        num_key_value_heads num_kv_heads n_kv_heads num_key_value_attention_heads"""),
    **_sized(2, """
        num_layers n_layers depth num_mmdit_layers num_hidden_layers num_visual_blocks mmdit_layers"""),
    **_sized(1, """
        num_single_layers num_refiner_layers n_refiner_layers num_single_dit_layers num_text_blocks
        approximator_layers"""),
    **_sized(48, """
        hidden_size dim model_dim embed_dim dit_dim cross_attention_dim inner_dim"""),
    **_sized(64, """
        ffn_dim intermediate_size ff_dim ffn_hidden_size ff_inner_dim approximator_hidden_dim"""),
    **_sized(32, """
        text_dim text_embed_dim joint_attention_dim caption_channels cap_feat_dim context_in_dim
        pooled_projection_dim in_text_dim in_text_dim2 text_hidden_dim text_embed_2_dim text_in_dim
        image_embed_dim condition_dim llm_features_dim text_encoder_dim image_proj_dim dit_text_dim
        cross_attention_dim_t5 text_emb_dim crossattn_proj_in_channels"""),
    **_sized(32, """
        freq_dim time_embed_dim time_dim time_proj_dim timestep_embed_dim adaln_dim"""),
    **_sized(4, """
        in_channels out_channels in_visual_dim out_visual_dim latent_dim"""),
    **_sized((8, 8, 8), """
        axes_dims_rope axes_dims axes_dim_rope rope_axes_dim rope_dim rope_dim_list"""),
    "caption_projection_dim": 48, "sample_size": 8, "axes_lens": (64, 64, 64), "multiple_of": 16, "num_experts": 4,
    "moe_intermediate_dim": 32, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": TEXT,
    "pos_embed_max_size": 16, "adaln_lora_dim": 16, "mlp_ratio": 2.0, "text_len": TEXT, "text_len_t5": TEXT,
}  # fmt: skip


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text(n: int = 0, width: int = 32) -> torch.Tensor:
    return _random(B, TEXT, width)


def _time() -> torch.Tensor:
    return torch.tensor([500.0, 300.0])


def _ids(n: int, axes: int = 3) -> torch.Tensor:
    ids = torch.zeros(n, axes)
    ids[:, -1], ids[:, -2] = torch.arange(n) % 3, torch.arange(n) // 3
    return ids


def _mask() -> torch.Tensor:
    return torch.ones(B, TEXT, dtype=torch.bool)


def _packed(n: int, channels: int = 4, axes: int = 3, **more: Any) -> dict[str, Any]:
    """Flux and its kin: image tokens, text tokens and where they are."""
    return {
        "hidden_states": _random(B, n, channels), "encoder_hidden_states": _text(), "timestep": _time() / 1000,
        "img_ids": _ids(n, axes), "txt_ids": torch.zeros(TEXT, axes), **more,
    }  # fmt: skip


def _image(n: int, channels: int = 4, **more: Any) -> dict[str, Any]:
    """A latent image [B, C, 4, 2 n / 3] and text."""
    return {
        "hidden_states": _random(B, channels, 4, 2 * (n // 3)), "encoder_hidden_states": _text(),
        "timestep": _time(), **more,
    }  # fmt: skip


def _video(n: int, channels: int = 4, **more: Any) -> dict[str, Any]:
    """A latent video [B, C, n / 3, 4, 4] and text."""
    return {
        "hidden_states": _random(B, channels, n // 3, 4, 4), "encoder_hidden_states": _text(), "timestep": _time(),
        **more,
    }  # fmt: skip


def _pooled(width: int = 32) -> torch.Tensor:
    return _random(B, width)


def _sizes2() -> dict[str, Any]:
    return {name: torch.full((B, 2), 32.0) for name in ("original_size", "target_size", "crop_coords")}


def _rotary(length: int, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(length).float(), 0.5 ** torch.arange(width // 2)).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


# Constructor arguments beside SIZES, and inputs for a length.
MODELS: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "AuraFlowTransformer2DModel": ({"out_channels": 4}, partial(_image)),
    "CogVideoXTransformer3DModel": (
        {"use_rotary_positional_embeddings": True},
        lambda n: _video(n) | {"hidden_states": _random(B, n // 3, 4, 4, 4), "image_rotary_emb": _rotary(4 * (n // 3))},
    ),
    "DiTTransformer2DModel": (
        {"attention_head_dim": 16, "norm_num_groups": 4, "num_embeds_ada_norm": 10, "sample_size": 8},
        lambda n: {"hidden_states": _random(B, 4, 8, 8), "timestep": _time().long(),
                   "class_labels": torch.tensor([1, 2])},
    ),
    "LuminaNextDiT2DModel": (
        {"in_channels": 4},
        lambda n: {
            "hidden_states": _random(B, 4, 4, 8), "timestep": _time() / 1000, "encoder_hidden_states": _text(width=48),
            "encoder_mask": _mask(), "image_rotary_emb": torch.polar(torch.ones(384, 384, 12), _random(384, 384, 12)),
            "cross_attention_kwargs": {},
        },
    ),
    "PixArtTransformer2DModel": (
        {"num_embeds_ada_norm": 1000, "norm_num_groups": 4, "out_channels": 8, "cross_attention_dim": 48},
        lambda n: _image(n) | {
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "timestep": _time().long(),
        },
    ),
    "SanaTransformer2DModel": ({"cross_attention_dim": 48}, _image),
    "Transformer2DModel": (
        {"in_channels": 8, "norm_num_groups": 4, "cross_attention_dim": 32},
        lambda n: {"hidden_states": _random(B, 8, 4, n // 3), "encoder_hidden_states": _text()},
    ),
    "AllegroTransformer3DModel": ({"cross_attention_dim": 48}, lambda n: _video(n) | {
        "attention_mask": torch.ones(B, n // 3, 4, 4), "encoder_hidden_states": _random(B, 1, TEXT, 32),
        "encoder_attention_mask": torch.ones(B, TEXT), "timestep": _time().long(),
        "image_rotary_emb": None}),
    "AnyFlowTransformer3DModel": ({}, lambda n: _video(n, r_timestep=_time())),
    "BriaTransformer2DModel": ({}, lambda n: _packed(n, pooled_projections=None)),
    "ChromaTransformer2DModel": (
        {"approximator_num_channels": 16},
        lambda n: _packed(n, attention_mask=torch.ones(B, TEXT + n, dtype=torch.bool)),
    ),
    "ChronoEditTransformer3DModel": ({}, _video),
    "CogView3PlusTransformer2DModel": ({"condition_dim": 16}, lambda n: _image(n) | _sizes2()),
    "CogView4Transformer2DModel": ({"condition_dim": 16, "rope_axes_dim": (16, 16)}, lambda n: _image(n) | _sizes2()),
    "CosmosTransformer3DModel": (
        {"max_size": (16, 16, 16), "concat_padding_mask": False, "use_crossattn_projection": False},
        _video,
    ),
    "EasyAnimateTransformer3DModel": ({"attention_head_dim": 16}, _video),
    "ErnieImageTransformer2DModel": (
        {"rope_axes_dim": (8, 8, 8)},
        lambda n: {"hidden_states": _random(B, 4, 4, 2 * (n // 3)), "timestep": _time(), "text_bth": _text(),
                   "text_lens": torch.tensor([TEXT, TEXT])},
    ),
    "FluxTransformer2DModel": ({"guidance_embeds": False}, lambda n: _packed(n, pooled_projections=_pooled())),
    "Flux2Transformer2DModel": (
        {"axes_dims_rope": (6, 6, 6, 6), "timestep_guidance_channels": 32},
        lambda n: _packed(n, axes=4, guidance=_time() / 1000),
    ),
    "HeliosTransformer3DModel": ({}, _video),
    "HunyuanVideoTransformer3DModel": (
        {"rope_axes_dim": (8, 8, 8)},
        lambda n: _video(n, pooled_projections=_pooled(), encoder_attention_mask=_mask(), guidance=_time()),
    ),
    "HunyuanImageTransformer2DModel": (
        {"rope_axes_dim": (12, 12)},
        lambda n: _image(n, encoder_attention_mask=_mask()),
    ),
    "Kandinsky5Transformer3DModel": (
        {"axes_dims": (8, 8, 8)},
        lambda n: {
            "hidden_states": _random(1, n // 3, 4, 4, 4), "encoder_hidden_states": _random(1, TEXT, 32),
            "timestep": torch.tensor([500.0]), "pooled_projections": _random(1, 32),
            "visual_rope_pos": [torch.arange(n // 3), torch.arange(2), torch.arange(2)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "LongCatImageTransformer2DModel": ({}, _packed),
    "LTXVideoTransformer3DModel": (
        {"cross_attention_dim": 48},
        lambda n: {
            "hidden_states": _random(B, n, 4), "encoder_hidden_states": _text(), "timestep": _time(),
            "encoder_attention_mask": torch.ones(B, TEXT), "num_frames": n // 3, "height": 1, "width": 3,
        },
    ),
    "Lumina2Transformer2DModel": ({}, lambda n: _image(n, encoder_attention_mask=_mask(), timestep=_time() / 1000)),
    "MochiTransformer3DModel": (
        {"attention_head_dim": 24},
        lambda n: _video(n, encoder_attention_mask=_mask()),
    ),
    "OmniGenTransformer2DModel": (
        {"num_attention_heads": 2, "hidden_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "vocab_size": 64,
         "time_step_dim": 32, "rope_scaling": {"short_factor": [1.0] * 12, "long_factor": [1.0] * 12}},
        lambda n: {
            "hidden_states": _random(B, 4, 4, 2 * (n // 3)), "timestep": _time(),
            "input_ids": torch.ones(B, TEXT, dtype=torch.long), "input_img_latents": [], "input_image_sizes": {},
            "attention_mask": torch.ones(B, TEXT + 1 + 2 * (n // 3), TEXT + 1 + 2 * (n // 3), dtype=torch.long),
            "position_ids": torch.arange(TEXT + 1 + 2 * (n // 3)).expand(B, -1),
        },
    ),
    "OvisImageTransformer2DModel": ({}, _packed),
    "PRXTransformer2DModel": (
        {"axes_dim": (12, 12), "bottleneck_size": 16},
        lambda n: _image(n, attention_mask=_mask()),
    ),
    "PriorTransformer": (
        {"embedding_dim": 32, "num_embeddings": TEXT, "additional_embeddings": 4},
        lambda n: {"hidden_states": _pooled(), "timestep": _time(), "proj_embedding": _pooled(),
                   "encoder_hidden_states": _text(), "attention_mask": _mask()},
    ),
    "QwenImageTransformer2DModel": (
        {"out_channels": 1},
        lambda n: {
            "hidden_states": _random(B, n, 4), "encoder_hidden_states": _text(), "timestep": _time() / 1000,
            "encoder_hidden_states_mask": _mask(), "img_shapes": [[(1, 3, n // 3)]] * B,
        },
    ),
    "SanaVideoTransformer3DModel": ({"cross_attention_dim": 48}, _video),
    "SD3Transformer2DModel": ({}, lambda n: _image(n, pooled_projections=_pooled())),
    "SkyReelsV2Transformer3DModel": ({}, _video),
    "StableAudioDiTModel": (
        {"in_channels": 4, "out_channels": 4, "global_states_input_dim": 32, "cross_attention_input_dim": 32},
        lambda n: {
            "hidden_states": _random(B, 4, n), "timestep": _time(), "encoder_hidden_states": _text(),
            "global_hidden_states": _random(B, 1, 32), "rotary_embedding": _rotary(n + 1, 12),
        },
    ),
    "WanTransformer3DModel": ({}, _video),
    "WanVACETransformer3DModel": (
        {"vace_layers": [0], "vace_in_channels": 6},
        lambda n: _video(n, control_hidden_states=_random(B, 6, n // 3, 4, 4)),
    ),
    "ZImageTransformer2DModel": (
        {"n_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [64, 64, 64]},
        lambda n: {
            "x": [_random(4, 1, 4, 2 * (n // 3))] * B, "t": _time() / 1000, "cap_feats": [_random(TEXT, 32)] * B,
        },
    ),
}  # fmt: skip


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every transformer of diffusers by class name, with the function that builds its case."""
    import diffusers.models.transformers as package

    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, found in vars(module).items():
            if inspect.isclass(found) and found.__module__ == module.__name__ and hasattr(found, "load_config"):
                yield name, partial(_case, found)


def _case(model_class: type) -> Any:
    from coverage_lm import enlarge
    from coverage_measure import Case

    if model_class.__name__ not in MODELS:
        raise NotImplementedError("no inputs are written down for it")
    changes, inputs = MODELS[model_class.__name__]
    names = inspect.signature(model_class.__init__).parameters
    torch.manual_seed(0)
    model = model_class(**{name: size for name, size in SIZES.items() if name in names} | changes).eval()
    count = sum(p.numel() for p in model.parameters())
    if count > 20_000_000:
        raise ValueError(f"the model has {count / 1e6:.0f} million parameters; allowed: 20")
    enlarge(model)

    def given(length: int) -> dict[str, Any]:
        takes = inspect.signature(model.forward).parameters
        return inputs(length) | ({"return_dict": False} if "return_dict" in takes else {})

    return Case(model, given, "sdpa")
