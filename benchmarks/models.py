"""Whole models, unmodified, eager, Inductor and fuse side by side: Pythia prefill and training, Wan denoising step.

python benchmarks/models.py --out benchmarks/results/models.jsonl
python benchmarks/models.py --dry        # tiny sizes on the CPU, to check the script
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Log, captured, error, interleaved_ms, kernels

import torch_fuse

EXACT = True
FRAMES = [1, 5, 21]  # latent frames of Wan: 1,560, 7,800 and 32,760 tokens
PYTHIA = {
    "tiny": (64, 2, 4, 128),
    "pythia-160m": (768, 12, 12, 3072),
    "pythia-1.4b": (2048, 24, 16, 8192),
    "pythia-2.8b": (2560, 32, 32, 10240),
}


def pythia(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """GPTNeoX of a Pythia's size with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    hidden, layers, heads, intermediate = PYTHIA[name]
    config = GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=intermediate,
        vocab_size=50304, rotary_pct=0.25, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return GPTNeoXForCausalLM(config).to(dtype).eval()


def wan(layers: int, dtype: torch.dtype, device: str, tiny: bool = False) -> torch.nn.Module:
    """WanTransformer3DModel with the 1.3B geometry and random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    small = {"ffn_dim": 128, "text_dim": 32, "freq_dim": 32} if tiny else {"ffn_dim": 8960}
    heads, head_dim = (2, 24) if tiny else (12, 128)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **small
        )
    return model.to(dtype).eval()


def exact_result(model: torch.nn.Module, call: Callable[[Any], torch.Tensor]) -> torch.Tensor | None:
    """The result in float64, or None with --no-exact: errors are then against eager."""
    return call(copy.deepcopy(model).double()) if EXACT else None


def compare(
    log: Log, what: str, model: torch.nn.Module, call: Callable[[Any], torch.Tensor], exact: torch.Tensor | None,
    reps: int, graph: bool, **fields: Any,
) -> None:  # fmt: skip
    """Checks and times the three ways to run a model; `call(f)` runs f on the inputs and returns the result."""
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    versions = {
        "eager": model,
        "inductor": torch.compile(model),
        "fuse": torch.compile(model, backend="fuse"),
    }
    calls = {name: (lambda f=f: call(f)) for name, f in versions.items()}
    results, first_s = {}, {}
    for name, run in calls.items():
        start = time.perf_counter()
        results[name] = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        first_s[name] = round(time.perf_counter() - start, 1)
    sys.stderr.write(f"{what}: first calls took {first_s} s\n")
    reference = results["eager"] if exact is None else exact
    errors = {name: error(result, reference) for name, result in results.items()}
    log.write(what=what, counts=torch_fuse.reports().counts(), match_s=torch_fuse.reports().seconds,
              first_s=first_s, exact=exact is not None, errors=errors, **fields)  # fmt: skip
    found: dict[str, Any] = {"ms": interleaved_ms(calls, reps, rest_s=2.0), "ms_sustained": interleaved_ms(calls, reps)}
    if torch.cuda.is_available():
        if graph:
            replays = {name: captured(run) for name, run in calls.items()}
            found["graph_ms"] = interleaved_ms(replays, reps)
            del replays
        found["kernels"] = {name: kernels(calls[name]) for name in ("inductor", "fuse")}
    log.write(what=what, **found, **fields)


def prefill(log: Log, dry: bool, device: str, reps: int) -> None:
    """One forward pass over a prompt."""
    name, length = ("tiny", 128) if dry else ("pythia-2.8b", 2048)
    model = pythia(name, torch.bfloat16, device)
    ids = torch.randint(0, 50304, (1, length), device=device)

    def call(f: Any) -> torch.Tensor:
        return f(ids, use_cache=False).logits

    with torch.no_grad():
        exact = exact_result(model, call)
        compare(log, "prefill", model, call, exact, reps, True, size=name, tokens=length, dtype="bfloat16")


def train(log: Log, dry: bool, device: str, reps: int) -> None:
    """Forward and backward."""
    name, batch, length = ("tiny", 1, 128) if dry else ("pythia-1.4b", 4, 1024)
    model = pythia(name, torch.bfloat16, device).train()
    ids = torch.randint(0, 50304, (batch, length), device=device)
    watched = model.gpt_neox.layers[0].attention.query_key_value.weight

    def call(f: Any) -> torch.Tensor:
        f(ids, labels=ids, use_cache=False).loss.backward()
        gradient = watched.grad
        for parameter in model.parameters():
            parameter.grad = None
        return gradient

    compare(log, "train", model, call, None, reps, False, size=name, batch=batch, tokens=length, dtype="bfloat16")


def denoise(log: Log, dry: bool, device: str, reps: int) -> None:
    """One step of Wan at three lengths."""
    layers = 1 if dry else 4
    model = wan(layers, torch.bfloat16, device, tiny=dry)
    text = torch.randn(1, 16 if dry else 512, 32 if dry else 4096, device=device, dtype=torch.bfloat16)
    for frames in (1,) if dry else FRAMES:
        height, width = (16, 24) if dry else (60, 104)
        x = torch.randn(1, 16, frames, height, width, device=device, dtype=torch.bfloat16)
        t = torch.tensor([500], device=device)
        tokens = frames * height * width // 4

        def call(f: Any, x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:

            return f(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]

        with torch.no_grad():
            exact = None
            if tokens <= 8000 and EXACT:
                wide = copy.deepcopy(model).double()
                exact = wide(x.double(), t, text.double(), return_dict=False)[0]
                del wide
            compare(log, "wan", model, call, exact, reps, tokens <= 8000, layers=layers, tokens=tokens,
                    dtype="bfloat16")  # fmt: skip


def llama(log: Log, dry: bool, device: str, reps: int) -> None:
    """One forward pass of Llama-3-8B's geometry over a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, intermediate = (64, 2, 4, 2, 128) if dry else (4096, 32, 32, 8, 14336)
    length = 128 if dry else 4096
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=intermediate, vocab_size=128256, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 128256, (1, length), device=device)

    def call(f: Any) -> torch.Tensor:
        return f(ids, use_cache=False, logits_to_keep=1).logits

    with torch.no_grad():
        exact = exact_result(model, call)
        compare(log, "llama", model, call, exact, reps, True, size="llama-3-8b", tokens=length, dtype="bfloat16")


