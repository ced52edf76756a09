"""decode_stack, one token of a whole decoder in one launch, against the chain of three launches a layer.

    python benchmarks/bench_decode_stack.py --out rows.jsonl                 # checks, times, what its parts cost
    python benchmarks/bench_decode_stack.py --only pythia-2.8b-512 --sweep   # other divisions of the work

Each result is checked against float64 first, and a thousand repeated steps have to be bitwise equal. Times are of CUDA
graphs, next to the bytes at 4.6 TB/s. `without_*` leaves a part of the kernel away, which makes the result wrong: it
tells what that part costs. A launch that hangs ends itself after two seconds, and then nothing else can run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common import Log, captured, error, interleaved_ms
from torch import Tensor

from torch_fuse.kernels import _decode_stack_launch as launching
from torch_fuse.kernels.decode_attention import decode_attention
from torch_fuse.kernels.decode_stack import Stack, decode_stack, reference, supports
from torch_fuse.kernels.linear_residual_gemv import linear_residual_gemv
from torch_fuse.kernels.norm_linear_gemv import norm_linear_gemv

BANDWIDTH = 4.6e12


class Model(NamedTuple):
    """A decoder of the GPT-NeoX kind (parallel) or of the Llama kind."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    rotary: int
    parallel: bool = True


MODELS = {
    "tiny": Model(64, 2, 4, 4, 16, 256, 96, 8),
    "pythia-160m": Model(768, 12, 12, 12, 64, 3072, 50304, 16),
    "pythia-2.8b": Model(2560, 32, 32, 32, 80, 10240, 50304, 20),
    "llama-1b": Model(2048, 16, 32, 8, 64, 8192, 128256, 64, False),
    "llama-8b": Model(4096, 32, 32, 8, 128, 14336, 128256, 128, False),
}
STEPS = {
    "pythia-160m-512": ("pythia-160m", 512, 1024),
    "pythia-2.8b-512": ("pythia-2.8b", 512, 1024),
    "pythia-2.8b-1900": ("pythia-2.8b", 1900, 2048),
    "llama-1b-512": ("llama-1b", 512, 1024),
    "llama-8b-512": ("llama-8b", 512, 1024),
}
WITHOUT = {
    "without_attention": {"ATTENTION": 0},
    "without_barriers": {"BARRIERS": 0},
    "without_both": {"ATTENTION": 0, "BARRIERS": 0},
}
RINGS: dict[str, dict[str, int]] = {
    "keys_0": {"keys": 0}, "keys_20480": {"keys": 20480}, "keys_40960": {"keys": 40960}, "keys_81920": {"keys": 81920},
    "one_query": {"queries": 1},
}  # fmt: skip
CHOICES: list[dict[str, int]] = [
    {"matrix_warps": 8}, {"matrix_warps": 9}, {"max_chunk": 10240}, {"max_chunk": 12288, "matrix_warps": 8},
    {"max_slots": 4}, {"max_slots": 6}, {"splits": 2}, {"splits": 8}, {"keys": 102400},
]  # fmt: skip


