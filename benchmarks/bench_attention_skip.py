"""Attention, output projection and skip combination: the block under eager, Inductor and fuse, and the op alone.

    python benchmarks/bench_attention_skip.py --out results.jsonl [--only 8x1024x768] [--sweep] [--no-blocks]

The block is x [B, N, C] -> QKV -> attention -> projection -> c_skip(t) * x + c_out(t) * projection, t for each sample,
bfloat16, whose gradient is asked in the backward pass. Rows "block": forward, and forward + backward, in CUDA graphs
that take turns; errors against float64. Rows "op": torch_fuse::linear_skip next to a library product and Inductor's
combination (`apart`) and to the product alone (`product`), over operands that do not fit L2 together. The prediction
is the bytes of the two passes that are saved at 4.29 TB/s (an H200's copy), the floor the larger of bytes and FLOPs at
783 TFLOP/s. `tiled` is the op without Hopper's own kernel; `--sweep` times that kernel with each of its tiles, then the
tiled one. Rows 1,536 wide are Wan's: a gate for each lane, x in bfloat16 or float32. `--dry` proves the script on a
CPU at tiny sizes. A shape takes about 5 s, with the sweep 30 s at first, for 13 kernels to be compiled.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms, kernels
from torch import Tensor, nn

op = importlib.import_module("torch_fuse.kernels.linear_skip")
hopper = importlib.import_module("torch_fuse.kernels._hopper_gemm")

BANDWIDTH, FLOPS, L2 = 4.29e12, 783e12, 60 * 2**20
# B, N, C, heads: the table "attention -> skip-combine", and Wan 1.3B's width
SHAPES = {
    "16x2048x768": (16, 2048, 768, 12),
    "2x2048x512": (2, 2048, 512, 8),
    "8x1024x768": (8, 1024, 768, 12),
    "1x7800x1536": (1, 7800, 1536, 12),
    "4x4096x768": (4, 4096, 768, 12),
    "1x32760x1536": (1, 32760, 1536, 12),
    "1x1024x512": (1, 1024, 512, 8),
    "4x128x256": (4, 128, 256, 4),
    "4x2048x768": (4, 2048, 768, 12),
    "8x512x512": (8, 512, 512, 8),
    "1x1560x1536": (1, 1560, 1536, 12),
    "1x7800x1536-fp32": (1, 7800, 1536, 12),
}
FUSE = {"unmeasured": True}


class SkippedAttention(nn.Module):
    """c_skip(t) * x + c_out(t) * Attn(x), with EDM's coefficients."""

    def __init__(self, width: int, heads: int, sigma: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.sigma = heads, sigma

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        skip = self.sigma**2 / (t**2 + self.sigma**2)
        out = self.sigma * t / (t**2 + self.sigma**2) ** 0.5
        return (skip[:, None, None] * x + out[:, None, None] * y).to(x.dtype)


def step(
    call: Callable[..., Tensor], model: nn.Module, x: Tensor, t: Tensor, train: bool
) -> Callable[[], list[Tensor]]:
    """The result, or the result and the gradients of x, t and the weights."""
    if not train:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [call(x, t)]

        return forward
    x, t = (z.detach().requires_grad_() for z in (x, t))
    leaves = [x, t, *model.parameters()]
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(x)

    def both() -> list[Tensor]:
        out = call(x, t)
        return [out.detach(), *torch.autograd.grad(out, leaves, seed)]

    return both


def block(log: Log, name: str, train: bool, dry: bool) -> None:
    batch, length, width, heads = (2, 9, 32, 2) if dry else SHAPES[name]
    device = "cpu" if dry else "cuda"
    torch.manual_seed(0)
    model = SkippedAttention(width, heads).to(device, torch.bfloat16).requires_grad_(train)
    x = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
    t = torch.rand(batch, device=device) + 0.1
    torch._dynamo.reset()
    options = {**FUSE, "kernels": "reference"} if dry else FUSE
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": model,
        "inductor": torch.compile(model, dynamic=False),
        "fuse": torch.compile(model, backend="fuse", options=options, dynamic=False),
    }
    steps = {label: step(way, model, x, t, train) for label, way in ways.items()}
    row: dict[str, Any] = {"what": "block", "name": name, "pass": "forward + backward" if train else "forward"}
    exact = None
    if batch * heads * length**2 <= 2**30:  # the float64 attention is written out
        wide = copy.deepcopy(model).double()
        exact = step(wide, wide, x.double(), t.double(), train)()
    for label, call in steps.items():
        found = call()
        assert all(bool(z.isfinite().all()) for z in found), (row, label)
        if exact is not None:
            errors = [error(a, b)["rms"] / float(b.square().mean().sqrt()) for a, b in zip(found, exact, strict=True)]
            row[f"{label}_error"] = [float(f"{e:.2g}") for e in errors]
    if exact is not None:
        row["right"] = all(a <= 2 * b + 1e-5 for a, b in zip(row["fuse_error"], row["eager_error"], strict=True))
    del exact

    from torch_fuse import reports, reset_reports

    row["report"] = sorted({f"{site.status}: {site.reason}" for site in reports().sites if site.kind == "combine"})
    reset_reports()
    if not dry:
        row |= {f"{label}_kernels": kernels(call, 6) for label, call in steps.items() if label != "eager"}
        steps = {label: captured(call, 4) for label, call in steps.items()}
    inner = 1 if dry else 4
    times = interleaved_ms(steps, 1 if dry else 20, rest_s=0.0 if dry else 0.1)
    log.write(**row, **{f"{label}_us": ms * 1e3 / inner for label, ms in times.items()})


