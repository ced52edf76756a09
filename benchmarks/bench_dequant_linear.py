"""dequant_linear against fp16 cuBLAS, Inductor on the written-out dequantisation, and tinygemm.

    bench_dequant_linear.py --shapes 2 --formats int8,int4_g128_zero --rows 64,256 --out rows.jsonl  # 70 s on an H200
    bench_dequant_linear.py --shapes 2 --formats int8,int4_g128_zero --out results.jsonl  # 140 s
    bench_dequant_linear.py --out results.jsonl                                # all formats and shapes, 500 s
    bench_dequant_linear.py --sweep --shapes 2 --formats int8,int4_g128_zero --out sweep.jsonl  # configurations, 150 s
    bench_dequant_linear.py --shapes 2 --formats int8,int4_g128_zero --rows 1,8 --variants rows,ring,ring_early  # 25 s
    bench_dequant_linear.py --sweep-ring --shapes 2 --formats int4_g128_zero,int8 --rows 1,8 --out ring.jsonl  # 50 s
    bench_dequant_linear.py --dry                                              # tiny, on a CPU; also with --sweep

Most of the time is for compiling.

Weights are rotated: a CUDA graph has as many products as fill 0.5 GB, so none is found in L2. Microseconds are of one
product. Each result is compared with float64 first; a variant that fails is logged and left out. Rows that matter most
come first, and each is written at once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, interleaved_ms
from torch import Tensor

from torch_fuse.kernels import _dequant_decode as decoding
from torch_fuse.kernels import _dequant_ring as ring
from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels import _dequant_tiled as tiled
from torch_fuse.kernels.packed_weight import Format, decode, weight_shape

SHAPES = [(10240, 2560), (14336, 4096), (8192, 8192), (28672, 4096)]
ROWS = [64, 1, 8, 256, 512, 128]
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


def formats(k: int) -> dict[str, Format]:
    return {
        "int8": Format(8, "int", 1, k, compute="float16"),
        "int4_g128_zero": Format(4, "uint", 1, 128, compute="float16"),
        "fp8": Format(8, "fp8_e4m3", 1, k, compute="float16"),
        "nf4": Format(4, "lut16", 1, 64, nibbles="high", compute="float16"),
        "int4_g128": Format(4, "uint", 1, 128, 8, compute="float16"),
    }


def weight(name: str, form: Format, n: int, k: int, device: str) -> Parts:
    groups = (n, -(-k // form.group))
    codes = torch.randint(0, 256, (n, k * form.bits // 8), dtype=torch.uint8, device=device)
    if name == "fp8":
        codes = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    elif name == "int8":
        codes = codes.view(torch.int8)
    scale = (torch.rand(groups, device=device) + 0.5).mul(0.01).half()
    zero = torch.randint(4, 12, groups, device=device).half() if name.endswith("zero") else None
    lut = torch.tensor(NF4, device=device) if name == "nf4" else None
    return codes, scale, zero, lut


def written_out(form: Format, x: Tensor, parts: Parts) -> Tensor:
    """As users write it; torch.compile sees this."""
    return F.linear(x, decode(*parts, form, x.dtype))


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


def ring_variants(x: Tensor, weights: list[Parts], form: Format, sweep: bool) -> dict[str, Callable[[int], Any]]:
    """Calls of the persistent kernel: as it is, begun early, and with other divisions of the work."""
    found: dict[str, Callable[[int], Any]] = {}
    for name, choices in (RING if sweep else dict(list(RING.items())[:2])).items():

        def call(i: int, choices: dict[str, Any] = choices) -> Tensor:
            codes, scale, zero, _ = weights[i]
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
    form = formats(k)[name]
    count = 2 if dry else max(3, int(0.5e9 // (n * k * form.bits // 8)))
    weights = [weight(name, form, n, k, device) for _ in range(count)]
    exact_weight = decode(*weights[0], form._replace(compute="float32"), torch.float64)
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        reason = ring.kernel_for(x, *weights[0][:3], None, form)
        if isinstance(reason, str):
            log.write(what="not supported", name="ring", reason=reason, N=n, K=k, M=m, format=name)
            continue
        measure(log, "sweep_ring", ring_variants(x, weights, form, True), x.double() @ exact_weight.t(), count, dry,
                N=n, K=k, M=m, format=name)  # fmt: skip


def compare(log: Log, n: int, k: int, name: str, rows: list[int], dry: bool, device: str,
            wanted: list[str]) -> None:  # fmt: skip
    form = formats(k)[name]
    count = 2 if dry else max(3, int(0.5e9 // (n * k * form.bits // 8)))
    weights = [weight(name, form, n, k, device) for _ in range(count)]
    dense = [torch.randn(n, k, device=device).half() for _ in range(2 if dry else max(3, int(0.5e9 // (2 * n * k))))]
    exact_weight = decode(*weights[0], form._replace(compute="float32"), torch.float64)
    packed: list[Tensor] = []
    if name == "int4_g128" and not dry and (not wanted or "tinygemm" in wanted):
        failing(log, "pack tinygemm", lambda: packed.extend(
            torch.ops.aten._convert_weight_to_int4pack(parts[0], 8) for parts in weights))  # fmt: skip
        pairs = torch.rand(k // 128, n, 2, device=device).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(written_out, backend="eager" if dry else "inductor", dynamic=False)
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        variants: dict[str, Callable[[int], Any]] = {
            "fp16": lambda i, x=x: F.linear(x, dense[i % len(dense)]),
            "inductor": lambda i, x=x: compiled(form, x, weights[i]),
        }
        if few.supports(x, *weights[0], form) is None:
            variants["rows"] = lambda i, x=x: few.rows_linear(x, *weights[i], None, form)
        if m <= ring.MAX_ROWS:
            reason = ring.kernel_for(x, *weights[0][:3], None, form)
            if isinstance(reason, str):
                log.write(what="not supported", name="ring", reason=reason, N=n, K=k, M=m, format=name)
            else:
                variants |= ring_variants(x, weights, form, False)
        if tiled.supports(x, *weights[0], form) is None and m >= 16:
            variants["tiled"] = lambda i, x=x: tiled.tiled_linear(x, *weights[i], None, form)
        if decoding.supports(x, *weights[0], form) is None and m >= 16:
            variants["decode"] = lambda i, x=x: F.linear(x, decoding.decode_on_device(*weights[i], form, x.dtype))
        if packed and m <= 64:
            bf16 = x.bfloat16()
            variants["tinygemm"] = lambda i, x=bf16: torch.ops.aten._weight_int4pack_mm(x, packed[i], 128, pairs)
        if wanted:
            variants = {key: call for key, call in variants.items() if key in wanted}
        measure(log, "dequant_linear", variants, x.double() @ exact_weight.t(), count, dry, N=n, K=k, M=m, format=name,
                floor_us=round((n * k * form.bits / 8 + 2 * m * (n + k)) / 4.8e6, 2))  # fmt: skip


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
    form = formats(k)[name]
    count = 2 if dry else max(3, int(0.5e9 // (n * k * form.bits // 8)))
    weights = [weight(name, form, n, k, device) for _ in range(count)]
    exact_weight = decode(*weights[0], form._replace(compute="float32"), torch.float64)
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        reasons = [module.supports(x, *weights[0], form) for module in (few, tiled)]
        if None not in reasons:
            log.write(what="not supported", reasons=reasons)
            continue
        variants: dict[str, Callable[[int], Any]] = {}
        if reasons[0] is None and m <= 32:
            variants |= {
                "/".join(map(str, each)): lambda i, x=x, each=each: few.rows_linear(x, *weights[i], None, form, each)
                for each in CONFIGS if not (m > 16 and each.block_n < 32)
            }  # fmt: skip
        if reasons[1] is None and m > 16:
            texts = [text for size, some in TILED.items() if m <= size < 2 * m for text in some]
            chosen = [tiled.Config(*map(int, text.split("/"))) for text in texts]
            if form.bits == 4:  # 96 registers a thread are too few for 4 groups of 64 sums
                chosen = [c for c in chosen if c.teams < 4 or c.block_m <= 64]
            for each in dict.fromkeys(c._replace(tile=64) if form.bits == 4 else c for c in chosen):
                variants["tiled/" + "/".join(map(str, each))] = lambda i, x=x, each=each: tiled.tiled_linear(
                    x, *weights[i], None, form, each)  # fmt: skip
        start = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:  # compiles; a failure is logged by `measure`
            for each in [pool.submit(call, 0) for call in variants.values()]:
                each.exception()
        us = measure(log, "sweep", variants, x.double() @ exact_weight.t(), count, dry, N=n, K=k, M=m, format=name)
        if us:
            best = min(us, key=us.__getitem__)
            log.write(what="best", N=n, K=k, M=m, format=name, config=best, us=us[best],
                      GBs=round(n * k * form.bits / 8 / us[best] / 1e3),
                      seconds=round(time.perf_counter() - start))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sweep-ring", action="store_true", help="divisions of the persistent kernel's work")
    parser.add_argument("--variants", default="", help="only these, by name")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--shapes", type=int, default=4, help="how many of the shapes")
    parser.add_argument("--formats", default="int8,int4_g128_zero,fp8,nf4,int4_g128")
    parser.add_argument("--rows", default="")
    options = parser.parse_args()
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
        assert weight_shape(weight(name, formats(256)[name], 16, 256, device)[0], formats(256)[name]) == (16, 256)
        failing(log, "row", lambda n=n, k=k, name=name: each(log, n, k, name, rows[:2] if options.dry else rows,
                                                             options.dry, device), N=n, K=k, format=name)  # fmt: skip
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
