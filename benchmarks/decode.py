"""A token of an unmodified model with a static cache: eager, Inductor and fuse, each plain and in a CUDA graph.

    python benchmarks/decode.py --out results.jsonl [--only pythia-2.8b-512]
    python benchmarks/decode.py --ops [--sweep] [--only norm_linear]       # the ops alone, with bytes a second
    python benchmarks/decode.py --dry [--ops]                              # tiny, on the CPU

Random weights of the real sizes, batch 1, fp16. Each step starts from the same cache; its logits are compared with a
step in float64 from that cache. The floor is the bytes of the weights and of the live cache at 4.6 TB/s (an H200's
read-only stream). The ops run over several sets of weights that do not fit L2 together, in one CUDA graph, next to
Inductor's code for the models' own lines; `--sweep` tries other configurations and numbers of rows.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, _once_ms, captured, error, interleaved_ms, kernels
from models import PYTHIA, pythia
from torch import Tensor

import torch_fuse

attention = importlib.import_module("torch_fuse.kernels.decode_attention")
norm_linear = importlib.import_module("torch_fuse.kernels.norm_linear_gemv")
residual = importlib.import_module("torch_fuse.kernels.linear_residual_gemv")

BANDWIDTH, L2 = 4.6e12, 60 * 2**20
# model, tokens in the cache, its size
STEPS = {
    "pythia-160m-512": ("pythia-160m", 512, 1024),
    "pythia-2.8b-512": ("pythia-2.8b", 512, 1024),
    "pythia-2.8b-1900": ("pythia-2.8b", 1900, 2048),
}


def step(log: Log, name: str, dry: bool, reps: int) -> None:
    """Checks and times one token."""
    from transformers import StaticCache

    model_name, prompt, size = ("tiny", 20, 32) if dry else STEPS[name]
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    model = pythia(model_name, dtype, device)
    ids = torch.randint(0, 50304, (1, prompt), device=device)
    cache = StaticCache(config=model.config, max_cache_len=size)
    model(ids, past_key_values=cache)
    options: dict[str, Any] = {"kernels": "reference"} if dry else {"unmeasured": True}
    ways: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(model, fullgraph=True),
        "fuse": torch.compile(model, fullgraph=True, backend="fuse", options=options),
    }
    token = ids[:, :1].clone()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    exact = _exact(model, cache, token, prompt, size)
    row: dict[str, Any] = {"name": name, "prompt": prompt, "cache": size}
    calls: dict[str, Callable[[], Any]] = {}
    for way, function in ways.items():
        call = lambda function=function: function(token, past_key_values=cache).logits  # noqa: E731
        for _ in range(2):
            rewind()
            found = call()
        assert all(int(layer.cumulative_length) == prompt + 1 for layer in cache.layers), way
        row[f"{way}_error"] = error(found, exact)
        calls[way] = call
        rewind()
        if not dry:
            row[f"{way}_kernels"] = {k: v for k, v in kernels(call, 12).items() if way == "fuse" or k != "top"}
            rewind()
            calls[f"{way}_graph"] = captured(call)
    row |= {f"{key}_ms": round(ms, 4) for key, ms in _timed(calls, rewind, reps).items()}
    row["floor_ms"] = round(_bytes(model, cache, prompt) / BANDWIDTH * 1e3, 4)
    row["sites"] = torch_fuse.reports().counts()
    log.write(what="decode", **row)
    eager, fuse = (row[f"{way}_error"]["rms"] for way in ("eager", "fuse"))
    assert fuse <= 2 * eager + 1e-6, (fuse, eager)


def _exact(model: torch.nn.Module, cache: Any, token: Tensor, prompt: int, size: int) -> Tensor:
    """The step's logits in float64, from the same cache."""
    from transformers import StaticCache

    wide = copy.deepcopy(model).double()
    other = StaticCache(config=model.config, max_cache_len=size)
    for new, layer in zip(other.layers, cache.layers, strict=True):
        new.lazy_initialization(layer.keys.double(), layer.values.double())
        new.keys.copy_(layer.keys)
        new.values.copy_(layer.values)
        new.cumulative_length.fill_(prompt)
    return wide(token, past_key_values=other).logits


def _bytes(model: torch.nn.Module, cache: Any, prompt: int) -> int:
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_in" not in n)
    live = sum(2 * layer.keys[:, :, :prompt].numel() * layer.keys.element_size() for layer in cache.layers)
    return weights + live


