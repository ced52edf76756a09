r"""dense_attention against PyTorch's backends: error against exact attention, then microseconds a call.

    python benchmarks/bench_attention.py --out results.jsonl [--sweep] [--dims 64,128] [--only 1,2048,2048,32,32,80,1]

Bf16; q and k are [B, S, H, D] in memory, v is a view into the projection [B, S, H, 3 * D], as GPT-NeoX has it. A shape
is batch, queries, keys, heads, key heads, head dim, whether it is causal.
Times are medians of CUDA graphs, so without launches. `--sweep` tries configurations of Hopper's kernel, all for each
of its own shapes, and goes on when one fails; 16 processes compile in advance. About three minutes for 64 lanes, two
for 128, one for 80. `--dry` proves the script on a CPU, with TRITON_INTERPRET=1. `--profile 0` only launches the first
of these configurations three times, for the profiler to look at the last one:

    ncu -k kernel -s 2 -c 1 --section WarpStateStats --section SchedulerStats --metrics \
        sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,\
        sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active,\
        sm__inst_issued.avg.pct_of_peak_sustained_active,sm__cycles_elapsed.max,gpc__cycles_elapsed.avg.per_second \
        python benchmarks/bench_attention.py --profile 0 --only 16,2048,2048,12,12,64,0
"""

import argparse
import contextlib
import importlib
import math
import multiprocessing
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

op = importlib.import_module("torch_fuse.kernels.dense_attention")
flash = importlib.import_module("torch_fuse.kernels._flash")
hopper = importlib.import_module("torch_fuse.kernels._hopper_flash")

SHAPES = [
    (1, 2048, 2048, 32, 32, 80, 1), (4, 1024, 1024, 32, 32, 80, 1), (1, 8192, 8192, 32, 32, 80, 1),
    (1, 2048, 2048, 32, 32, 96, 1), (1, 8192, 8192, 32, 32, 96, 1), (1, 4096, 4096, 12, 12, 48, 1),
    (1, 2048, 2048, 16, 16, 160, 1), (1, 1024, 1024, 12, 12, 64, 1), (1, 2048, 2048, 12, 12, 64, 1),
    (4, 2048, 2048, 16, 16, 64, 1), (2, 2048, 2048, 8, 8, 64, 0), (16, 2048, 2048, 12, 12, 64, 0),
    (1, 8192, 8192, 16, 16, 64, 0), (1, 1024, 1024, 32, 8, 128, 1), (1, 2048, 2048, 32, 8, 128, 1),
    (4, 1024, 1024, 16, 16, 128, 1), (1, 4096, 4096, 32, 8, 128, 1), (1, 8192, 8192, 32, 8, 128, 1),
    (1, 1560, 1560, 12, 12, 128, 0), (1, 7800, 7800, 12, 12, 128, 0), (1, 32760, 32760, 12, 12, 128, 0),
    (1, 7800, 512, 12, 12, 128, 0), (1, 32760, 512, 12, 12, 128, 0), (2, 1024, 1024, 24, 24, 128, 0),
]  # fmt: skip
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}  # flash sets the error allowed
SWEPT = [
    (16, 2048, 2048, 12, 12, 64, 0), (8, 1024, 1024, 12, 12, 64, 0), (2, 2048, 2048, 8, 8, 64, 0),
    (4, 2048, 2048, 12, 12, 64, 0), (4, 4096, 4096, 12, 12, 64, 0), (4, 2048, 2048, 16, 16, 64, 1),
    (32, 512, 512, 12, 12, 64, 0), (8, 512, 512, 8, 8, 64, 0), (1, 1024, 1024, 8, 8, 64, 0),
    (1, 2048, 2048, 12, 12, 64, 1), (1, 1024, 1024, 12, 12, 64, 1), (1, 7800, 7800, 12, 12, 128, 0),
    (2, 1024, 1024, 24, 24, 128, 0), (4, 1024, 1024, 16, 16, 128, 1), (1, 32760, 512, 12, 12, 128, 0),
    (1, 4096, 4096, 32, 8, 128, 1), (1, 2048, 2048, 32, 8, 128, 1), (1, 1560, 1560, 12, 12, 128, 0),
    (1, 32760, 32760, 12, 12, 128, 0), (1, 2048, 2048, 32, 32, 80, 1), (1, 8192, 8192, 32, 32, 80, 1),
    (4, 1024, 1024, 32, 32, 80, 1),
]  # fmt: skip
INNER = 8  # calls in one CUDA graph