def stack(model: Model, live: int, size: int, device: str, dtype: torch.dtype, counted: bool) -> Stack:
    """Random weights; each layer adds about as much to the stream as there is."""
    torch.manual_seed(0)
    n, d, h, width = model.layers, model.head_dim, model.heads, model.width

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    def weights(count: int, rows: int, columns: int) -> list[Tensor]:
        return [random(rows, columns, scale=columns**-0.5) for _ in range(count)]

    def biases(count: int, rows: int) -> list[Tensor | None]:
        return [random(rows, scale=0.1) if model.parallel else None for _ in range(count)]

    kv = model.kv_heads * d
    rows, layout = [h * d, kv, kv], [0, 0, d, 1, 0, d, 2, 0, d]
    if model.parallel:
        rows, layout = [3 * h * d], [0, 0, 3 * d, 0, d, 3 * d, 0, 2 * d, 3 * d]
    ups = 1 if model.parallel else 2
    angles = torch.rand(1, 1, model.rotary, device=device) * 6
    lanes = [1, 0, model.rotary // 2]
    norms = [1 + random(width, scale=0.1) for _ in range(2 * n)]
    caches = [[random(1, model.kv_heads, size, d) for _ in range(n)] for _ in range(2)]
    place = torch.full((1,), live, device=device)
    return Stack(
        random(1, 1, width), norms, biases(2 * n, width),
        [w for _ in range(n) for r in rows for w in weights(1, r, width)],
        [b for _ in range(n) for r in rows for b in biases(1, r)], weights(ups * n, model.inner, width),
        biases(ups * n, model.inner), weights(n, width, h * d), biases(n, width), weights(n, width, model.inner),
        biases(n, width), angles.cos().to(dtype), angles.sin().to(dtype), *caches,
        [place[0].clone() for _ in range(n)] if counted else [], None if counted else place,
        [(torch.arange(size, device=device) <= live)[None, None, None]], norms[0], biases(1, width)[0],
        *weights(1, model.vocabulary, width), None, model.parallel, "layer" if model.parallel else "rms", 1e-5, 0.0,
        "gelu" if model.parallel else "silu", not model.parallel, h, model.kv_heads, d, layout, model.rotary, False,
        lanes, lanes, d**-0.5,
    )  # fmt: skip


def moved(s: Stack, live: int) -> int:
    """Bytes that a step has to read."""
    weights = (*s.in_weights, *s.up_weights, *s.out_weights, *s.down_weights, s.head_weight)
    keys = 2 * s.layers * s.kv_heads * live * s.head_dim
    return (sum(w.numel() for w in weights if w is not None) + keys) * s.x.element_size()


def other(s: Stack, dtype: torch.dtype | None = None) -> Stack:
    """The same weights; what is written to is a copy; the stream, tables and caches are of another dtype."""
    change = lambda t: t if t is None else t.to(dtype, copy=True) if dtype else t.clone()  # noqa: E731
    return s._replace(
        x=change(s.x), cos=change(s.cos), sin=change(s.sin), key_caches=[change(c) for c in s.key_caches],
        value_caches=[change(c) for c in s.value_caches], lengths=[c.clone() for c in s.lengths],
    )  # fmt: skip


def launched(s: Stack, macros: dict[str, int] | None = None, **choices: int) -> Callable[[], Tensor]:
    """The kernel's launch without the op's checks; raises where there is none, instead of running the reference."""
    found = launching.ready(s, tuple((macros or {}).items()), **choices)
    if isinstance(found, str):
        raise RuntimeError(found)
    return lambda: found.launch(s)


def check(log: Log, name: str, s: Stack) -> None:
    """Raises unless the op is at most twice as far from float64 as the chain in plain torch, in all that it writes."""
    reason = supports(*s)
    if torch.cuda.is_available():
        launched(s)
    mine, chain, exact = other(s), other(s), other(s, torch.float64)
    start = time.perf_counter()
    found = decode_stack(*mine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    wanted, right = reference(*chain), reference(*exact)
    ours, theirs = error(found, right), error(wanted, right)
    log.write(what="check", name=name, supports=reason, first_call_s=round(seconds, 1), error=ours,
              reference_error=theirs)  # fmt: skip
    assert ours["rms"] <= 2 * theirs["rms"] + 1e-6 and ours["max"] <= 2 * theirs["max"] + 1e-3, (ours, theirs)
    for kind in ("key_caches", "value_caches"):
        for a, b, c in zip(getattr(mine, kind), getattr(chain, kind), getattr(exact, kind), strict=True):
            assert error(a, c)["rms"] <= 2 * error(b, c)["rms"] + 1e-6, kind
    assert all(torch.equal(a, b) for a, b in zip(mine.lengths, chain.lengths, strict=True))


def repeats(log: Log, name: str, s: Stack, times: int) -> None:
    """Raises unless the step gives the same bits each time; it may not depend on what a launch finds in its memory."""
    first = decode_stack(*s).clone()
    call = launched(s) if torch.cuda.is_available() else lambda: decode_stack(*s)
    found = [call() for _ in range(times)]
    different = sum(not torch.equal(logits, first) for logits in found)
    log.write(what="repeats", name=name, times=times, different=different)
    assert different == 0


def measure(log: Log, name: str, s: Stack, live: int, makers: dict[str, Callable[[], Any]], **fields: Any) -> None:
    """Times the calls that are made in a CUDA graph; one that fails is logged."""
    ready = {}
    for way, make in makers.items():
        try:
            call = make()
            call()
            ready[way] = captured(call) if torch.cuda.is_available() else call
        except Exception as problem:
            log.write(what="decode_stack", name=name, way=way, problem=repr(problem)[:600])
    floor = moved(s, live) / BANDWIDTH * 1e3
    found = interleaved_ms(ready, 10, rounds=3)
    for way, ms in found.items():
        log.write(what="decode_stack", name=name, way=way, ms=round(ms, 4), floor_ms=round(floor, 4),
                  tb_s=round(moved(s, live) / ms / 1e9, 3), of_floor=round(ms / floor, 3), **fields)  # fmt: skip


EVENTS = ("begin", "stream", "projected", "up", "inner", "first", "attended", "out", "query", "tasks")


def traced(log: Log, name: str, s: Stack, **choices: int) -> None:
    """Where a step's time goes: for each event of a layer, us after the first block's begin, over layers but the first.

    `mean` and `last` are of the blocks; stream, inner and attended come after a wait. In a parallel decoder: begin
    (wait for the stream) stream (QKV) projected (up) up (wait) inner (MLP down) first (wait) attended (out) out.
    """
    found = launching.ready(s, trace=True, **choices)
    if isinstance(found, str):
        raise RuntimeError(found)
    for _ in range(3):  # the last one counts
        workspace = torch.zeros(found.plan.workspace, dtype=torch.uint8, device=s.x.device)
        found.launch(s, workspace)
    blocks = found.plan.constants["CTAS"]
    times = workspace[found.plan.constants["TRACE_AT"] :].view(torch.int64).view(blocks, s.layers, 16).double()
    times = times[:, 1:, : len(EVENTS)] * 1e-3
    begin = times[:, :, 0].amin(0)
    rows = {}
    for i, event in enumerate(EVENTS):
        there = times[:, :, i] > 0  # blocks without tasks have no such event
        after = torch.where(there, times[:, :, i] - begin, 0.0)
        mean = after.sum(0) / there.sum(0).clamp(min=1)
        rows[event] = [round(float(mean.mean()), 2), round(float(after.amax(0).mean()), 2)]
    layer = (times[:, :, 0].amin(0)[1:] - begin[:-1]).mean()
    order = (("inner", 3, 4), ("attended", 5, 6)) if s.parallel else (("attended", 2, 6), ("inner", 3, 4))
    waits = {
        wait: [round(float((times[:, :, b] - times[:, :, a]).mean()), 2),
               round(float((times[:, :, b] - times[:, :, a]).amin(0).mean()), 2)]
        for wait, a, b in (("stream", 0, 1), *order)
    }  # fmt: skip
    log.write(
        what="trace",
        name=name,
        layer_us=round(float(layer), 2),
        mean_last_us=rows,
        waits_mean_least_us=waits,
        **choices,
    )


def chain(s: Stack) -> Callable[[], Any]:
    """The same step of a parallel decoder by three ops a layer, as the patterns emit them."""

    def call() -> Tensor:
        x = s.x
        for i in range(s.layers):
            norms, biases = s.norm_weights[2 * i : 2 * i + 2], s.norm_biases[2 * i : 2 * i + 2]
            weights, vectors = [s.in_weights[i], s.up_weights[i]], [s.in_biases[i], s.up_biases[i]]
            qkv, h = norm_linear_gemv(x, weights, vectors, norms, biases, s.norm, s.eps, s.weight_offset,
                                      f"none,{s.activation}", False)  # fmt: skip
            q, k, v = qkv.view(1, 1, s.heads, 3 * s.head_dim).chunk(3, -1)
            attended = decode_attention(q, k, v, s.cos, s.sin, s.key_caches[i], s.value_caches[i], None, s.positions,
                                        s.masks[0], s.rotary_dim, s.interleaved, s.cos_lanes, s.sin_lanes,
                                        s.scale)  # fmt: skip
            x = linear_residual_gemv(x, attended.view(1, 1, -1), s.out_weights[i], s.out_biases[i], h,
                                     s.down_weights[i], s.down_biases[i])  # fmt: skip
        return norm_linear_gemv(x, [s.head_weight], [s.head_bias], [s.head_norm_weight], [s.head_norm_bias], s.norm,
                                s.eps, s.weight_offset, "none", False)[0]  # fmt: skip

    return call


def run(log: Log, name: str, dry: bool, sweep: bool, times: int, parts: bool, with_chain: bool) -> None:
    model_name, live, size = STEPS.get(name, ("tiny", 20, 32))
    model = MODELS["tiny" if dry else model_name]
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    live, size = (20, 32) if dry else (live, size)
    s = stack(model, live, size, device, dtype, counted=True)
    check(log, name, s)
    s = s._replace(lengths=[], positions=torch.full((1,), live, device=device))  # stays where it is
    repeats(log, name, s, 3 if dry else times)
    measure(log, name, s, live, {"decode_stack": lambda: lambda: decode_stack(*s)})
    if dry:
        return
    if parts:
        traced(log, name, s)
        for way, choice in RINGS.items():
            both = {"decode_stack": lambda: lambda: decode_stack(*s), way: lambda c=choice: launched(s, **c)}
            measure(log, name, s, live, both)
        for way, macros in WITHOUT.items():
            measure(log, name, s, live, {way: lambda m=macros: launched(s, m)})
        traced(log, name, s, keys=0)
    if with_chain and s.parallel:
        measure(log, name, s, live, {"chain": lambda: chain(s), "decode_stack": lambda: lambda: decode_stack(*s)})
    for choice in CHOICES if sweep else ():
        measure(log, name, s, live, {"swept": lambda c=choice: launched(s, **c)}, **choice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--only", choices=STEPS, action="append")
    parser.add_argument("--sweep", action="store_true", help="other numbers of warps, sizes of chunks, parts")
    parser.add_argument("--times", type=int, default=1000, help="repeated steps that have to be equal")
    parser.add_argument("--no-parts", action="store_true", help="leave the parts' cost out")
    parser.add_argument("--no-chain", action="store_true", help="leave the chain of three launches out")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        for name in given.only or ("pythia-160m-512", "pythia-2.8b-512", "pythia-2.8b-1900"):
            run(log, name, given.dry, given.sweep, given.times, not given.no_parts, not given.no_chain)


if __name__ == "__main__":
    main()