# -- the op alone ------------------------------------------------------------------------------------------------------

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def operands(name: str, dry: bool) -> Operands:
    """y, weight, bias, x, c_skip, c_out."""
    batch, length, width, _ = (2, 9, 32, 2) if dry else SHAPES[name]
    given: dict[str, Any] = {"device": "cpu" if dry else "cuda", "dtype": torch.bfloat16}
    y, x = (torch.randn(batch, length, width, **given) for _ in range(2))
    weight = torch.randn(width, width, **given) * width**-0.5
    bias = torch.randn(width, **given)
    if SHAPES[name][2] == 1536:  # a gate of Wan: for each sample and lane, in float32
        x = x.float() if name.endswith("fp32") else x
        return y, weight, bias, x, None, torch.randn(batch, 1, width, device=given["device"])
    t = torch.rand(batch, 1, 1, device=given["device"])
    return y, weight, bias, x, 1 / (t**2 + 1), t / (t**2 + 1) ** 0.5


def unfused(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, a: Tensor | None, b: Tensor) -> Tensor:
    return ((x if a is None else a * x) + b * F.linear(y, weight, bias)).to(x.dtype)


def fused(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, a: Tensor | None, b: Tensor,
          save: bool = False) -> Tensor:  # fmt: skip
    return torch.ops.torch_fuse.linear_skip(y, weight, bias, x, a, b, 1.0, 1.0, "sum", save, x.dtype)[0]


def fused_by(how: Any) -> Callable[..., Tensor]:
    """The op with a configuration of Hopper's kernel, or, False, without that kernel."""

    def call(*given: Any) -> Tensor:
        op.hopper_config = how
        try:
            return fused(*given)
        finally:
            op.hopper_config = None

    return call


