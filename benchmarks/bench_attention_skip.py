"""The block around an attention with a skip, under eager, Inductor and fuse: times, and where they go.

    python benchmarks/bench_attention_skip.py --out results.jsonl [--only 8x1024x768] [--no-training] [--ways fuse]
    python benchmarks/bench_attention_skip.py --out results.jsonl --only-training [--ways fuse apart]
    python benchmarks/bench_attention_skip.py --out results.jsonl --profile-train

The block is x [B, N, C] -> QKV -> attention -> projection -> c_skip(t) * x + c_out(t) * projection, t for each sample,
bfloat16, whose gradient is asked in the backward pass: forward, and forward + backward, in CUDA graphs that take turns;
errors against float64. The ways: `fuse`; `late`, whose last launch begins when attention's has ended; `three`, with
three groups on a tile; `measured`, whose attention is the fastest of those timed at compile time; `given`,
whose coefficients Inductor's kernel computes before the op; forward + backward: `fuse` and `apart`, where Inductor has
the gradient of the combination. `ratio` is Inductor's time over the way's. Rows "account": the kernels of one call, by
name, with microseconds; `--profile-train` gives only them, of the forward and backward pass.

`--dry` proves the script on a CPU at tiny sizes. A shape takes about 30 s with all ways, 10 s with one;
`--profile-train` about 15 s. The op alone: `bench_linear_skip.py`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms, kernels
from torch import Tensor, nn

op = importlib.import_module("torch_fuse.kernels.linear_skip")
hopper = importlib.import_module("torch_fuse.kernels._hopper_gemm")
pattern = importlib.import_module("torch_fuse.patterns.attention_skip")

# B, N, C, heads: the table "attention -> skip-combine", and Wan 1.3B's width
SHAPES = {
    "8x512x512": (8, 512, 512, 8),
    "8x1024x768": (8, 1024, 768, 12),
    "1x1024x512": (1, 1024, 512, 8),
    "4x128x256": (4, 128, 256, 4),
    "2x2048x512": (2, 2048, 512, 8),
    "4x2048x768": (4, 2048, 768, 12),
    "16x2048x768": (16, 2048, 768, 12),
    "4x4096x768": (4, 4096, 768, 12),
    "1x7800x1536": (1, 7800, 1536, 12),
    "1x32760x1536": (1, 32760, 1536, 12),
    "1x1560x1536": (1, 1560, 1536, 12),
    "1x7800x1536-fp32": (1, 7800, 1536, 12),
}
FUSE = {"unmeasured": True}
WAYS = ("fuse", "late", "three", "measured", "given", "apart")
OF_TRAINING = ("fuse", "apart")


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


def ways_of(name: str, model: nn.Module, chosen: list[str], dry: bool) -> dict[str, Callable[..., Tensor]]:
    """The block by each way, compiled at its first call."""
    batch, length, width, _ = SHAPES[name]
    options = {**FUSE, "kernels": "reference"} if dry else FUSE

    def compiled(**more: Any) -> Callable[..., Tensor]:
        return torch.compile(model, backend="fuse", options={**options, **more}, dynamic=False)

    fuse = compiled()
    how = hopper.config(batch * length, width, 2, True, False, 1)
    three = hopper.Config(64, 128, 4, groups=3)
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": model, "inductor": torch.compile(model, dynamic=False), "fuse": fuse,
        "late": with_tiles(fuse, how._replace(early=False)), "three": with_tiles(fuse, three),
        "measured": compiled(attention="measure"),
    }  # fmt: skip
    if -(-batch * length // 192) * -(-width // 128) < 132:  # less than a tile for each multiprocessor
        ways.pop("three")
    ways["given"] = with_values(compiled(fuel=1 << 20))  # other options, or Dynamo took the other's graph
    ways["apart"] = taken_apart(compiled(fuel=1 << 21))
    return {label: way for label, way in ways.items() if label in ("eager", "inductor", *chosen)}


def with_tiles(call: Callable[..., Tensor], how: Any) -> Callable[..., Tensor]:
    """A call whose products have these tiles."""

    def tiled(*given: Tensor) -> Tensor:
        op.hopper_config = how
        try:
            return call(*given)
        finally:
            op.hopper_config = None

    return tiled


def with_values(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call that is compiled without functions of coefficients."""
    found = pattern.match_pointwise

    def without(*given: Tensor) -> Tensor:
        pattern.match_pointwise = lambda *_: None
        try:
            return call(*given)
        finally:
            pattern.match_pointwise = found

    return without


