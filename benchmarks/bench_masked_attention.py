"""masked_attention against SDPA with the dense mask under torch.compile: error first, then milliseconds a call.

    python benchmarks/bench_masked_attention.py --out results.jsonl [--sweep] [--only window]

bf16, forward, and forward + backward. The dense mask is built in the graph, as transformers builds it, and SDPA may
take any backend; `sdpa_dense_*` forces one. `unmasked_causal` (is_causal, no padding) says what the mask costs: it is
another result. Times are medians of interleaved runs. `--sweep` tries tiles. `--dry` is tiny, on a CPU.

Cases with a soft cap or sinks are compared with their eager spelling (transformers' Gemma 2 and gpt-oss) under
torch.compile, by Inductor (`written_out`) and with this package (`fuse`); `masked_attention` is the op alone,
`without_cap_and_sinks` says what they cost it.
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
from masked_attention_cases import CASES, Case, Data, dense, make, written
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_fuse

op = importlib.import_module("torch_fuse.kernels.masked_attention")
Config = op.Config


BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
FORWARD = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
           (128, 128, 8, 2), (64, 128, 4, 2), (128, 32, 4, 3), (64, 32, 4, 3)]  # fmt: skip
BACKWARD = [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2),
            (32, 64, 4, 2), (128, 128, 8, 1), (64, 64, 8, 3), (32, 128, 4, 2), (32, 64, 8, 2), (32, 32, 4, 2),
            (64, 32, 8, 2), (32, 32, 8, 2)]  # fmt: skip


def sdpa(case: Case, backend: SDPBackend | None) -> Callable[..., Tensor]:
    def attend(tensors: list[Tensor], tokens: Tensor | None) -> Tensor:
        q, k, v = tensors
        mask = dense(q, tokens, case.left, case.right)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def forced(*args: Any) -> Tensor:
        with sdpa_kernel(backend):  # type: ignore[arg-type]
            return compiled(*args)

    compiled = torch.compile(attend, dynamic=False)
    return compiled if backend is None else forced


def ours(case: Case, compiled: bool = True) -> Callable[..., Tensor]:
    def attend(tensors: list[Tensor], tokens: Tensor | None) -> Tensor:
        q, k, v, *sinks = tensors
        sink = sinks[0] if sinks and case.sinks else None
        keep = None if tokens is None else tokens.to(torch.bool)
        ranges = None if keep is None else op.key_range(keep)
        scale = q.shape[3] ** -0.5
        return op.masked_attention(q, k, v, keep, ranges, case.left, case.right, scale, case.softcap, sink)[0]

    return torch.compile(attend, dynamic=False) if compiled else attend


def causal(tensors: list[Tensor], tokens: Tensor | None) -> Tensor:
    """No padding and no window: how fast attention could be."""
    q, k, v = tensors
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def exact(case: Case, data: Data) -> list[Tensor]:
    """Result and gradients of the first batch and its first key head, in float64."""
    tensors, tokens, grad = data
    group = case.heads // case.kv
    leaves = [x.detach().double().requires_grad_() for x in first(tensors, group)]
    q, k, v, *sinks = leaves
    mask = dense(q, None if tokens is None else tokens[:1], case.left, case.right)
    scores = q @ k.mT * q.shape[3] ** -0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks:
        scores = torch.cat((scores, sinks[0][None, :, None, None].expand(*scores.shape[:3], 1)), -1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = weights @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, grad[:1, :group].double())]


def first(tensors: list[Tensor], group: int) -> list[Tensor]:
    """The parts of q, k, v and sinks, or of their gradients, of the first batch and key head."""
    return [x[:group] if x.dim() == 1 else x[:1, :n] for x, n in zip(tensors, (group, 1, 1, group), strict=False)]


def results(call: Callable[..., Tensor], case: Case, data: Data) -> list[Tensor]:
    tensors, tokens, grad = data
    out, group = call(tensors, tokens), case.heads // case.kv
    gradients = torch.autograd.grad(out, tensors, grad, allow_unused=True)
    return [out.detach()[:1, :group], *first([torch.zeros(0) if g is None else g for g in gradients], group)]


def both(call: Callable[..., Tensor], data: Data) -> None:
    tensors, tokens, grad = data
    torch.autograd.grad(call(tensors, tokens), tensors, grad, allow_unused=True)


# Other results, to compare times with.
OTHER = ("unmasked_causal", "without_cap_and_sinks")


def check(name: str, case: Case, calls: dict[str, Any], data: Data, log: Log) -> dict[str, Any]:
    """The calls that run and are right: at most twice the error of the first, which torch.compile makes."""
    wanted, right, floor = exact(case, data), {}, None
    for label, call in calls.items():
        try:
            found = results(call, case, data)
            if label in OTHER:
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


def candidates(case: Case, dry: bool) -> dict[str, Any]:
    """What is compared; the first says how large an error may be."""
    if case.written:
        options = {"kernels": "reference" if dry else "auto", "on_error": "raise"}
        plain = case._replace(softcap=0.0, sinks=False)
        return {
            "written_out": written(case), "fuse": written(case, backend="fuse", options=options),
            "masked_attention": ours(case), "without_cap_and_sinks": ours(plain),
        }  # fmt: skip
    calls: dict[str, Any] = {"sdpa_dense": sdpa(case, None), "masked_attention": ours(case)}
    if not dry:
        calls |= {f"sdpa_dense_{b}": sdpa(case, backend) for b, backend in BACKENDS.items()}
        calls["unmasked_causal"] = torch.compile(causal, dynamic=False)
    return calls


def measure(name: str, case: Case, dry: bool, log: Log) -> None:
    data = make(case, "cpu" if dry else "cuda")
    tensors, tokens, _ = data
    torch_fuse.reset_reports()
    calls = check(name, case, candidates(case, dry), data, log)
    if case.written:
        log.write(what="sites", case=name, sites=torch_fuse.reports().counts())
    reps = 2 if dry else 8
    with torch.no_grad():
        forward = interleaved_ms({n: lambda c=c: c(tensors, tokens) for n, c in calls.items()}, reps)
    total = interleaved_ms({n: lambda c=c: both(c, data) for n, c in calls.items()}, reps)
    for n in calls:
        log.write(what="masked_attention", case=name, shape=case, name=n, forward_ms=forward[n], both_ms=total[n])


def sweep(name: str, case: Case, dry: bool, log: Log) -> None:
    """Tiles of the forward kernel, then of each backward kernel with the best of the others."""
    tensors, tokens, _ = data = make(case, "cpu" if dry else "cuda")
    best = list(op.CONFIGS[case.dim])
    call = ours(case, compiled=False)
    wanted, reps = exact(case, data), 1 if dry else 8
    for part, tiles in enumerate((FORWARD, BACKWARD, BACKWARD)):
        times = {}
        for config in dict.fromkeys([best[part], *(Config(*tile) for tile in tiles)][: 2 if dry else None]):
            tried = [config if i == part else c for i, c in enumerate(best)]
            with patch.dict(op.CONFIGS, {case.dim: tuple(tried)}):
                try:
                    found = [error(a, b) for a, b in zip(results(call, case, data)[:4], wanted, strict=False)]
                    if not all(e["max"] <= 0.1 for e in found):
                        log.write(what="WRONG", case=name, part=part, config=config, errors=found)
                        continue
                    run = (lambda: call(tensors, tokens)) if part == 0 else (lambda: both(call, data))
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
            kv = 1 if case.heads != case.kv else 2
            case = case._replace(batch=2, length=96, heads=2, kv=kv, left=case.left and 20)
        torch._dynamo.reset()
        (sweep if flags.sweep else measure)(name, case, flags.dry, log)


if __name__ == "__main__":
    main()
