"""Attention's backward pass: ours for Hopper, Triton's two kernels, and PyTorch's backends, by shape and configuration.

    python benchmarks/bench_attention_backward.py --out results.jsonl [--only 16x12x2048x64] [--sweep]

bf16, in CUDA graphs that take turns. The gradients are checked first, against float64 over as many heads as take a
moment. TFLOP/s count five products (2.5 times the forward pass), whatever a kernel multiplies. `--dry` proves the
script on a CPU, at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, interleaved_ms
from torch import Tensor

hopper = importlib.import_module("torch_fuse.kernels._hopper_flash_backward")
flash = importlib.import_module("torch_fuse.kernels._flash_backward")
masked = importlib.import_module("torch_fuse.kernels.masked_attention")
Config = hopper.Config

# batch, heads, heads of keys, length, head dim, causal
SHAPES = {
    "16x12x2048x64": (16, 12, 12, 2048, 64, False),
    "4x32x2048x64_causal": (4, 32, 32, 2048, 64, True),
    "4x16x1024x128_causal": (4, 16, 16, 1024, 128, True),
    "8x8x512x64": (8, 8, 8, 512, 64, False),
    "32x12x512x64": (32, 12, 12, 512, 64, False),
    "1x32_8x4096x128_causal": (1, 32, 8, 4096, 128, True),
    "1x12x7800x128": (1, 12, 12, 7800, 128, False),
    "4x4x128x64": (4, 4, 4, 128, 64, False),
    "8x12x1024x64": (8, 12, 12, 1024, 64, False),
}
KEYS = {
    64: [Config(), Config(stages=3), Config(programs=1), Config(rows=64, early=False), Config(stages=4, programs=1)],
    128: [Config(rows=32), Config(rows=32, early=False), Config(early=False), Config(rows=32, stages=3)],
}
QUERIES = {
    64: [
        Config(),
        Config(rows=128, early=False),
        Config(stages=3),
        Config(programs=1),
        Config(groups=3, registers=160),
    ],
    128: [Config(), Config(early=False), Config(stages=3), Config(programs=1)],
}


def operands(name: str, dry: bool) -> tuple[list[Tensor], bool]:
    """q, k, v and the gradient of the result; [B, S, H, D] in memory."""
    batch, heads, kv, length, dim, causal = (2, 2, 2, 70, 64, True) if dry else SHAPES[name]
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    return [torch.randn(batch, length, h, dim, device=device, dtype=dtype).transpose(1, 2)
            for h in (heads, kv, kv, heads)], causal  # fmt: skip


def exact(tensors: list[Tensor], causal: bool, heads: int) -> list[Tensor]:
    """Gradients in float64 of the first batch's first heads of keys."""
    q, k, v, grad = tensors
    group = q.shape[1] // k.shape[1]
    wide = [x[:1, : n * heads].detach().double().requires_grad_() for x, n in ((q, group), (k, 1), (v, 1))]
    key, value = (x.repeat_interleave(group, 1) for x in wide[1:])
    scores = wide[0] @ key.mT * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    return list(torch.autograd.grad(scores.softmax(-1) @ value, wide, grad[:1, : group * heads].double()))


def ways(tensors: list[Tensor], causal: bool, dry: bool) -> dict[str, Callable[[], Any]]:
    """The backward pass alone, by backend; called as autograd does, whose own calls a graph cannot capture here."""
    q, k, v, grad = tensors
    aten = torch.ops.aten
    if dry:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        result = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        return {"math": lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)}
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))

    def summed(grads: Any) -> list[Tensor]:
        return [grads[0], *(x if group == 1 else x.unflatten(1, (-1, group)).sum(2) for x in grads[1:3])]

    out, lse, *c, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    f_out, f_lse, *f, f_seed, f_offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return {
        "cudnn": lambda: summed(aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, *c, 0.0, causal)),
        "flash": lambda: summed(aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, f_out, f_lse, *f, 0.0, causal, f_seed, f_offset)),
    }  # fmt: skip


def ours(tensors: list[Tensor], causal: bool, keys: Any, queries: Any) -> Callable[[], list[Tensor]]:
    """What the op's backward pass does: the sums of out * grad, then both kernels."""
    q, k, v, grad = tensors
    scale = q.shape[3] ** -0.5
    with torch.no_grad():
        out, lse = masked.masked_attention(q, k, v, None, None, None, 0 if causal else None, scale)

    def run() -> list[Tensor]:
        delta = (out.float() * grad.float()).sum(-1)
        if keys is None:  # Triton's
            band = masked.Band(right=0 if causal else None)
            _, key_config, query_config = masked.CONFIGS[q.shape[3]]
            grads = flash.backward(grad, q, k, v, lse, delta, None, None, band, scale, key_config, query_config)
        else:
            grads = hopper.gradients(grad, q, k, v, lse, delta, causal, scale, keys, queries)
        return [x.transpose(1, 2) for x in grads]

    return run


def measure(log: Log, name: str, dry: bool, sweep: bool) -> None:
    tensors, causal = operands(name, dry)
    batch, heads, _, length, dim, _ = SHAPES[name]
    few = max(1, min(tensors[1].shape[1], 2**27 // tensors[0].shape[2] ** 2 * tensors[1].shape[1] // heads))
    wanted = exact(tensors, causal, few)
    size = [float(x.square().mean().sqrt()) for x in wanted]

    def rms(grads: Any) -> list[float]:
        cut = [x[:1, : w.shape[1]].double() - w for x, w in zip(grads, wanted, strict=True)]
        return [float(f"{float(e.square().mean().sqrt()) / s:.3g}") for e, s in zip(cut, size, strict=True)]

    turns = ways(tensors, causal, dry)
    bound = rms(next(iter(turns.values()))())
    row: dict[str, Any] = {"what": "backward", "name": name, "errors": bound}
    variants: dict[str, tuple[Any, Any]] = {"triton": (None, None)}
    if not dry:
        variants["ours"] = (KEYS[dim][0], QUERIES[dim][0])
        if sweep:
            variants |= {f"keys {tuple(c)}": (c, QUERIES[dim][0]) for c in KEYS[dim][1:]}
            variants |= {f"queries {tuple(c)}": (KEYS[dim][0], c) for c in QUERIES[dim][1:]}
    for label, (keys, queries) in variants.items():
        try:
            call = ours(tensors, causal, keys, queries)
            found = rms(call())
            assert all(a <= 1.5 * b + 1e-6 for a, b in zip(found, bound, strict=True)), f"wrong: {found}, not {bound}"
            turns[label] = call
        except Exception as failure:  # out of resources, or wrong: said, and not timed
            row[f"{label}_failed"] = f"{type(failure).__name__}: {failure}"[:300]
    if not dry:
        turns = {label: captured(call) for label, call in turns.items()}
    times = interleaved_ms(turns, 1 if dry else 8, 2, 1 if dry else 3)
    flops = 10 * batch * heads * length**2 * dim / (2 if causal else 1)
    log.write(**row, us={label: round(ms * 1e3, 1) for label, ms in times.items()},
              tflops={label: round(flops / ms / 1e9) for label, ms in times.items()})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sweep", action="store_true", help="other configurations too")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: measures nothing")
    given = parser.parse_args()
    log = Log(given.out)
    for name in given.only:
        measure(log, name, given.dry, given.sweep)


if __name__ == "__main__":
    main()