def _timed(calls: dict[str, Callable[[], Any]], rewind: Callable[[], None], reps: int) -> dict[str, float]:
    """Median milliseconds, in turns; the cache is rewound outside of what is timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(3), calls.items()):
        for i in range(reps + 2):
            rewind()
            ms = _once_ms(call)
            times[name] += [ms] if i > 1 else []
    return {name: statistics.median(found) for name, found in times.items()}


# -- the ops alone -------------------------------------------------------------------------------------------------

Case = tuple[list[Callable[[], Any]], list[Callable[[], Any]], int]


def _norm_linear(hidden: int, inner: int, rows: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: QKV and MLP up behind their LayerNorms."""
    sizes = (3 * hidden, inner)
    moved = sum(sizes) * hidden * dtype.itemsize
    x = torch.randn(1, rows, hidden, device=device, dtype=dtype)

    def unfused(weights, biases, scales, shifts):  # type: ignore[no-untyped-def]
        q, h = (
            F.linear(F.layer_norm(x, (hidden,), s, c), w, b)
            for w, b, s, c in zip(weights, biases, scales, shifts, strict=True)
        )
        return q, F.gelu(h)

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        weights = [torch.randn(n, hidden, device=device, dtype=dtype) * 0.02 for n in sizes]
        biases = [torch.randn(n, device=device, dtype=dtype) for n in sizes]
        scales, shifts = ([torch.randn(hidden, device=device, dtype=dtype) for _ in sizes] for _ in range(2))
        given = (weights, biases, scales, shifts)
        ours.append(lambda g=given: norm_linear.norm_linear_gemv(x, *g, "layer", 1e-5, 0.0, "none,gelu", False))
        theirs.append(lambda g=given: compiled(*g))
    return ours, theirs, moved


