"""A token of an unmodified model with a static cache: eager, Inductor and fuse, each plain and in a CUDA graph.

    python benchmarks/decode.py --out results.jsonl [--only pythia-2.8b-512] [--ways fuse,inductor]
    python benchmarks/decode.py --repeat 10000 [--only pythia-160m-512]    # the same step again and again
    python benchmarks/decode.py --ops [--sweep] [--only attention]         # the ops, with bytes a second
    python benchmarks/decode.py --ops --alone [--sweep]                    # for one row, without Inductor
    python benchmarks/decode.py --dry [--ops]                              # tiny, on the CPU

Random weights of the real sizes, batch 1, fp16 (Llama, Qwen3: bf16). Each step starts from the same cache; its logits
are compared with a step in float64 from that cache. The floor is the bytes of the weights and of the live cache at
4.6 TB/s (an H200's read-only stream). The ops run over several sets of weights that do not fit L2 together, in one CUDA
graph, next to Inductor's code for the models' own lines; `--sweep` tries other configurations. Expect 60 s for a step
of 160m, 100 s for one of 2.8b, 140 s for Llama-3-8B (90 GB: its copy in float64), 150 s for Qwen3-4B, 100 s for the
ops, 20 s for the ops alone and 90 s more for the sweep.

`--repeat` replays the captured step from one and the same cache: its logits have to be the same bits every time, and it
may take no more memory at the end than after the first. Without `--only` it takes all models; 10,000 steps of 160m take
40 s, of 2.8b 90 s, with compilation.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Log, _once_ms, captured, error, kernels
from decode_models import STEPS, start, streamed_bytes, ways
from decode_ops import ops
from decode_repeat import repeat
from torch import Tensor

import torch_fuse

BANDWIDTH = 4.6e12


def step(log: Log, name: str, dry: bool, reps: int, chosen: str) -> None:
    """Checks and times one token."""
    model, cache, token, prompt, size, rewind = start(name, dry)
    exact = _exact(model, cache, token, prompt, size)
    row: dict[str, Any] = {"name": name, "prompt": prompt, "cache": size}
    row["floor_ms"] = round(streamed_bytes(model, cache, prompt) / BANDWIDTH * 1e3, 4)
    calls: dict[str, Callable[[], Any]] = {}
    for way, make in ways(model, dry).items():
        if way not in ("eager", *chosen.split(",")):
            continue
        begin = time.perf_counter()
        try:
            found = _prepared(way, make(), calls, token, cache, prompt, rewind, dry)
            found["error"] = error(found.pop("logits"), exact)
        except Exception as problem:
            log.write(what="decode", name=name, way=way, problem=repr(problem)[:600])
            continue
        log.write(what="decode", name=name, way=way, seconds=round(time.perf_counter() - begin, 1), **found,
                  **{f"{k}_ms": v for k, v in _timed(calls, rewind, 4, way).items()})  # fmt: skip
        row[f"{way}_error"] = found["error"]
    row |= {f"{key}_ms": ms for key, ms in _timed(calls, rewind, reps).items()}
    row["sites"] = torch_fuse.reports().counts()
    log.write(what="decode", **row)
    for way in ("fuse", "ops", "ops_early"):
        if f"{way}_error" in row:
            assert row[f"{way}_error"]["rms"] <= 2 * row["eager_error"]["rms"] + 1e-6, row


def _prepared(
    way: str, function: Callable[..., Any], calls: dict[str, Callable[[], Any]], token: Tensor, cache: Any, prompt: int,
    rewind: Callable[[], None], dry: bool,
) -> dict[str, Any]:  # fmt: skip
    """Compiles one way, adds its calls, plain and in a CUDA graph, and returns its logits and kernels."""
    call = lambda: function(token, past_key_values=cache).logits  # noqa: E731
    found: dict[str, Any] = {}
    for _ in range(2):
        rewind()
        found["logits"] = call().clone()
    assert all(int(layer.cumulative_length) == prompt + 1 for layer in cache.layers), way
    calls[way] = call
    rewind()
    if not dry and way != "eager":
        calls[f"{way}_graph"] = captured(call)
        rewind()
        if not way.endswith("early"):
            found["kernels"] = kernels(call, 12)
            rewind()
    return found


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


def _timed(
    calls: dict[str, Callable[[], Any]], rewind: Callable[[], None], reps: int, only: str = ""
) -> dict[str, float]:
    """Median milliseconds, in turns; the cache is rewound outside of what is timed."""
    calls = {name: call for name, call in calls.items() if only in ("", name, name.removesuffix("_graph"))}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(3), calls.items()):
        for i in range(reps + 2):
            rewind()
            ms = _once_ms(call)
            times[name] += [ms] if i > 1 else []
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", help="one step, or one op: norm_linear, linear_residual, attention")
    for flag, text in (
        ("--ops", "the ops alone"),
        ("--sweep", "with other configurations"),
        ("--alone", "the ops without Inductor"),
        ("--dry", "tiny, on CPU"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--repeat", type=int, default=0, help="one step so many times, instead of timing it")
    parser.add_argument("--ways", default="fuse,ops,inductor", help="of fuse, ops, ops_early, inductor; eager always")
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        if given.ops:
            ops(log, given.only, given.dry, given.sweep, given.alone)
            return
        names = [given.only] if given.only else ["pythia-160m-512", "qwen3-4b-512"] if given.dry else list(STEPS)
        for name in names:
            if given.repeat:
                repeat(log, name, given.dry, given.repeat)
            else:
                step(log, name, given.dry, 2 if given.dry else 12, given.ways)


if __name__ == "__main__":
    main()