def bert(log: Log, dry: bool, device: str, reps: int) -> None:
    """BERT-base inference over a batch, without padding and with."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    batch, length = (2, 64) if dry else (32, 512)
    torch.manual_seed(0)
    with torch.device(device):
        model = BertModel(BertConfig(**(sizes if dry else {}))).to(torch.bfloat16).eval()
    ids = torch.randint(0, 30522, (batch, length), device=device)
    lengths = torch.randint(length // 4, length + 1, (batch,), device=device)
    for padded in (False, True):
        keep = torch.arange(length, device=device) < lengths[:, None] if padded else torch.ones_like(ids).bool()
        mask = keep.long() if padded else None

        def call(f: Any, mask: torch.Tensor | None = mask, keep: torch.Tensor = keep) -> torch.Tensor:
            return f(ids, attention_mask=mask).last_hidden_state * keep[..., None]

        with torch.no_grad():
            exact = exact_result(model, call)
            compare(log, "bert", model, call, exact, reps, True, padded=padded, batch=batch, tokens=length,
                    dtype="bfloat16")  # fmt: skip


PARTS = {"prefill": prefill, "train": train, "wan": denoise, "llama": llama, "bert": bert}


def main() -> None:
    global EXACT, FRAMES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--reps", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, help="of Wan; 1,560 tokens each")
    parser.add_argument("--no-exact", action="store_true", help="compare with eager, not with float64: saves time")
    given = parser.parse_args()
    EXACT, FRAMES = not given.no_exact, given.frames
    log = Log(given.out)
    for name in given.only:
        PARTS[name](log, given.dry, "cpu" if given.dry else "cuda", 2 if given.dry else given.reps)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
