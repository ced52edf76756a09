"""Tiny causal language models of every architecture in transformers, for benchmarks/coverage.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 4, 2, 16, 128


def _sized(size: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), size)


# Sizes by the names that configurations give them; only those that a configuration has are set.
SIZES: dict[str, int] = {
    **_sized(HIDDEN, """
        hidden_size d_model n_embd dim embedding_size lru_width attention_hidden_size embedding_dim
        word_embed_proj_dim emb_dim output_embedding_size input_embedding_size backbone_hidden_size
        hidden_size_global"""),
    **_sized(2 * HIDDEN, """
        intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner mlp_dim
        ffn_hidden_size intermediate_size_mlp feed_forward_size dense_intermediate_size"""),
    **_sized(HIDDEN // 2, """
        moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size"""),
    **_sized(HEADS, """
        num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads"""),
    **_sized(KV_HEADS, """
        num_key_value_heads num_kv_heads kv_n_heads num_query_groups swa_num_key_value_heads
        num_global_key_value_heads"""),
    **_sized(HEAD_DIM, """
        head_dim d_head d_kv dim_head kv_channels swa_head_dim v_head_dim qk_nope_head_dim index_head_dim
        global_head_dim attention_head_dim attention_head_size"""),
    "qk_rope_head_dim": HEAD_DIM, "qk_head_dim": 2 * HEAD_DIM, "kv_lora_rank": 32, "q_lora_rank": 32, "rotary_dim": 8,
    **_sized(VOCABULARY, """
        vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input"""),
    **_sized(64, """
        max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions
        max_source_positions context_length"""),
    **_sized(4, """
        num_experts num_local_experts n_routed_experts moe_num_experts"""),
    **_sized(2, """
        num_experts_per_tok moe_topk moe_top_k num_experts_per_token moe_k top_k_experts"""),
    **_sized(1, """
        n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace"""),
    "query_pre_attn_scalar": HEAD_DIM, "hidden_size_per_layer_input": 16, "o_groups": 2, "o_lora_rank": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_d_state": 16,
    "ssm_state_size": 16, "state_size": 16, "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_headdim": 16,
    "mamba_chunk_size": 16, "chunk_size": 16, "laurel_rank": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_layers_per_stack",
)  # fmt: skip
# Sizes that are set although the default is None.
_UNSET = ("head_dim", "num_key_value_heads", "num_experts_per_tok")

# What some architectures need besides, by model_type.
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "blt": {"encoder_hash_byte_group_vocab": 128, "patch_in_forward": False},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
}


def architectures() -> Iterator[tuple[str, type, type]]:
    """(model_type, configuration class, model class) of every causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        yield config_class.model_type, config_class, model_class[0] if isinstance(model_class, tuple) else model_class


def tiny_config(config_class: type, changes: dict[str, Any] | None = None) -> Any:
    """A configuration with small sizes, whatever its fields are called."""
    return config_class(**tiny_fields(config_class, changes))


def tiny_fields(config_class: type, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a configuration that make it small; nested configurations as dictionaries."""
    own = EXTRA.get(config_class.model_type, {})
    try:
        default = config_class()
    except Exception:  # some need fields: take the plain values of the class
        default = None
    given = vars(default) if default is not None else {
        name: parameter.default for name, parameter in inspect.signature(config_class.__init__).parameters.items()
    }  # fmt: skip
    fields: dict[str, Any] = {
        name: size for name, size in SIZES.items() if isinstance(given.get(name), int) and given[name] is not False
    }
    fields.update({name: SIZES[name] for name in _UNSET if given.get(name, 0) is None})
    if "kv_lora_rank" in fields:  # multi-head latent attention has a key for every head
        fields["num_key_value_heads"] = HEADS
    fields.update(_layers(given))
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(given.get(name), dict):
            fields[name] = _small_sections(given[name])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "forced_eos_token_id", "decoder_start_token_id"):
        if isinstance(given.get(name), int):
            fields[name] = 1
    for name, nested in getattr(config_class, "sub_configs", {}).items():
        value = given.get(name)
        found = type(value) if hasattr(value, "to_dict") else nested
        if value is not None and hasattr(found, "model_type"):
            fields[name] = tiny_fields(found) | {"model_type": found.model_type}
    return fields | own | (changes or {})


def _layers(given: dict[str, Any]) -> dict[str, Any]:
    """Number of layers, and what the lists with an entry for each layer become: every kind of layer once."""
    names = [name for name in LAYERS if isinstance(given.get(name), int)]
    if not names:
        return {}
    total = given[names[0]]
    lists = {k: v for k, v in given.items() if isinstance(v, (list, tuple)) and len(v) == total > 4}
    kinds: dict[str, int] = {}
    for i in range(total):
        kinds.setdefault(str([values[i] for values in lists.values()]), i)
    chosen = sorted(kinds.values())[:4] if lists else [0, 1]
    if len(chosen) == 1:
        chosen = [chosen[0], chosen[0]]
    return dict.fromkeys(names, len(chosen)) | {k: [v[i] for i in chosen] for k, v in lists.items()}


def _small_sections(rope: Any) -> Any:
    """RoPE parameters with the sections of a multimodal embedding shrunk to a head of HEAD_DIM."""
    if not isinstance(rope, dict):
        return rope
    small = {key: _small_sections(value) for key, value in rope.items()}
    if "mrope_section" in small:
        small["mrope_section"] = [2, 3, 3]
    return small


def build(config_class: type, model_class: type, changes: dict[str, Any] | None = None) -> nn.Module:
    """A model in evaluation mode with random weights that are large enough for every part to matter.

    Raises:
        ValueError: when it has more than 20 million parameters, so that a size was not found.
    """
    config = tiny_config(config_class, changes)
    wanted = getattr(model_class, "config_class", None)
    if isinstance(wanted, type) and not isinstance(config, wanted):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > 20_000_000:
        raise ValueError(f"the model has {count / 1e6:.0f} million parameters; allowed: 20")
    torch.manual_seed(0)
    model = model_class(config).eval()
    enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    """Draws weights with a spread of 1 / sqrt(fan-in), so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.dtype.is_floating_point:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def inputs(model: nn.Module, length: int, batch: int = 2) -> dict[str, Any]:
    """Token ids, and the switch that turns the cache off where there is one."""
    generator = torch.Generator().manual_seed(1)
    names = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}
    if "use_cache" in names or "kwargs" in names:
        given["use_cache"] = False
    return given


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every causal language model by model_type, with the function that builds its case."""
    for name, config_class, model_class in architectures():
        yield name, partial(_case, config_class, model_class)


def _case(config_class: type, model_class: type) -> Any:
    from coverage_measure import Case

    model = build(config_class, model_class)
    pads = "attention_mask" in inspect.signature(model.forward).parameters
    return Case(model, partial(inputs, model), getattr(model.config, "_attn_implementation", "") or "", pads)