def make(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, kv_heads, dim, _ = shape
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    options: Any = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float16}
    q = torch.randn(batch, queries, heads, dim, **options).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads, dim, **options).transpose(1, 2)
    return q, k, torch.randn(batch, keys, kv_heads, 3 * dim, **options)[..., 2 * dim :].transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention in float64 (float32 for long sequences), head by head."""
    dtype = torch.float64 if q.shape[2] <= 2048 else torch.float32
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        scores = (q[b, h].to(dtype) @ k[b, h // group].to(dtype).T).mul_(q.shape[-1] ** -0.5)
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
        out[b, h] = scores.softmax(-1) @ v[b, h // group].to(dtype)
    return out


def ours(config: Any, tensors: tuple[Tensor, ...], causal: bool) -> Any:
    """A call of the op with this configuration only."""
    dim = tensors[0].shape[-1]
    on_hopper = isinstance(config, hopper.Config)
    triton = op.TRITON[dim] if on_hopper else (config, config)
    other = (config, config) if on_hopper else (None, None)
    with patch.dict(op.TRITON, {dim: triton}), patch.dict(op.HOPPER, {(dim, causal): other}):
        op._launches.clear()
        op._forward(*tensors, causal, dim**-0.5)
    launches = dict(op._launches)

    def call() -> Tensor:
        op._launches.update(launches)
        return op._forward(*tensors, causal, dim**-0.5)

    return call


def sdpa(backend: SDPBackend, tensors: tuple[Tensor, ...], causal: bool) -> Tensor:
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=grouped)


def configurations(shape: tuple[int, ...]) -> list[Any]:
    """Of Hopper's kernel, in order of promise."""
    dim, causal = shape[5], bool(shape[6])
    single = hopper.Config(1, 128, 2, maxnreg=128)
    pair = hopper.Config(2, 128, 2)
    one = pair._replace(programs=1)
    if dim == 128:
        return [one._replace(turns=True), one, pair, pair._replace(turns=True)]
    if dim == 80:
        return [single, pair._replace(turns=True)]
    three = hopper.Config(3, 128, 2, 160)
    found = [three._replace(stages=3, programs=1, turns=True), one._replace(turns=True), three, single]
    return [*found, hopper.Config(1, 64, 4, maxnreg=80)] if causal else found


def compile_one(work: tuple[tuple[int, ...], Any]) -> None:
    """Leaves the kernel in Triton's cache."""
    shape, config = work
    with contextlib.suppress(Exception):  # `measure` reports it
        q, k, v = make(shape, "cuda")
        parts, out = flash.PARTS[shape[5]], flash.output(q)
        grid, arguments, constants = hopper.call(q, k, v, bool(shape[6]), shape[5] ** -0.5, parts, config, out)
        hopper.kernel.warmup(*arguments, grid=(grid,), **constants)


def chosen(shape: tuple[int, ...]) -> list[Any]:
    """What the op may run."""
    configs = [*op.HOPPER.get((shape[5], bool(shape[6])), ()), *op.TRITON[shape[5]]]
    return [*dict.fromkeys(config for config in configs if config is not None)]


def measure(shape: tuple[int, ...], tried: list[Any], dry: bool, log: Log) -> None:
    """Times the backends and the configurations."""
    tensors, us, causal = make(shape, "cpu" if dry else "cuda"), {}, bool(shape[6])
    wanted, floor = exact(*tensors, causal), {"max": 2e-3, "rms": 2e-4}
    kinds = {flash.Config: "triton", hopper.Config: "hopper"}
    useful = (2 if causal else 4) * shape[0] * shape[1] * shape[2] * shape[3] * shape[5]
    inner = 1 if dry or useful > 2e12 else INNER
    names = {config: f"{kinds[type(config)]} {tuple(config)}" for config in tried}
    makers: dict[str, Any] = {}
    if not dry:
        makers = {name: lambda b=b: lambda: sdpa(b, tensors, causal) for name, b in BACKENDS.items()}
    makers |= {name: lambda config=config: ours(config, tensors, causal) for config, name in names.items()}
    for name, maker in makers.items():
        try:
            call = maker()
            found = error(call(), wanted)
            floor = found if name == "flash" else floor
            right = all(found[key] <= 2 * floor[key] + 1e-5 for key in floor)  # NaN is wrong too
            timed = call if dry else captured(call, inner)
            us[name] = interleaved_ms({name: timed}, 2 if dry else 15)[name] * 1e3 / inner
            log.write(what="attention" if right else "WRONG", shape=shape, name=name, us=us[name], **found)
        except Exception as problem:  # does not compile, too much shared memory, refused by the backend
            log.write(what="failed", shape=shape, name=name, error=f"{type(problem).__name__}: {problem}"[:300])
    for name in sorted(us, key=us.__getitem__)[:8]:
        log.write(what="best", shape=shape, name=name, us=round(us[name], 1), tflops=round(useful / us[name] / 1e6))


def profile(shape: tuple[int, ...], config: Any) -> None:
    """Three launches: the profiler takes the last."""
    call = ours(config, make(shape, "cuda"), bool(shape[6]))
    for _ in range(2):  # `ours` has made the first
        call()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--only", nargs="+", help="shapes")
    parser.add_argument("--sweep", action="store_true", help="also try other configurations of Hopper's kernel")
    parser.add_argument("--dims", default="64,128,80", help="head dims of the sweep")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    parser.add_argument("--profile", type=int, help="only launch this configuration of the sweep")
    flags = parser.parse_args()
    log = Log(flags.out)
    shapes = [tuple(map(int, shape.split(","))) for shape in flags.only] if flags.only else SHAPES
    if flags.profile is not None:
        profile(shapes[0], configurations(shapes[0])[flags.profile])
        return
    swept = [shape for shape in SWEPT if str(shape[5]) in flags.dims.split(",")]
    if flags.sweep:
        shapes = shapes if flags.only else swept
        with multiprocessing.get_context("spawn").Pool(1 if flags.dry else 16) as pool:
            work = [(shape, config) for shape in shapes for config in configurations(shape)]
            pool.map(compile_one, [] if flags.dry else work, chunksize=1)
    for shape in shapes:
        others = configurations(shape) if flags.sweep else []
        shape = (1, 150, 150, 2, 2, *shape[5:]) if flags.dry else shape
        tried = [config for config in chosen(shape) + others if not (flags.dry and isinstance(config, hopper.Config))]
        measure(shape, [*dict.fromkeys(tried)], flags.dry, log)


if __name__ == "__main__":
    main()
