"""quantised_attention: errors against float64 beside bf16's, then microseconds of each part beside exact attention.

    python benchmarks/bench_quantised_attention.py --out results.jsonl [--quick] [--sweep] [--only 1,999,999,8,2,64,0]

A shape is batch, queries, keys, heads, key heads, head dim, whether it is causal. bf16; the errors are those of 256
queries of up to two heads, on normal numbers ("plain") and with outliers: lanes of query and key 10 to 30 times as
large, a constant offset on lanes of the keys, none of them the same. Results start as NaN. Times are medians of CUDA
graphs, so without launches: "quantise" (both kernels), "attend" (the products' kernel), "op" (all three), "cudnn",
"dense" (the exact op). `--sweep` tries other configurations, too, and goes on when one fails; `--sweep quantise` only
those of the kernel that quantises. About 45 s on an H200; `--quick`: the first six shapes (25 s); for the sweeps 60 and
20 s more. `--dry` proves it on a CPU with TRITON_INTERPRET=1.
"""

import argparse
import importlib
import math
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Log, captured, interleaved_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

op = importlib.import_module("torch_fuse.kernels.quantised_attention")
dense = importlib.import_module("torch_fuse.kernels.dense_attention")
quantise = importlib.import_module("torch_fuse.kernels._quantise")
hopper = importlib.import_module("torch_fuse.kernels._hopper_quantised")

SHAPES = [
    (1, 7800, 7800, 12, 12, 128, 0), (16, 2048, 2048, 12, 12, 64, 0), (1, 32760, 32760, 12, 12, 128, 0),
    (1, 4096, 4096, 32, 32, 128, 1), (4, 2048, 2048, 12, 12, 64, 0), (2, 4096, 4096, 16, 16, 80, 0),
    (4, 4096, 4096, 12, 12, 64, 0), (8, 1024, 1024, 12, 12, 64, 0), (1, 4096, 4096, 32, 8, 128, 1),
    (2, 4096, 4096, 16, 16, 96, 1), (1, 1000, 513, 12, 4, 64, 0), (1, 75600, 75600, 2, 2, 128, 0),
]  # fmt: skip
QUICK = 6
INNER = 4  # calls in one CUDA graph
Config = hopper.Config
SWEEP = {
    128: [
        Config(2, 128, 2), Config(2, 128, 3, programs=1), Config(2, 64, 4, programs=1),
        Config(3, 64, 3, 160, programs=1),
    ],
    64: [
        Config(2, 128, 2), Config(2, 128, 4, programs=1), Config(3, 128, 2, 160, programs=1),
        Config(2, 64, 4, programs=1), Config(3, 64, 4, 160, programs=1), Config(1, 64, 4, maxnreg=128),
        Config(1, 128, 3, maxnreg=168),
    ],
}  # fmt: skip
# Of the kernel that quantises: tiles in flight, programs a multiprocessor, registers a thread.
QUANTISE_SWEEP = {
    128: [(2, 2, 128), (1, 2, 128), (1, 99, None), (3, 1, None), (2, 1, None)],
    64: [(2, 3, 80), (4, 3, 80), (1, 3, 80), (1, 99, None), (3, 2, 128), (2, 4, 64)],
}