def product(y: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return F.linear(y, weight, bias)


def alone(log: Log, name: str, ops: dict[str, Callable[..., Tensor]], dry: bool, **fields: Any) -> None:
    torch.manual_seed(0)
    first = operands(name, dry)
    y, weight, _, x, *_ = first
    one, many = x.nbytes, 1 if dry else L2 // (2 * y.nbytes) + 2
    sets = [first, *(operands(name, dry) for _ in range(many - 1))]
    exact = unfused(*(None if z is None else z.double() for z in first))
    bound = error(unfused(*first), exact)
    row: dict[str, Any] = {"what": "op", "name": name, **fields, "saved_us": 2 * one / BANDWIDTH * 1e6}
    flops, moved = 2 * x.numel() * weight.shape[1], y.nbytes + weight.nbytes + 2 * one
    row["floor_us"] = max(flops / FLOPS, moved / BANDWIDTH) * 1e6
    row["unfused_error"] = bound
    turns: dict[str, Callable[[], Any]] = {}
    for label, call in ops.items():
        if label != "product":
            row[f"{label}_error"] = found = error(call(*first), exact)
            assert all(found[key] <= 2 * bound[key] for key in found), row  # NaN fails too
        turns[label] = lambda call=call: [call(*each) for each in sets]
    if not dry:
        turns = {label: captured(turn) for label, turn in turns.items()}
    times = interleaved_ms(turns, 1 if dry else 20, rest_s=0.0 if dry else 0.05)
    log.write(**row, **{f"{label}_us": ms * 1e3 / len(sets) for label, ms in times.items()})


# Hopper's kernel: 2 * block_m x block_n for both groups, or, ping-pong, block_m x block_n for each.
HOPPER = [hopper.Config(64, 256, 3), hopper.Config(128, 128, 4, True), hopper.Config(64, 128, 6),
          hopper.Config(128, 128, 3), hopper.Config(64, 256, 4, True), hopper.Config(64, 128, 6, True),
          hopper.Config(64, 64, 8, True), hopper.Config(64, 256, 3, together=1)]  # fmt: skip
TILED = [(128, 128, 64, 4, 3), (64, 128, 64, 4, 4)]


def sweep(log: Log, name: str, dry: bool) -> None:
    """The op with other tiles; one that does not fit the shared memory is left out."""
    for how in HOPPER[:1] if dry else HOPPER:
        attempt(log, name, fused_by(how), dry, "hopper", how)
    chosen = op.config
    for tile, early in itertools.product(TILED, (False, True)):
        tiled = op.Config(*tile, early=early)
        op.config = lambda *_, tiled=tiled: tiled
        attempt(log, name, fused_by(False), dry, "tiled", tiled)
    op.config = chosen


def attempt(log: Log, name: str, call: Callable[..., Tensor], dry: bool, kernel: str, how: Any) -> None:
    try:
        alone(log, name, {"op": call}, dry, kernel=kernel, config=how._asdict())
    except Exception as failure:  # out of resources, or a wrong result
        reason = f"{type(failure).__name__}: {failure}"[:200]
        log.write(what="op", name=name, kernel=kernel, config=how._asdict(), failed=reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    for flag, text in (("--sweep", "also try other tiles"), ("--no-blocks", "the op alone"),
                       ("--no-op", "the blocks alone"), ("--no-training", "their forward pass only"),
                       ("--dry", "tiny, on the CPU: measures nothing")):  # fmt: skip
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    for name in given.only:
        torch._dynamo.reset()
        ops = {"op": fused, "tiled": fused_by(False), "saving": lambda *z: fused(*z, save=True),
               "product": product, "apart": torch.compile(unfused, dynamic=False)}  # fmt: skip
        with torch.no_grad():
            try:
                if not given.no_op:
                    alone(log, name, ops, given.dry, config=_config(name)._asdict())
            except Exception as failure:  # log it, go on
                log.write(what="op", name=name, failed=f"{type(failure).__name__}: {failure}"[:400])
                if given.dry:
                    raise
            if given.sweep:
                sweep(log, name, given.dry)
        for train in () if given.no_blocks else (False,) if given.no_training else (False, True):
            block(log, name, train, given.dry)


def _config(name: str) -> Any:
    batch, length, width, _ = SHAPES[name]
    wan = width == 1536
    itemsize = 4 if name.endswith("fp32") else 2
    return hopper.config(batch * length, width, itemsize, True, False, 2 if wan else 1)


if __name__ == "__main__":
    main()
