"""Builds a transformers or diffusers class small: fewer layers and heads, the same head size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from torch_fuse.cli.arguments import read_config

_HINT = "MODEL"
_MOST_HEADS = 4
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_single_layers", "encoder_layers",
    "decoder_layers", "num_decoder_layers", "num_refiner_layers",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads",
)  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_CAPPED = {
    "vocab_size": 1024, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 256,
}  # fmt: skip
_INNER = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "n_inner",
    "d_ff",
    "ffn_hidden_size",
)
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def shrink(defaults: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of a config to change so that a model of it is small.

    Heads keep their size, because it decides which kernels apply; every width that was the model's becomes
    the smaller model's.

    Args:
        defaults: the config's fields and default values.
        layers: the most layers.
    """
    ints = {k: v for k, v in defaults.items() if isinstance(v, int) and not isinstance(v, bool)}
    changed = {name: min(ints[name], layers) for name in _LAYERS if name in ints}
    changed |= {name: min(ints[name], cap) for name, cap in _CAPPED.items() if name in ints}
    heads = next((ints[name] for name in _HEADS if name in ints and ints[name] > 0), None)
    if heads is not None:
        few = min(heads, _MOST_HEADS)
        changed |= {name: few for name in _HEADS if ints.get(name) == heads}
        for name in _KV_HEADS:
            if name in ints:
                changed[name] = few if ints[name] == heads else max(1, ints[name] * few // heads)
        width = next((ints[name] for name in _WIDTHS if name in ints), None)
        if width is None and "attention_head_dim" in ints:
            width = heads * ints["attention_head_dim"]
        if width is not None and width % heads == 0:
            small = width // heads * few
            changed |= {k: small for k, v in ints.items() if v == width and (k in _WIDTHS or k.endswith("_dim"))}
            changed |= {name: 2 * small for name in _INNER if name in ints}
    vocab = changed.get("vocab_size")
    if vocab is not None:
        changed |= {k: i for i, k in enumerate(_TOKEN_IDS) if k in ints and ints[k] >= vocab}
    return changed


def _find_class(name: str) -> tuple[str, type]:
    import importlib

    tried = []
    for package in ("transformers", "diffusers"):
        try:
            module = importlib.import_module(package)
        except ImportError:
            tried.append(f"{package} (not installed)")
            continue
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, torch.nn.Module):
            return package, found
        tried.append(package)
    near = ", ".join(_similar(name)) or "such as LlamaForCausalLM or WanTransformer3DModel"
    raise typer.BadParameter(
        f"{name!r} is no model class of {' or '.join(tried)}, and no directory; "
        f"allowed: a model class, {near}, or the directory of a checkpoint",
        param_hint=_HINT,
    )


def _similar(name: str) -> Iterator[str]:
    import difflib
    import sys

    known: list[str] = []
    for package in ("transformers", "diffusers"):
        if package in sys.modules:
            known += [entry for entry in dir(sys.modules[package]) if entry.endswith(("Model", "LM", "Classification"))]
    yield from difflib.get_close_matches(name, known, n=3, cutoff=0.6)


def _config_overrides(config_class: Any, layers: int) -> dict[str, Any]:
    config = config_class()
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    changed = shrink(fields, layers)
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(part) and getattr(config, name, None) is not None:
            changed[name] = _config_overrides(type(getattr(config, name)), layers)
    return changed


def build_small(name: str, layers: int, device: torch.device) -> torch.nn.Module:
    """A model of the class `name` with random weights.

    Raises:
        typer.BadParameter: when there is no such class, or it cannot be built from its default config.
    """
    package, cls = _find_class(name)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            if package == "transformers":
                config_class: Any = getattr(cls, "config_class", None)
                if config_class is None:
                    raise TypeError(f"{name} has no config class; name the class of one architecture")
                model: torch.nn.Module = cls(config_class(**_config_overrides(config_class, layers)))
            else:
                parameters = inspect.signature(cls).parameters.values()
                defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
                model = cls(**shrink(defaults, layers))
    except Exception as error:
        raise typer.BadParameter(
            f"{name} cannot be built small from its default config: {type(error).__name__}: {error}. "
            "Allowed instead: the directory of a saved model of it",
            param_hint=_HINT,
        ) from error
    return model.eval()


def load_checkpoint(directory: Path, device: torch.device) -> torch.nn.Module:
    """The model saved in a local directory, in its own dtype.

    Raises:
        typer.BadParameter: when the directory does not name a known model class.
    """
    config = read_config(directory, _HINT)
    names = [config["_class_name"]] if "_class_name" in config else list(config.get("architectures") or [])
    if not names:
        raise typer.BadParameter(
            f"'{directory}/config.json' names no class; allowed: one with 'architectures' or '_class_name'",
            param_hint=_HINT,
        )
    package, cls = _find_class(str(names[0]))
    loader: Any = cls
    dtype = {"dtype": "auto"} if package == "transformers" else {}
    return loader.from_pretrained(directory, local_files_only=True, **dtype).to(device).eval()
