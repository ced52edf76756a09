"""A token of an unmodified Pythia-2.8B whose linear layers hold int8 or int4 weights, next to its fp16 step.

    python benchmarks/decode_quantized.py --out results.jsonl              # 200 s on an H200
    python benchmarks/decode_quantized.py --products [--sweep] --out ...   # the products alone, 40 s; 90 s with --sweep
    python benchmarks/decode_quantized.py --dry [--products]               # tiny, on the CPU

Random weights, batch 1, fp16 activations, a static cache of 1024 with 512 tokens, each way plain and in a CUDA graph.
int8 has a scale a row, int4 a scale and a zero point for 128 columns, two codes a byte; both are written out in the
modules' `forward`. "torchao8" and "torchao4" are torchao's weight-only subclasses, where it is installed; its int4 of
this kind holds a code a byte. What is asked for: fuse_graph at least 1.5 (int8) and 2 (int4) times as fast as fp16's
inductor_graph. Logits are compared with the same quantised model in float64. The floor is the bytes of all weights and
of the live cache at 4.6 TB/s.

The products are those of a layer, over weights that do not fit L2 together, in one CUDA graph; "layer" is QKV, output
projection, MLP up with GELU and MLP down one after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from bench_dequant_linear import measure
from common import Log, error
from decode import BANDWIDTH, _exact, _prepared, _timed
from models import PYTHIA, pythia
from torch import Tensor, nn

import torch_fuse
from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels.packed_weight import Format, decode

GROUP = 128


class Int8Linear(nn.Module):
    """A linear layer that holds its weight as int8, with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (wide / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


class Int4Linear(nn.Module):
    """A linear layer that holds two codes of its weight a byte, with a scale and a zero point a group of columns."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        groups = linear.weight.detach().float().view(rows, -1, min(GROUP, columns))
        least = groups.amin(2, keepdim=True)
        scale = (groups.amax(2, keepdim=True) - least) / 15
        zero = (-least / scale).round()
        codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).view(rows, columns)
        self.register_buffer("codes", codes[:, ::2] | (codes[:, 1::2] << 4))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.register_buffer("zero", zero.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, groups = self.scale.shape[:2]
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).view(rows, groups, -1).to(x.dtype)
        return F.linear(x, ((codes - self.zero) * self.scale).view(rows, -1), self.bias)


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """The model with its linear layers in a format, in place."""
    if kind.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        small = min(GROUP, model.config.hidden_size)
        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(small))
        quantize_(model, Int8WeightOnlyConfig() if kind == "torchao8" else four)
    elif kind != "fp16":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, (Int8Linear if kind == "int8" else Int4Linear)(child))
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a step reads: all but the embedding's, a row of which counts for nothing."""
    found = 0
    for name, part in itertools.chain(model.named_parameters(), model.named_buffers()):
        inner = [getattr(part, each) for each in part.__tensor_flatten__()[0]] if hasattr(part, "__tensor_flatten__") \
            else [part]  # fmt: skip
        if "embed_in" not in name:
            found += sum(x.numel() * x.element_size() for x in inner)
    return found


def step(log: Log, kind: str, ways: list[str], dry: bool, reps: int, fp16_ms: float | None) -> float | None:
    """Checks and times one token of a format; returns the milliseconds of Inductor in a graph, or fp16_ms."""
    from transformers import StaticCache

    name, prompt, size = ("tiny", 20, 32) if dry else ("pythia-2.8b", 512, 1024)
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    model = quantised(pythia(name, dtype, device), kind)
    ids = torch.randint(0, 50304, (1, prompt), device=device)
    cache = StaticCache(config=model.config, max_cache_len=size)
    model(ids, past_key_values=cache)
    token = ids[:, :1].clone()
    options: dict[str, Any] = {"kernels": "reference"} if dry else {"unmeasured": True}

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    rewind()
    try:
        exact = _exact(model, cache, token, prompt, size)
    except Exception as problem:  # a subclass that keeps its dtype
        log.write(what="decode_quantized", format=kind, problem="float64: " + repr(problem)[:300])
        exact = model(token, past_key_values=cache).logits
    live = sum(2 * layer.keys[:, :, :prompt].numel() * layer.keys.element_size() for layer in cache.layers)
    row: dict[str, Any] = {"format": kind, "prompt": prompt, "cache": size, "stored_bytes": stored_bytes(model)}
    row["floor_ms"] = round((row["stored_bytes"] + live) / BANDWIDTH * 1e3, 4)
    calls: dict[str, Callable[[], Any]] = {}
    for way in ways:
        torch._dynamo.reset()
        torch_fuse.reset_reports()
        start = time.perf_counter()
        how: dict[str, Any] = {} if way == "inductor" else {
            "backend": "fuse", "options": options,
        }  # fmt: skip
        try:
            found = _prepared(
                way, torch.compile(model, fullgraph=True, **how), calls, token, cache, prompt, rewind, dry
            )
            found["error"] = error(found.pop("logits"), exact)
        except Exception as problem:
            log.write(what="decode_quantized", format=kind, way=way, problem=repr(problem)[:600])
            continue
        seconds = round(time.perf_counter() - start, 1)
        if way != "inductor":
            row["sites"] = torch_fuse.reports().counts()
        log.write(what="decode_quantized", format=kind, way=way, seconds=seconds, **found,
                  **{f"{k}_ms": v for k, v in _timed(calls, rewind, 4, way).items()})  # fmt: skip
        row[f"{way}_error"] = found["error"]
    calls["eager"] = lambda: model(token, past_key_values=cache)
    row |= {f"{key}_ms": ms for key, ms in _timed(calls, rewind, reps).items()}
    if kind == "fp16":
        fp16_ms = row.get("inductor_graph_ms")
    if fp16_ms and "fuse_graph_ms" in row and kind != "fp16":
        row |= {"fp16_inductor_graph_ms": fp16_ms, "times_as_fast": round(fp16_ms / row["fuse_graph_ms"], 3)}
    log.write(what="decode_quantized", **row)
    return fp16_ms


def weight(form: Format, n: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Random parts of a weight [n, k]; of 4 bits with zero points."""
    groups = (n, k // form.group)
    codes = torch.randint(0, 256, (n, k * form.bits // 8), dtype=torch.uint8, device=device)
    scale = (torch.rand(groups, device=device) + 0.5).mul(0.01).half()
    if form.bits == 8:
        return codes.view(torch.int8), scale, None, None
    return codes, scale, torch.randint(4, 12, groups, device=device).half(), None


SWEEP = [few.Config(*each) for each in ((16, 4), (16, 8), (16, 16), (16, 4, 4), (16, 8, 4), (16, 8, 2, 0, 2))]


def products(log: Log, name: str, dry: bool, sweep: bool) -> None:
    """Times each product of a layer, and all of a layer after one another."""
    device = "cpu" if dry else "cuda"
    hidden, _, _, inner = PYTHIA["tiny" if dry else "pythia-2.8b"]
    shapes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    if not dry:
        shapes["lm_head"] = (50304, hidden)
    made: dict[str, Any] = {}
    for layer, (n, k) in shapes.items():
        form = Format(8, "int", 1, k, compute="float16") if name == "int8" else Format(
            4, "uint", 1, min(GROUP, k), compute="float16")  # fmt: skip
        count = 2 if dry else max(4, int(0.3e9 // (n * k * form.bits // 8)))
        weights = [weight(form, n, k, device) for _ in range(count)]
        x, bias = (torch.randn(*size, device=device).half() for size in ((1, k), (n,)))
        made[layer] = (x, weights, bias, form, "gelu" if layer == "up" else "none")

    def call(i: int, layer: str, chosen: few.Config | None = None) -> Tensor:
        x, weights, bias, form, activation = made[layer]
        parts = weights[i % len(weights)]
        if dry:
            return F.linear(x, decode(*parts, form, x.dtype), bias)
        return few.rows_linear(x, *parts, bias, form, chosen, activation)

    def whole(i: int) -> None:
        for layer in ("qkv", "out", "up", "down"):
            call(i, layer)

    rows: list[tuple[str, dict[str, Callable[[int], Any]]]] = [
        (layer, {"rows": lambda i, a=layer: call(i, a)}) for layer in shapes
    ]
    if sweep:
        for layer, variants in rows[:4]:
            for chosen in SWEEP:
                variants["/".join(map(str, chosen[:5]))] = lambda i, a=layer, c=chosen: call(i, a, c)
    with ThreadPoolExecutor(8) as pool:  # compiles; a failure is logged by `measure`
        for done in [pool.submit(each, 0) for _, variants in rows for each in variants.values()]:
            done.exception()
    for layer, variants in rows:
        x, weights, bias, form, activation = made[layer]
        exact = x.double() @ decode(*weights[0], form._replace(compute="float32"), torch.float64).t() + bias.double()
        exact = F.gelu(exact) if activation == "gelu" and not dry else exact
        n, k = shapes[layer]
        measure(log, "product", variants, exact, len(weights), dry, layer=layer, format=name, N=n, K=k,
                floor_us=round(n * k * form.bits / 8 / 4.6e6, 2))  # fmt: skip
    least = min(len(made[layer][1]) for layer in ("qkv", "up", "down"))
    measure(log, "layer", {"rows": whole}, None, least, dry, format=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--formats", default="fp16,int8,int4,torchao8,torchao4")
    parser.add_argument("--ways", default="fuse,inductor")
    parser.add_argument("--fp16-ms", type=float, help="of fp16's inductor_graph, where it is not run")
    for flag, text in (("--products", "alone"), ("--sweep", "with other configurations"), ("--dry", "tiny, on CPU")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    kinds = given.formats.split(",")
    with torch.no_grad():
        if given.products:
            for name in ("int8", "int4"):
                products(log, name, given.dry, given.sweep)
            return
        fp16_ms = given.fp16_ms
        for kind in kinds:
            if kind.startswith("torchao") and importlib.util.find_spec("torchao") is None:
                log.write(what="decode_quantized", format=kind, problem="torchao is not installed")
                continue
            ways = ["inductor"] if kind == "fp16" else given.ways.split(",")
            try:
                fp16_ms = step(log, kind, ways, given.dry, 2 if given.dry else 12, fp16_ms)
            except Exception as problem:  # the other formats are still worth measuring
                log.write(what="decode_quantized", format=kind, problem=repr(problem)[:600])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
