"""masked_attention against SDPA with the dense mask under torch.compile: error first, then milliseconds a call.

    python benchmarks/bench_masked_attention.py --out results.jsonl [--sweep] [--only window]

bf16, forward, and forward + backward. The dense mask is built in the graph, as transformers builds it, and SDPA may
take any backend; `sdpa_dense_*` forces one. `unmasked_causal` (is_causal, no padding) says what the mask costs: it is
another result. Times are medians of interleaved runs. `--sweep` tries tiles. `--dry` is tiny, on a CPU.
"""

import argparse
import importlib
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Log, error, interleaved_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

op = importlib.import_module("torch_fuse.kernels.masked_attention")
Config = op.Config

# batch, length, heads, kv_heads, head_dim, left, right, padded
CASES: dict[str, tuple[int, int, int, int, int, int | None, int | None, bool]] = {
    "causal_padded_64": (4, 2048, 32, 32, 64, None, 0, True),
    "causal_padded_80": (4, 2048, 32, 32, 80, None, 0, True),
    "causal_padded_128": (4, 2048, 32, 32, 128, None, 0, True),
    "window_1024": (1, 8192, 32, 8, 128, 1023, 0, False),
    "bert_padded": (32, 512, 12, 12, 64, None, None, True),
    "causal_padded_256": (2, 2048, 16, 8, 256, None, 0, True),
}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
FORWARD = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
           (128, 128, 8, 2), (64, 128, 4, 2), (128, 32, 4, 3), (64, 32, 4, 3)]  # fmt: skip
BACKWARD = [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2),
            (32, 64, 4, 2), (128, 128, 8, 1), (64, 64, 8, 3), (32, 128, 4, 2)]  # fmt: skip


def make(case: tuple[Any, ...], device: str) -> tuple[list[Tensor], Tensor | None, Tensor]:
    batch, length, heads, kv, dim, _, _, padded = case
    options: Any = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float16}
    shapes = ((heads, length), (kv, length), (kv, length))
    tensors = [torch.randn(batch, s, h, dim, **options).transpose(1, 2).requires_grad_() for h, s in shapes]
    grad = torch.randn(batch, length, heads, dim, **options).transpose(1, 2)
    if not padded:
        return tensors, None, grad
    lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=torch.Generator().manual_seed(0))
    return tensors, (torch.arange(length) < lengths).long().to(device), grad


def dense(q: Tensor, tokens: Tensor | None, left: int | None, right: int | None) -> Tensor:
    """The mask as transformers builds it."""
    i = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
    j = torch.arange(q.shape[2], device=q.device)[None, None, None, :]
    keep = i >= 0
    if left is not None:
        keep = keep & (j > i - left - 1)
    if right is not None:
        keep = keep & (j <= i + right)
    if tokens is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        keep = keep & tokens.to(torch.bool)[batch, j]
    return keep.expand(q.shape[0], -1, q.shape[2], q.shape[2])


def sdpa(left: int | None, right: int | None, backend: SDPBackend | None) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> Tensor:
        mask = dense(q, tokens, left, right)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def forced(*args: Any) -> Tensor:
        with sdpa_kernel(backend):  # type: ignore[arg-type]
            return compiled(*args)

    compiled = torch.compile(attend, dynamic=False)
    return compiled if backend is None else forced


def ours(left: int | None, right: int | None, compiled: bool = True) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> Tensor:
        keep = None if tokens is None else tokens.to(torch.bool)
        ranges = None if keep is None else op.key_range(keep)
        return op.masked_attention(q, k, v, keep, ranges, left, right, q.shape[3] ** -0.5)[0]

    return torch.compile(attend, dynamic=False) if compiled else attend


