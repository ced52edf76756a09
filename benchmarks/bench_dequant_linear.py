"""dequant_linear against fp16 cuBLAS, Inductor on the written-out dequantisation, and tinygemm.

    bench_dequant_linear.py --shapes 2 --formats int8,int4_g128_zero --out rows.jsonl  # 140 s on an H200
    bench_dequant_linear.py --shapes 2 --formats q8_0,q4_k,gptq,q4_0,hqq_halves --rows 8,1,64,512 --out a.jsonl  # 5 min
    bench_dequant_linear.py --shapes 2 --formats q6_k,q5_k,int8_columns --rows 8,1,64,16 --out b.jsonl  # 4 min
    bench_dequant_linear.py --rows 16,32 --shapes 1 --formats int8,int4_g128_zero,q8_0 --out rows.jsonl  # 30 s
    bench_dequant_linear.py --crossover rows.jsonl  # `_dequant_dispatch.CROSSOVER` by these rows; needs no GPU
    bench_dequant_linear.py --sweep --shapes 2 --formats int8,int4_g128_zero --out sweep.jsonl  # configurations, 150 s
    bench_dequant_linear.py --shapes 2 --formats int8,int4_g128_zero --rows 1,8 --variants rows,ring,ring_early  # 25 s
    bench_dequant_linear.py --sweep-ring --shapes 2 --formats int4_g128_zero,int8 --rows 1,8 --out ring.jsonl  # 50 s
    bench_dequant_linear.py --dry                                              # tiny, on a CPU; also with --sweep

Most of the time is for compiling: Inductor is not asked at 16, 32, 128 and 256 rows. All formats, shapes and rows would
take about 25 minutes. "fuse" is the whole layer through the backend, with what it computes of stored scales.

Weights are rotated: a CUDA graph has as many products as fill 0.5 GB, so none is found in L2. Microseconds are of one
product. Each result is compared with float64 first; a variant that fails is logged and left out. Rows that matter most
come first, and each is written at once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, interleaved_ms
from dequant_formats import Parts, Stored, layouts
from torch import Tensor

import torch_fuse  # noqa: F401  # the backend
from torch_fuse.kernels import _dequant_columns as columns
from torch_fuse.kernels import _dequant_decode as decoding
from torch_fuse.kernels import _dequant_ring as ring
from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels import _dequant_tiled as tiled
from torch_fuse.kernels._dequant_dispatch import Crossover
from torch_fuse.kernels.packed_weight import Format, decode, weight_shape

SHAPES = [(10240, 2560), (14336, 4096), (8192, 8192), (28672, 4096)]
ROWS = [64, 1, 8, 512, 16, 32, 256, 128]
WITH_INDUCTOR = (1, 8, 64, 512)  # rows at which it is compiled
WITH_FUSE = (8,)


def failing(log: Log, name: str, call: Callable[[], Any], **fields: Any) -> str | None:
    """Why a call fails, logged, or None."""
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return None
    except Exception as error:
        log.write(what="failed", name=name, error=repr(error)[:600], **fields)
        return repr(error)


def errors(found: Tensor, exact: Tensor) -> list[float]:
    difference = (found.double() - exact).abs()
    scale = float(exact.square().mean().sqrt())
    return [
        float(f"{float(difference.max()) / scale:.3g}"),
        float(f"{float(difference.square().mean().sqrt()) / scale:.3g}"),
    ]


def measure(log: Log, what: str, variants: dict[str, Callable[[int], Any]], exact: Tensor | None, count: int, dry: bool,
            **fields: Any) -> dict[str, float]:  # fmt: skip
    """Microseconds of one product of each variant that runs and is right."""
    calls, wrong = {}, {}
    for name, call in variants.items():
        if failing(log, name, lambda call=call: call(0), **fields):
            continue
        if exact is not None and name not in ("fp16", "tinygemm"):
            wrong[name] = errors(call(0), exact)
            if not wrong[name][0] < 0.1:
                log.write(what="WRONG", name=name, errors=wrong[name], **fields)
                continue
        every = lambda call=call: [call(i) for i in range(count)] and None  # noqa: E731
        if not dry:
            try:
                every = captured(every)
            except Exception as error:
                log.write(what="failed", name=name, error="graph: " + repr(error)[:600], **fields)
                torch.cuda.synchronize()
                continue
        calls[name] = every
    times = interleaved_ms(calls, reps=7, warmup=1, rounds=3) if calls else {}
    us = {name: round(ms * 1e3 / count, 2) for name, ms in times.items()}
    log.write(what=what, **fields, us=us, errors=wrong)
    return us


def weights(name: str, n: int, k: int, dry: bool, device: str) -> tuple[list[Stored], list[Parts], int]:
    """As many weights as fill 0.5 GB, their parts, and the bytes of one."""
    layout = layouts(k)[name]
    size = sum(x.numel() * x.itemsize for x in layout.stored(16, k, "cpu") if x is not None) * n // 16
    stored = [layout.stored(n, k, device) for _ in range(2 if dry else max(3, int(0.5e9 // size)))]
    return stored, [layout.parts(n, k, *tensors) for tensors in stored], size


def ring_variants(x: Tensor, parts: list[Parts], form: Format, sweep: bool) -> dict[str, Callable[[int], Any]]:
    """Calls of the persistent kernel: as it is, begun early, and with other divisions of the work."""
    found: dict[str, Callable[[int], Any]] = {}
    for name, choices in (RING if sweep else dict(list(RING.items())[:2])).items():

        def call(i: int, choices: dict[str, Any] = choices) -> Tensor:
            codes, scale, zero, _ = parts[i]
            kernel = ring.kernel_for(x, codes, scale, zero, None, form, **choices)
            if isinstance(kernel, str):
                raise RuntimeError(kernel)
            return ring.ring_linear(kernel, x, codes, scale, zero, None, choices.get("early", False))

        found[name] = call
    return found


RING: dict[str, dict[str, Any]] = {
    "ring": {}, "ring_early": {"early": True}, "ring_1producer": {"producers": 1}, "ring_w8": {"warps": 8},
    "ring_w10": {"warps": 10}, "ring_s2": {"segments": 2}, "ring_s4": {"segments": 4}, "ring_3slots": {"slots": 3},
    "ring_4slots": {"slots": 4}, "ring_early_s2": {"early": True, "segments": 2},
}  # fmt: skip


def sweep_ring(log: Log, n: int, k: int, name: str, rows: list[int], dry: bool, device: str) -> None:
    form = layouts(k)[name].form
    _, parts, _ = weights(name, n, k, dry, device)
    exact_weight = decode(*parts[0], form._replace(compute="float32"), torch.float64)
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        reason = ring.kernel_for(x, *parts[0][:3], None, form)
        if isinstance(reason, str):
            log.write(what="not supported", name="ring", reason=reason, N=n, K=k, M=m, format=name)
            continue
        measure(log, "sweep_ring", ring_variants(x, parts, form, True), x.double() @ exact_weight.t(), len(parts), dry,
                N=n, K=k, M=m, format=name)  # fmt: skip


def compare(log: Log, n: int, k: int, name: str, rows: list[int], dry: bool, device: str,
            wanted: list[str]) -> None:  # fmt: skip
    layout = layouts(k)[name]
    form = layout.form
    stored, parts, size = weights(name, n, k, dry, device)
    count = len(stored)
    dense = [torch.randn(n, k, device=device).half() for _ in range(2 if dry else max(3, int(0.5e9 // (2 * n * k))))]
    exact_weight = decode(*parts[0], form._replace(compute="float32"), torch.float64)
    packed: list[Tensor] = []
    if name == "int4_g128" and not dry and (not wanted or "tinygemm" in wanted):
        failing(log, "pack tinygemm", lambda: packed.extend(
            torch.ops.aten._convert_weight_to_int4pack(codes, 8) for codes, *_ in parts))  # fmt: skip
        pairs = torch.rand(k // 128, n, 2, device=device).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(layout.linear, backend="eager" if dry else "inductor", dynamic=False)
    fused = torch.compile(layout.linear, backend="fuse", dynamic=False,
                          options={"unmeasured": True, **({"kernels": "reference"} if dry else {})})  # fmt: skip
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        variants: dict[str, Callable[[int], Any]] = {"fp16": lambda i, x=x: F.linear(x, dense[i % len(dense)])}
        if m in WITH_INDUCTOR:
            variants["inductor"] = lambda i, x=x: compiled(x, n, *stored[i])
        if few.supports(x, *parts[0], form) is None:
            variants["rows"] = lambda i, x=x: few.rows_linear(x, *parts[i], None, form)
        if m <= ring.MAX_ROWS:
            reason = ring.kernel_for(x, *parts[0][:3], None, form)
            if isinstance(reason, str):
                log.write(what="not supported", name="ring", reason=reason, N=n, K=k, M=m, format=name)
            else:
                variants |= ring_variants(x, parts, form, False)
        if tiled.supports(x, *parts[0], form) is None and m >= 16:
            variants["tiled"] = lambda i, x=x: tiled.tiled_linear(x, *parts[i], None, form)
        if columns.supports(x, *parts[0], form) is None:
            variants["columns"] = lambda i, x=x: columns.columns_linear(x, *parts[i][:3], None, form)
        if decoding.supports(x, *parts[0], form) is None and m >= 8:
            variants["decode"] = lambda i, x=x: F.linear(x, decoding.decode_on_device(*parts[i], form, x.dtype))
        if m in WITH_FUSE:
            variants["fuse"] = lambda i, x=x: fused(x, n, *stored[i])
        if packed and m <= 64:
            bf16 = x.bfloat16()
            variants["tinygemm"] = lambda i, x=bf16: torch.ops.aten._weight_int4pack_mm(x, packed[i], 128, pairs)
        if wanted:
            variants = {key: call for key, call in variants.items() if key in wanted}
        measure(log, "dequant_linear", variants, x.double() @ exact_weight.t(), count, dry, N=n, K=k, M=m, format=name,
                bits=form.bits, floor_us=round((size + 2 * m * (n + k)) / 4.8e6, 2))  # fmt: skip


def crossovers(lines: list[dict[str, Any]]) -> dict[int, Crossover]:
    """The table that measured rows ask for, of 8 and 4 bits: what holds for all formats and sizes among them."""
    times: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for line in lines:
        if line.get("what") == "dequant_linear":
            key = line["bits"], line["format"], line["N"], line["K"]
            times.setdefault(key, {}).setdefault(line["M"], {}).update(line["us"])

    def up_to(bits: int, one: str, other: str) -> int | None:
        """The most rows up to which `one` beats `other` wherever both ran; None where they never did."""
        both = {
            (key, m): us[one] <= us[other]
            for key, by_rows in times.items() if key[0] == bits
            for m, us in by_rows.items() if one in us and other in us
        }  # fmt: skip
        lost = min((m for (_, m), won in both.items() if not won), default=None)
        return max(
            (m for (_, m), won in both.items() if won and (lost is None or m < lost)), default=0 if both else None
        )

    found = {}
    for bits in sorted({key[0] for key in times}, reverse=True):
        pairs = (("rows", "tiled"), ("rows", "decode"), ("tiled", "decode"))
        found[bits] = Crossover(*(up_to(bits, *pair) for pair in pairs))  # type: ignore[arg-type]
    return found


CONFIGS = [few.Config(*each) for each in (
    (16, 4, 2), (16, 8, 2), (16, 4, 0), (16, 8, 0), (16, 2, 4), (16, 4, 5), (32, 4, 2), (32, 8, 2), (16, 4, 2, 0, 2),
    (16, 4, 2, 0, 1, 64), (16, 8, 2, 0, 1, 64), (16, 16, 1), (64, 4, 2), (64, 8, 1),
)]  # fmt: skip


TILED = {  # by rows of x; of 4-bit codes, steps have 64 bytes
    64: ["64/2/1/1/128", "64/2/1/1/128/8/1", "64/4/1/3/128", "64/2/1/3/128", "64/1/2/1/128", "64/2/2/3/128",
         "64/2/1/1/64", "64/4/1/1/128", "64/1/3/1/128"],
    128: ["128/2/1/1/64", "128/4/1/3/64", "128/2/1/3/64", "128/1/2/1/64", "64/2/1/1/128", "64/4/1/1/128"],
    256: ["256/2/1/1/64", "128/3/1/1/64", "128/2/1/1/64", "128/4/1/1/64", "256/1/1/1/64", "128/4/1/2/64"],
    512: ["256/2/1/1/64", "128/3/1/1/64", "128/2/1/1/64", "128/4/1/1/64", "256/1/1/1/64"],
}  # fmt: skip


def sweep(log: Log, n: int, k: int, name: str, rows: list[int], dry: bool, device: str) -> None:
    form = layouts(k)[name].form
    _, parts, size = weights(name, n, k, dry, device)
    count = len(parts)
    exact_weight = decode(*parts[0], form._replace(compute="float32"), torch.float64)
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        reasons = [module.supports(x, *parts[0], form) for module in (few, tiled)]
        if None not in reasons:
            log.write(what="not supported", reasons=reasons)
            continue
        variants: dict[str, Callable[[int], Any]] = {}
        if reasons[0] is None and m <= 32:
            variants |= {
                "/".join(map(str, each)): lambda i, x=x, each=each: few.rows_linear(x, *parts[i], None, form, each)
                for each in CONFIGS if not (m > 16 and each.block_n < 32)
            }  # fmt: skip
        if reasons[1] is None and m > 16:
            texts = [text for size, some in TILED.items() if m <= size < 2 * m for text in some]
            chosen = [tiled.Config(*map(int, text.split("/"))) for text in texts]
            if form.bits == 4:  # 96 registers a thread are too few for 4 groups of 64 sums
                chosen = [c for c in chosen if c.teams < 4 or c.block_m <= 64]
            for each in dict.fromkeys(c._replace(tile=64) if form.bits == 4 else c for c in chosen):
                variants["tiled/" + "/".join(map(str, each))] = lambda i, x=x, each=each: tiled.tiled_linear(
                    x, *parts[i], None, form, each)  # fmt: skip
        start = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:  # compiles; a failure is logged by `measure`
            for each in [pool.submit(call, 0) for call in variants.values()]:
                each.exception()
        us = measure(log, "sweep", variants, x.double() @ exact_weight.t(), count, dry, N=n, K=k, M=m, format=name)
        if us:
            best = min(us, key=us.__getitem__)
            log.write(what="best", N=n, K=k, M=m, format=name, config=best, us=us[best],
                      GBs=round(size / us[best] / 1e3),
                      seconds=round(time.perf_counter() - start))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sweep-ring", action="store_true", help="divisions of the persistent kernel's work")
    parser.add_argument("--variants", default="", help="only these, by name")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--shapes", type=int, default=4, help="how many of the shapes")
    parser.add_argument("--formats", default=",".join(layouts(256)))
    parser.add_argument("--crossover", help="print the table of dispatch that a file of rows asks for")
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
    if options.crossover:
        lines = [json.loads(line) for line in Path(options.crossover).read_text().splitlines()]
        Log(None).write(what="crossover", table={bits: row._asdict() for bits, row in crossovers(lines).items()})
        return
    log = Log(options.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes = [(64, 256)] if options.dry else SHAPES[: options.shapes]
    rows = (
        [int(m) for m in options.rows.split(",")]
        if options.rows
        else [64, 1, 8, 256, 512, 128]
        if options.sweep
        else ROWS
    )
    wanted = options.variants.split(",") if options.variants else []
    each = sweep if options.sweep else sweep_ring if options.sweep_ring else functools.partial(compare, wanted=wanted)
    for (n, k), name in itertools.product(shapes, options.formats.split(",")):
        small = layouts(256)[name]
        assert weight_shape(small.parts(16, 256, *small.stored(16, 256, "cpu"))[0], small.form) == (16, 256)
        failing(log, "row", lambda n=n, k=k, name=name: each(log, n, k, name, rows[:2] if options.dry else rows,
                                                             options.dry, device), N=n, K=k, format=name)  # fmt: skip
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
