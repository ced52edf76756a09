"""Attention written out, by Inductor and as scaled_dot_product_attention: from which length on does the rewrite pay?

    python benchmarks/bench_written_out_attention.py --out results.jsonl [--device cpu] [--only causal,512,64]

Both sides are compiled by Inductor, the second after `written_out_attention` and `causal_mask`; they take turns.
Forward times on CUDA are medians of CUDA graphs, so without launches; training is forward and backward with launches.
The thresholds in `patterns/written_out_attention.py` (MIN_QUERIES) come from here: the least length from which on no
case is slower. `--dry` proves the script on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Log, captured, error, interleaved_ms
from torch import Tensor

import torch_fuse

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS, HEADS = {"cuda": 8192, "cpu": 1024}, {"cuda": 16, "cpu": 4}
OPTIONS = {"only": ["written_out_attention", "causal_mask"], "kernels": "reference", "on_error": "raise"}
Case = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device)
    mask = torch.where(i[None, :] <= i[:, None], 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + mask
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).flatten(2)


def bias(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + b
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).flatten(2)


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~keep[:, None, None], -math.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2).flatten(2)


CASES: dict[str, Case] = {"plain": plain, "causal": causal, "bias": bias, "padding": padding}


def inputs(name: str, length: int, queries: int, dim: int, device: str, grad: bool, dry: bool) -> list[Tensor]:
    batch, heads = (1, 2) if dry else (max(1, min(64, TOKENS[device] // length)), HEADS[device])
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    tensors = [torch.randn(batch, n, heads, dim, **made).transpose(1, 2) for n in (queries, length, length)]
    tensors = [x.detach().requires_grad_(grad) for x in tensors]
    if name == "bias":
        tensors.append(
            torch.randn(1, heads, queries, length, **made).requires_grad_()
        )  # learned, also when it is only read
    if name == "padding":
        tensors.append(torch.arange(length, device=device) < torch.randint(1, length, (batch, 1), device=device))
    return tensors


def step(model: Case, tensors: list[Tensor], grad: bool) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.set_grad_enabled(grad):
            out = model(*tensors)
        if grad:
            torch.autograd.grad(out, [x for x in tensors if x.requires_grad], torch.ones_like(out))
        return out.detach()

    return run


def measure(name: str, length: int, queries: int, dim: int, grad: bool, flags: argparse.Namespace, log: Log) -> None:
    device = "cpu" if flags.dry else flags.device
    tensors = inputs(name, length, queries, dim, device, grad, flags.dry)
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    calls = {
        "inductor": step(torch.compile(CASES[name]), tensors, grad),
        "fuse": step(torch.compile(CASES[name], backend="fuse", options=OPTIONS), tensors, grad),
    }
    outputs = {backend: call() for backend, call in calls.items()}
    counts = torch_fuse.reports().counts()
    difference = error(outputs["fuse"], outputs["inductor"])
    timed = {k: captured(c, 4) for k, c in calls.items()} if device == "cuda" and not grad else calls
    ms = interleaved_ms(timed, 2 if flags.dry else 10)
    log.write(
        what="written_out", case=name, length=length, queries=queries, head_dim=dim, backward=grad, device=device,
        shape=list(tensors[0].shape), us={k: round(t * 1e3, 1) for k, t in ms.items()},
        speedup=round(ms["inductor"] / ms["fuse"], 3), fused=counts.get("written_out_attention"), **difference,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", help="one shape: case,length,head_dim")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of self-attention, head dim 64")
    parser.add_argument("--seconds", type=float, default=480.0, help="start no measurement after this long")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    log, start = Log(flags.out), time.perf_counter()
    shapes = [(name, n, n, 64) for n in flags.lengths for name in CASES]
    shapes += [(name, n, 1, 128) for n in (512, 4096) for name in ("plain", "bias")]  # one token at a time
    shapes += [(name, n, n, 128) for n in LENGTHS[::2] for name in CASES]
    if flags.only:
        name, length, dim = flags.only.split(",")
        shapes = [(name, int(length), int(length), int(dim))]
    if flags.dry:
        shapes = [(name, 16, 16, 8) for name in CASES]
    for name, length, queries, dim in shapes:
        for grad in (False, True):
            if time.perf_counter() - start > flags.seconds:
                return
            if not (grad and queries == 1):
                measure(name, length, queries, dim, grad, flags, log)


if __name__ == "__main__":
    main()