def _linear_residual(hidden: int, inner: int, rows: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: output projection, MLP down and both residuals."""
    moved = (hidden + inner) * hidden * dtype.itemsize
    x, a, h = (torch.randn(1, rows, n, device=device, dtype=dtype) for n in (hidden, hidden, inner))

    def unfused(w1, b1, w2, b2):  # type: ignore[no-untyped-def]
        return F.linear(h, w2, b2) + F.linear(a, w1, b1) + x

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        w1, w2 = (torch.randn(hidden, n, device=device, dtype=dtype) * 0.02 for n in (hidden, inner))
        given = (
            w1,
            torch.randn(hidden, device=device, dtype=dtype),
            w2,
            torch.randn(hidden, device=device, dtype=dtype),
        )
        ours.append(lambda g=given: residual.linear_residual_gemv(x, a, g[0], g[1], h, g[2], g[3]))
        theirs.append(lambda g=given: compiled(*g))
    return ours, theirs, moved


def _attention(heads: int, dim: int, live: int, size: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: partial RoPE, append and attention to `live` tokens of a cache of `size`."""
    rotary, moved = dim // 4, 2 * heads * (live + 1) * dim * dtype.itemsize
    q, k, v = (t.transpose(1, 2) for t in torch.randn(1, heads, 1, 3 * dim, device=device, dtype=dtype).chunk(3, -1))
    cos, sin = (torch.randn(1, 1, rotary, device=device, dtype=dtype) for _ in range(2))
    position = torch.tensor([live], device=device)
    mask = (torch.arange(size, device=device) <= live)[None, None, None]
    lanes = [1, 0, rotary // 2]

    def turn(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        y, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat((-y[..., rotary // 2 :], y[..., : rotary // 2]), -1)
        return torch.cat((y * cos[:, None] + half * sin[:, None], rest), -1)

    def unfused(keys: Tensor, values: Tensor) -> Tensor:
        keys.index_copy_(2, position, turn(k))
        values.index_copy_(2, position, v.transpose(1, 2))
        return F.scaled_dot_product_attention(turn(q), keys, values, mask, scale=dim**-0.5)

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        keys, values = (torch.randn(1, heads, size, dim, device=device, dtype=dtype) for _ in range(2))
        ours.append(
            lambda a=keys, b=values: attention.decode_attention(
                q, k, v, cos, sin, a, b, None, position, mask, rotary, False, lanes, lanes, dim**-0.5
            )
        )
        theirs.append(lambda a=keys, b=values: compiled(a, b))
    return ours, theirs, moved


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All of several calls, whose weights do not fit L2 together, as a CUDA graph."""
    return captured(lambda: [call() for call in calls]) if torch.cuda.is_available() else calls[0]


def ops(log: Log, only: str | None, dry: bool, sweep: bool) -> None:
    """Times each op next to Inductor's code for the same lines."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    models = ["tiny"] if dry else ["pythia-160m", "pythia-2.8b"]
    for model, what in itertools.product(models, ("norm_linear", "linear_residual", "attention")):
        hidden, _, heads, inner = PYTHIA[model]
        if only not in (None, what):
            continue
        if what == "attention":
            for live, size in [(20, 32)] if dry else [(512, 1024), (1900, 2048)]:
                make = lambda live=live, size=size: _attention(heads, hidden // heads, live, size, device, dtype)  # noqa: E731, B023
                _measure(log, make(), sweep, what, name=model, live=live, size=size)
            continue
        kind = _norm_linear if what == "norm_linear" else _linear_residual
        for rows in (1, 2, 4, 8):
            _measure(log, kind(hidden, inner, rows, device, dtype), sweep and rows == 1, what, name=model, rows=rows)


def _measure(log: Log, case: Case, sweep: bool, what: str, **fields: Any) -> None:
    ours, theirs, moved = case
    with torch.no_grad():
        for a, b in zip(_flat(ours[0]()), _flat(theirs[0]()), strict=True):
            assert error(a.reshape(-1), _like(b, a).reshape(-1))["rms"] <= 0.02 * float(
                b.double().square().mean().sqrt()
            )
        times = interleaved_ms({"op": _in_turn(ours), "inductor": _in_turn(theirs)}, 10)
        log.write(what=what, **fields, **_speeds(times, len(ours), moved))
        for chosen in _configurations(what) if sweep else ():
            try:
                times = interleaved_ms({"op": _in_turn(ours)}, 10, rounds=1)
            except Exception as problem:  # a tile that is too large
                log.write(what=what, **fields, **chosen, problem=str(problem)[:100])
                continue
            log.write(what=what, **fields, **chosen, **_speeds(times, len(ours), moved))


def _speeds(times: dict[str, float], count: int, moved: int) -> dict[str, float]:
    found = {f"{name}_us": round(ms * 1e3 / count, 2) for name, ms in times.items()}
    return found | {"op_gb_s": round(moved * count / times["op"] / 1e6)}


def _flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _like(b: Tensor, a: Tensor) -> Tensor:
    return b if b.shape == a.shape else b.transpose(1, 2)


def _configurations(what: str) -> Iterator[dict[str, int]]:
    """Sets each configuration in turn, and the chosen one again at the end."""
    if what == "norm_linear":
        before = norm_linear.config
        for block_n, warps, programs in itertools.product((1, 2, 4, 8), (2, 4, 8), (0, 528, 1056)):
            chosen = norm_linear.Config(block_n, warps, programs)
            norm_linear.config = lambda *_, c=chosen: c
            yield {"block_n": block_n, "num_warps": warps, "programs": programs}
        norm_linear.config = before
    elif what == "linear_residual":
        before = residual.config
        for block_n, block_k, warps in itertools.product((1, 2, 4), (512, 1024, 2048), (2, 4, 8)):
            tile = residual.Config(block_n, block_k, warps)
            residual.config = lambda *_, c=tile: c
            yield {"block_n": block_n, "block_k": block_k, "num_warps": warps}
        residual.config = before
    else:
        before = attention.BLOCK_N, attention.NUM_WARPS, attention.PROGRAMS
        for chosen in itertools.product((32, 64, 128), (2, 4, 8), (256, 512, 1024)):
            attention.BLOCK_N, attention.NUM_WARPS, attention.PROGRAMS = chosen
            yield dict(zip(("block_n", "num_warps", "programs"), chosen, strict=True))
        attention.BLOCK_N, attention.NUM_WARPS, attention.PROGRAMS = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", help="one step, or one op: norm_linear, linear_residual, attention")
    for flag, text in (("--ops", "the ops alone"), ("--sweep", "with other configurations"), ("--dry", "tiny, on CPU")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        if given.ops:
            ops(log, given.only, given.dry, given.sweep)
            return
        for name in ["pythia-160m-512"] if given.dry else [given.only] if given.only else STEPS:
            step(log, name, given.dry, 2 if given.dry else 12)


if __name__ == "__main__":
    main()