def make(shape: tuple[int, ...], device: str, outliers: bool) -> list[Tensor]:
    batch, queries, keys, heads, kv_heads, dim, _ = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    q = torch.randn(batch, queries, heads, dim, device=device)
    k, v = (torch.randn(batch, keys, kv_heads, dim, device=device) for _ in range(2))
    if outliers:
        q[..., [3, 17]] *= torch.tensor([10.0, 30.0], device=device)
        k[..., [5, 40]] *= torch.tensor([30.0, 10.0], device=device)
        k[..., [9, 33]] += 20
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """256 query rows of up to two heads of the last batch in float64, and which rows they are."""
    rows = torch.linspace(0, q.shape[2] - 1, min(256, q.shape[2]), device=q.device).long()
    group, found = q.shape[1] // k.shape[1], []
    for h in range(min(2, q.shape[1])):
        scores = q[-1, h, rows].double() @ k[-1, h // group].double().T * q.shape[-1] ** -0.5
        if causal:
            scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > rows[:, None], -math.inf)
        found.append(scores.softmax(-1) @ v[-1, h // group].double())
    return torch.stack(found), rows


def errors(out: Tensor, wanted: Tensor, rows: Tensor) -> dict[str, float]:
    found = out[-1, : len(wanted), rows].double()
    return {
        "cos": float(F.cosine_similarity(found.flatten(), wanted.flatten(), 0)),
        "rel_l1": float((found - wanted).abs().sum() / wanted.abs().sum()),
        "rmse": float((found - wanted).square().mean().sqrt()),
        "nan": int(out.isnan().sum()),
    }


def sdpa(tensors: list[Tensor], causal: bool, backend: SDPBackend) -> Tensor:
    with sdpa_kernel([backend, SDPBackend.MATH]):
        grouped = tensors[0].shape[1] != tensors[1].shape[1]
        return F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=grouped)


def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = NEW_EMPTY(self, *args, **kwargs)
    return out.view(torch.uint8).fill_(255).view(out.dtype)


NEW_EMPTY = torch.Tensor.new_empty


def parts(tensors: list[Tensor], causal: bool) -> dict[str, Any]:
    """The op, and its kernels apart, by the launches that the op made."""
    args = (*tensors, causal, tensors[0].shape[-1] ** -0.5)
    op._launches.clear()
    op._forward(*args)
    launches = dict(op._launches)
    ((tile, rows, (sample, second, attend)),) = launches.values()
    q, k, v = tensors
    to, found, out = quantise.empty(q, k, tile, rows), quantise.statistics(q, k), op.output(q)

    def whole() -> Tensor:
        op._launches.update(launches)
        return op._forward(*args)

    def only_quantise() -> None:
        sample.again(q, k, v, found)
        second.again(q, k, v, found, *to)

    only_quantise()
    return {"op": whole, "quantise": only_quantise, "attend": lambda: op._attend_again(attend, q, to, out)}


def accuracy(shape: tuple[int, ...], device: str, log: Log) -> None:
    causal = bool(shape[6])
    for kind in ("plain", "outliers"):
        tensors = make(shape, device, kind == "outliers")
        wanted, rows = exact(*tensors, causal)
        op._launches.clear()
        with patch.object(torch.Tensor, "new_empty", poisoned):
            out = op._forward(*tensors, causal, shape[5] ** -0.5)
            again = op._forward(*tensors, causal, shape[5] ** -0.5)
        found = errors(out, wanted, rows)
        right = found["cos"] >= 0.999 and found["rel_l1"] <= 0.05 and found["nan"] == 0 and torch.equal(out, again)
        theirs = errors(sdpa(tensors, causal, SDPBackend.FLASH_ATTENTION), wanted, rows)
        log.write(what="accuracy" if right else "WRONG", shape=shape, kind=kind, **found, bf16=theirs)


def quantise_times(shape: tuple[int, ...], setting: tuple[int, int, int | None], dry: bool, log: Log) -> None:
    tensors, causal = make(shape, "cpu" if dry else "cuda", False), bool(shape[6])
    stages, *resident = setting
    width = 64 if shape[5] == 64 else 128
    with patch.object(quantise, "STAGES", stages), patch.dict(quantise.RESIDENT, {width: tuple(resident)}):
        call = parts(tensors, causal)["quantise"]
    found = interleaved_ms({"quantise": call if dry else captured(call, INNER)}, 1 if dry else 4, 1, 1 if dry else 3)
    log.write(
        what="quantise", shape=shape, setting=setting, us=round(found["quantise"] * 1e3 / (1 if dry else INNER), 1)
    )


def times(shape: tuple[int, ...], config: Any, dry: bool, log: Log) -> None:
    tensors, causal = make(shape, "cpu" if dry else "cuda", False), bool(shape[6])
    with patch.dict(op.HOPPER, {shape[5]: config or op.HOPPER[shape[5]]}):
        calls = parts(tensors, causal)
    if config is not None:
        wanted, rows = exact(*tensors, causal)
        found = errors(calls["op"](), wanted, rows)
        if not found["cos"] >= 0.999:
            log.write(what="WRONG", shape=shape, config=config, **found)
            return
        calls = {"attend": calls["attend"]}
    elif not dry:
        calls["cudnn"] = lambda: sdpa(tensors, causal, SDPBackend.CUDNN_ATTENTION)
        if shape[5] in dense.HEAD_DIMS:
            calls["dense"] = lambda: dense._forward(*tensors, causal, shape[5] ** -0.5)
    ready = calls if dry else {name: captured(call, INNER) for name, call in calls.items()}
    found = interleaved_ms(ready, 1 if dry else 4, 1, 1 if dry else 3)
    us = {name: round(ms * 1e3 / (1 if dry else INNER), 1) for name, ms in found.items()}
    flops = (2 if causal else 4) * shape[0] * shape[1] * shape[2] * shape[3] * shape[5]
    tflops = {name: round(flops / value / 1e6) for name, value in us.items() if name != "quantise"}
    log.write(what="times", shape=shape, config=config or op.HOPPER[shape[5]], us=us, tflops=tflops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--only", help="one shape")
    parser.add_argument("--quick", action="store_true", help="the first six shapes")
    sweep = "also other configurations, for the first two shapes; quantise: only of the kernel that does so"
    parser.add_argument("--sweep", nargs="?", const="all", choices=["all", "quantise"], help=sweep)
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    log = Log(flags.out)
    shapes = [tuple(map(int, flags.only.split(",")))] if flags.only else SHAPES[: QUICK if flags.quick else None]
    steps: list[tuple[Any, ...]] = [(shape, config) for shape in shapes for config in ("accuracy", None)]
    sweeps = (QUANTISE_SWEEP, SWEEP) if flags.sweep == "all" else (QUANTISE_SWEEP,) if flags.sweep else ()
    steps += [(shape, config) for of in sweeps for shape in shapes[:2] for config in of.get(shape[5], ())]
    for shape, config in steps:
        size = (1, 70, 70, 2, 2 if shape[3] == shape[4] else 1, *shape[5:]) if flags.dry else shape
        try:
            if config == "accuracy":
                accuracy(size, "cpu" if flags.dry else "cuda", log)
            elif type(config) is tuple:
                quantise_times(size, config, flags.dry, log)
            else:
                times(size, config, flags.dry, log)
        except Exception as problem:  # does not compile, too many registers, refused by the backend
            log.write(what="failed", shape=shape, config=config, error=f"{type(problem).__name__}: {problem}"[:600])


if __name__ == "__main__":
    main()
