"""Trains the GPT-NeoX of `tests/data/tiny_neox` on Python's own help texts; a few minutes on two cores.

    python tests/data/train_tiny_neox.py [--out tests/data/tiny_neox] [--steps 400]

Bytes are its tokens. The weights are rounded to float16, so that they are the same numbers in every dtype. The text is
`pydoc_data.topics` of the Python that runs it (Copyright Python Software Foundation, PSF License 2); the one that is
stored here was trained with Python 3.12.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 128,
    "max_position_embeddings": 2048, "rotary_pct": 0.25, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def text() -> torch.Tensor:
    """The help texts as ASCII codes."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(joined.encode("ascii", "ignore")))


def main() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "tiny_neox"))
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    torch.manual_seed(0)
    model, tokens = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.perf_counter()
    for step in range(given.steps):
        # the last tenth on whole contexts, so that it has seen every position
        batch, length = (16, 192) if step < given.steps * 0.9 else (2, 2048)
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / given.steps)))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * rate
        first = torch.randint(len(tokens) - length, (batch, 1))
        ids = tokens[first + torch.arange(length)]
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == given.steps - 1:
            seconds = time.perf_counter() - start
            sys.stdout.write(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s\n")
            sys.stdout.flush()
    model.half().save_pretrained(given.out)


if __name__ == "__main__":
    main()
