"""options={"attention": "measure"}: what is measured, what is chosen, and that the choice is never slower.

    python benchmarks/bench_attention_choice.py --out results.jsonl [--only 1,2048,2048,32,32,80,1,0] [--seconds 240]

A shape is batch, queries, keys, heads, key heads, head dim, whether it is causal, whether gradients are needed;
bfloat16, q and k [B, S, H, D] in memory, v a view into the projection. A row for each shape, the most important first:
- "measured": microseconds of PyTorch's pick and of each candidate on the device and of the processor, why the others
  are out, the choices with and without CUDA graphs, and the seconds that it took (compilers of kernels included).
- "compiled": the attention compiled by Inductor and by fuse, default mode (20 calls in a row, launches included) and
  reduce-overhead, interleaved; `ok` is whether fuse is at most 2 % slower and its error against float64 at most twice.
About 10 s a shape; no new shape starts after `--seconds`. Measurements go to a directory of their own, or the one in
TORCHINDUCTOR_CACHE_DIR. `--dry` proves the script on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Log, interleaved_ms
from torch import Tensor

from torch_fuse import reports, reset_reports
from torch_fuse.graph_timing import Times

choice = importlib.import_module("torch_fuse.patterns._attention_choice")
check = importlib.import_module("torch_fuse.patterns._attention_check")
sites = importlib.import_module("torch_fuse.patterns._attention_site")

SHAPES = [
    (1, 2048, 2048, 32, 32, 80, 1, 0), (1, 4096, 4096, 32, 8, 128, 1, 0), (1, 2048, 2048, 12, 12, 64, 1, 0),
    (1, 7800, 7800, 12, 12, 128, 0, 0), (1, 32760, 32760, 12, 12, 128, 0, 0), (16, 512, 512, 12, 12, 64, 0, 0),
    (1, 512, 512, 32, 32, 80, 1, 0), (1, 8192, 8192, 16, 16, 64, 0, 0), (4, 1024, 1024, 16, 16, 128, 1, 0),
    (1, 32760, 512, 12, 12, 128, 0, 0), (1, 4096, 4096, 16, 16, 72, 0, 0), (2, 1024, 1024, 24, 24, 128, 0, 0),
    (1, 2048, 2048, 32, 32, 80, 1, 1), (1, 4096, 4096, 32, 8, 128, 1, 1), (8, 1024, 1024, 12, 12, 64, 1, 1),
]  # fmt: skip
CALLS = 20
MODES = {"default": {}, "reduce-overhead": {"triton.cudagraphs": True}}


def make(shape: tuple[int, ...], device: str) -> list[Tensor]:
    batch, queries, keys, heads, kv_heads, dim, _, gradients = shape
    given: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    q = torch.randn(batch, queries, heads, dim, **given).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads, dim, **given).transpose(1, 2)
    v = torch.randn(batch, keys, kv_heads, 3 * dim, **given)[..., 2 * dim :].transpose(1, 2)
    return [x.detach().requires_grad_(bool(gradients)) for x in (q, k, v)]


def site_of(tensors: list[Tensor], causal: bool) -> Any:
    q, k, v = (sites.Layout.of(x) for x in tensors)
    first = tensors[0]
    return sites.Site(
        first.device, first.dtype, q, k, v, 1, causal, first.shape[-1] ** -0.5, first.requires_grad
    )  # fmt: skip


def measured(log: Log, shape: tuple[int, ...], tensors: list[Tensor]) -> None:
    site, start = site_of(tensors, bool(shape[6])), time.perf_counter()
    chosen = {graphs: choice.choose(site, graphs) for graphs in (False, True)}
    seconds = time.perf_counter() - start
    found = choice._measured(site)
    start = time.perf_counter()
    choice.measure(site)
    again = time.perf_counter() - start
    names = {graphs: x.candidate.name if x.candidate else "pytorch" for graphs, x in chosen.items()}
    log.write(
        what="measured", shape=shape, **found.plain(), choice=names[False], choice_in_graphs=names[True],
        reason=chosen[True].reason, seconds=round(seconds, 2), seconds_warm=round(again, 2),
    )  # fmt: skip


def attention(causal: bool, gqa: bool) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)

    return attend


def calls_in_a_row(call: Callable[..., Tensor], tensors: list[Tensor], gradients: bool) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            torch.compiler.cudagraph_mark_step_begin()
            out = call(*tensors)
            if gradients:
                torch.autograd.grad(out, tensors, out.detach())

    return run


def compiled(log: Log, shape: tuple[int, ...], tensors: list[Tensor], dry: bool) -> None:
    causal, gradients = bool(shape[6]), bool(shape[7])
    model = attention(causal, shape[3] != shape[4])
    sample = check.Sample(tensors, site_of(tensors, causal))
    for mode, inductor in MODES.items():
        if gradients and inductor:
            continue  # reduce-overhead wants the last step's results gone; the captured times are in "measured"
        torch._dynamo.reset()
        reset_reports()
        fuse = {"attention": "measure", "on_error": "raise", "inductor": inductor}
        ways = {
            "inductor": torch.compile(model, dynamic=False, options=inductor or None),
            "fuse": torch.compile(model, backend="fuse", dynamic=False, options=fuse),
        }
        results = {}
        for name, way in ways.items():
            with torch.set_grad_enabled(gradients):
                out = way(*tensors).detach().clone()
            results[name] = out.unflatten(2, (shape[3], shape[5])).transpose(1, 2)
        wrong = check.difference(results["inductor"], results["fuse"])
        wrong = wrong or sample.error_beyond_rule(results["inductor"], results["fuse"])
        sizes = {
            name: float((sample.of(x).double() - sample.exact).square().mean().sqrt()) for name, x in results.items()
        }
        with torch.set_grad_enabled(gradients):
            runs = {name: calls_in_a_row(way, tensors, gradients) for name, way in ways.items()}
            ms = interleaved_ms(runs, 1 if dry else 5, 1, 1 if dry else 4)
        us = {name: round(1e3 * x / CALLS, 1) for name, x in ms.items()}
        site = next((x for x in reports().sites if x.pattern == "dense_attention"), None)
        log.write(
            what="compiled", shape=shape, mode=mode, us=us, ratio=round(us["fuse"] / us["inductor"], 3),
            ok=not wrong and us["fuse"] <= 1.02 * us["inductor"], wrong=wrong, rms=sizes,
            report=None if site is None else [site.status, site.op, site.reason],
        )  # fmt: skip


@contextlib.contextmanager
def on_a_cpu() -> Any:
    """Lets a CPU be measured, by a clock that likes the last best."""

    def times(calls: dict[str, Any], device: torch.device) -> tuple[dict[str, Times], dict[str, str]]:
        return {name: Times(100.0 - i, 10.0) for i, name in enumerate(calls)}, {}

    with patch.object(choice, "unmeasurable", lambda site: None), patch.object(choice, "graph_times", times):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--only", help="one shape")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new shape starts after this long")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    log, start = Log(flags.out), time.perf_counter()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="bench_attention_choice_"))
    shapes = [tuple(map(int, flags.only.split(",")))] if flags.only else SHAPES
    with on_a_cpu() if flags.dry else contextlib.nullcontext():
        for shape in [shapes[0], shapes[-1]] if flags.dry else shapes:
            if time.perf_counter() - start > flags.seconds:
                log.write(what="stopped", before=shape, after_s=round(time.perf_counter() - start))
                break
            shape = (1, 20, 20, 2, 2, *shape[5:]) if flags.dry else shape
            for part in (measured, lambda *args: compiled(*args, dry=flags.dry)):
                try:
                    part(log, shape, make(shape, "cpu" if flags.dry else "cuda"))
                except Exception as problem:  # one shape that fails leaves the others
                    log.write(what="failed", shape=shape, error=f"{type(problem).__name__}: {problem}"[:400])


if __name__ == "__main__":
    main()
