"""The demo's model: an unmodified transformers GPT-NeoX in one of the published Pythia sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 50304
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Geometry:
    """A Pythia size: the hidden size, the number of layers and of attention heads."""

    hidden_size: int
    layers: int
    heads: int

    @property
    def parameters(self) -> int:
        """Number of weights, without the biases and norms."""
        return 12 * self.layers * self.hidden_size**2 + 2 * VOCAB_SIZE * self.hidden_size


SIZES = {
    "14m": Geometry(128, 6, 4),
    "31m": Geometry(256, 6, 8),
    "70m": Geometry(512, 6, 8),
    "160m": Geometry(768, 12, 12),
    "410m": Geometry(1024, 24, 16),
    "1b": Geometry(2048, 16, 8),
    "1.4b": Geometry(2048, 24, 16),
    "2.8b": Geometry(2560, 32, 32),
}


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes free on the device; 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        return 4 << 30


def needed_memory(geometry: Geometry, dtype: torch.dtype, rows: int) -> int:
    """Bytes for the model, its float64 copy, four results of `rows` tokens, and a fifth for the rest."""
    weights = geometry.parameters * (dtype.itemsize + 8)
    logits = rows * VOCAB_SIZE * (3 * dtype.itemsize + 2 * 8)
    return (weights + logits) * 6 // 5


def fitting_size(device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """The largest size that fits the device's memory and, on a CPU, ends in minutes on its cores."""
    names = list(SIZES)
    if device.type == "cpu":
        names = names[: names.index("160m" if cores() >= 16 else "70m") + 1]
    memory = free_memory(device)
    fitting = [name for name in names if needed_memory(SIZES[name], dtype, rows) <= memory]
    return fitting[-1] if fitting else names[0]


def build(geometry: Geometry, dtype: torch.dtype, device: torch.device, seed: int) -> torch.nn.Module:
    """GPTNeoXForCausalLM with random weights.

    Biases, norms and attention weights are spread wider than the initialisation does, so that a lost bias or
    a wrong rotation shows in the result.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=geometry.hidden_size,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        intermediate_size=4 * geometry.hidden_size,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_TOKENS,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = GPTNeoXForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif name.endswith("query_key_value.weight"):
                weight.mul_(3)
    return model.eval()


def load(directory: Path, dtype: torch.dtype | None, device: torch.device) -> torch.nn.Module:
    """A causal language model from a local checkpoint, in its own dtype unless one is given."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto" if dtype is None else dtype, local_files_only=True
    )
    model.config.use_cache = False
    return model.to(device).eval()