def causal(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None) -> Tensor:
    """No padding and no window: how fast attention could be."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def exact(tensors: list[Tensor], tokens: Tensor | None, grad: Tensor, left: Any, right: Any) -> list[Tensor]:
    """Result and gradients of the first batch and its first key head, in float64."""
    q, k, v = tensors
    group = q.shape[1] // k.shape[1]
    leaves = [x[:1, :n].detach().double().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    mask = dense(q[:1], None if tokens is None else tokens[:1], left, right)
    scores = (leaves[0] @ leaves[1].mT * q.shape[3] ** -0.5).masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = weights @ leaves[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad[:1, :group].double())]


def results(call: Callable[..., Tensor], tensors: list[Tensor], tokens: Tensor | None, grad: Tensor) -> list[Tensor]:
    out = call(*tensors, tokens)
    group = tensors[0].shape[1] // tensors[1].shape[1]
    found = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    return [x[:1, :n] for x, n in zip(found, (group, group, 1, 1), strict=True)]


def both(call: Callable[..., Tensor], tensors: list[Tensor], tokens: Tensor | None, grad: Tensor) -> None:
    torch.autograd.grad(call(*tensors, tokens), tensors, grad)


def check(name: str, case: tuple[Any, ...], calls: dict[str, Any], data: Any, log: Log) -> dict[str, Any]:
    """The calls that run and are right: at most twice the error of SDPA with the dense mask."""
    wanted, right, floor = exact(*data, *case[5:7]), {}, None
    for label, call in calls.items():
        try:
            found = results(call, *data)
            if label == "unmasked_causal":
                right[label] = call
                continue
            errors = [error(a, b) for a, b in zip(found, wanted, strict=True)]
            floor = floor or errors
            good = all(a[m] <= 2 * b[m] + 1e-3 for a, b in zip(errors, floor, strict=True) for m in a)
            log.write(what="error" if good else "WRONG", case=name, name=label, errors=errors)
            if good:
                right[label] = call
        except Exception as problem:  # refused by the backend, does not compile, too much shared memory
            log.write(what="failed", case=name, name=label, error=f"{type(problem).__name__}: {problem}"[:300])
    return right


def measure(name: str, case: tuple[Any, ...], dry: bool, log: Log) -> None:
    left, right = case[5:7]
    data = make(case, "cpu" if dry else "cuda")
    tensors, tokens, _ = data
    calls: dict[str, Any] = {"sdpa_dense": sdpa(left, right, None), "masked_attention": ours(left, right)}
    if not dry:
        calls |= {f"sdpa_dense_{b}": sdpa(left, right, backend) for b, backend in BACKENDS.items()}
        calls["unmasked_causal"] = torch.compile(causal, dynamic=False)
    calls = check(name, case, calls, data, log)
    reps = 2 if dry else 8
    with torch.no_grad():
        forward = interleaved_ms({n: lambda c=c: c(*tensors, tokens) for n, c in calls.items()}, reps)
    total = interleaved_ms({n: lambda c=c: both(c, *data) for n, c in calls.items()}, reps)
    for n in calls:
        log.write(what="masked_attention", case=name, shape=case, name=n, forward_ms=forward[n], both_ms=total[n])


def sweep(name: str, case: tuple[Any, ...], dry: bool, log: Log) -> None:
    """Tiles of the forward kernel, then of each backward kernel with the best of the others."""
    tensors, tokens, _ = data = make(case, "cpu" if dry else "cuda")
    dim, best = case[4], list(op.CONFIGS[case[4]])
    call = ours(*case[5:7], compiled=False)
    wanted, reps = exact(*data, *case[5:7]), 1 if dry else 8
    for part, tiles in enumerate((FORWARD, BACKWARD, BACKWARD)):
        times = {}
        for config in dict.fromkeys([best[part], *(Config(*tile) for tile in tiles)][: 2 if dry else None]):
            tried = [config if i == part else c for i, c in enumerate(best)]
            with patch.dict(op.CONFIGS, {dim: tuple(tried)}):
                try:
                    errors = [error(a, b) for a, b in zip(results(call, *data), wanted, strict=True)]
                    if not all(e["max"] <= 0.1 for e in errors):
                        log.write(what="WRONG", case=name, part=part, config=config, errors=errors)
                        continue
                    run = (lambda: call(*tensors, tokens)) if part == 0 else (lambda: both(call, *data))
                    with torch.set_grad_enabled(part > 0):
                        times[config] = interleaved_ms({"": run}, reps)[""]
                    log.write(what="sweep", case=name, part=part, config=config, ms=times[config])
                except Exception as problem:
                    log.write(what="failed", case=name, part=part, config=config, error=str(problem)[:200])
        best[part] = min(times, key=times.__getitem__, default=best[part])
    log.write(what="best", case=name, configs=best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--sweep", action="store_true", help="try other tiles instead")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    log = Log(flags.out)
    for name, case in CASES.items():
        if flags.only and flags.only not in name:
            continue
        if flags.dry:
            case = (2, 96, 2, 1 if case[2] != case[3] else 2, case[4], case[5] and 20, *case[6:])
        torch._dynamo.reset()
        (sweep if flags.sweep else measure)(name, case, flags.dry, log)


if __name__ == "__main__":
    main()