def taken_apart(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call that is compiled without the gradient in one pass."""
    found = op.why_not

    def without(*given: Tensor) -> Tensor:
        op.why_not = lambda *_: "asked"
        try:
            return call(*given)
        finally:
            op.why_not = found

    return without


def block(log: Log, name: str, train: bool, dry: bool, chosen: list[str], only_account: bool = False) -> None:
    batch, length, width, heads = (2, 9, 32, 2) if dry else SHAPES[name]
    device = "cpu" if dry else "cuda"
    torch.manual_seed(0)
    model = SkippedAttention(width, heads).to(device, torch.bfloat16).requires_grad_(train)
    x = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
    t = torch.rand(batch, device=device) + 0.1
    torch._dynamo.reset()
    row: dict[str, Any] = {"what": "block", "name": name, "pass": "forward + backward" if train else "forward"}
    steps = {}
    for label, way in ways_of(name, model, chosen, dry).items():
        if only_account and label == "eager":
            continue
        steps[label] = call = step(way, model, x, t, train)
        try:
            assert all(bool(z.isfinite().all()) for z in call()), "the result is not finite"
            if not dry and label != "eager":
                account(log, row, label, call)
        except Exception as failure:  # log it, go on without
            del steps[label]
            log.write(**{**row, "what": "account"}, way=label, failed=f"{type(failure).__name__}: {failure}"[:400])
            if dry or label in ("eager", "inductor"):
                raise
    from torch_fuse import reports, reset_reports

    kinds = ("combine", "attention")
    row["report"] = sorted({f"{site.status}: {site.reason}" for site in reports().sites if site.kind in kinds})
    reset_reports()
    if only_account:
        return
    exact = None
    if batch * heads * length**2 <= 2**30:  # the float64 attention is written out
        wide = copy.deepcopy(model).double()
        exact = step(wide, wide, x.double(), t.double(), train)()
        for label, call in steps.items():
            errors = [error(a, b)["rms"] / float(b.square().mean().sqrt()) for a, b in zip(call(), exact, strict=True)]
            row[f"{label}_error"] = [float(f"{e:.2g}") for e in errors]
        ours = [row[f"{label}_error"] for label in steps if label not in ("eager", "inductor")]
        bound = row["eager_error"]
        row["right"] = all(a <= 2 * b + 1e-5 for found in ours for a, b in zip(found, bound, strict=True))
    del exact
    if not dry:
        steps = {label: captured(call, 4) for label, call in steps.items()}
    inner = 1 if dry else 4
    times = interleaved_ms(steps, 1 if dry else 20, rest_s=0.0 if dry else 0.1)
    ratios = {label: round(times["inductor"] / ms, 4) for label, ms in times.items() if label != "inductor"}
    log.write(**row, **{f"{label}_us": ms * 1e3 / inner for label, ms in times.items()}, ratio=ratios)


def account(log: Log, row: dict[str, Any], label: str, call: Callable[[], Any]) -> None:
    """Where the time of one call goes."""
    found = kernels(call, 40)
    found["top"] = [[kernel.replace("cudnn_generated_fort_native_", "")[:56], *rest] for kernel, *rest in found["top"]]
    log.write(**{**row, "what": "account"}, way=label, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES)[:8])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="besides Inductor")
    for flag, text in (("--no-training", "their forward pass only"),
                       ("--only-training", "their forward + backward only"),
                       ("--profile-train", "nothing but the kernels of forward + backward"),
                       ("--dry", "tiny, on the CPU: measures nothing")):  # fmt: skip
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    only = given.profile_train or given.only_training
    for train in (True,) if only else (False,) if given.no_training else (False, True):
        ways = [way for way in given.ways if (way in OF_TRAINING if train else way != "apart")]
        for name in given.only:
            block(log, name, train, given.dry, ways, given.profile_train)


if __name__ == "__main__":
    main()
