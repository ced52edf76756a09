"""torch_fuse::linear_skip alone: a projection and its combination with a skip.

    python benchmarks/bench_linear_skip.py --out results.jsonl [--only 8x1024x768] [--sweep]

Next to a library product and Inductor's combination (`apart`) and to the product alone (`product`), over operands that
do not fit L2 together. The prediction is the bytes of the two passes that are saved at 4.29 TB/s (an H200's copy), the
floor the larger of bytes and FLOPs at 783 TFLOP/s. `tiled` is the op without Hopper's own kernel; `--sweep` times that
kernel with each of its tiles, then the tiled one. Rows 1,536 wide are Wan's: a gate for each lane, x in bfloat16 or
float32. `--dry` proves the script on a CPU at tiny sizes. A shape takes about 5 s, with the sweep 30 s at first, for
16 kernels to be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention_skip import SHAPES
from common import Log, captured, error, interleaved_ms
from torch import Tensor

op = importlib.import_module("torch_fuse.kernels.linear_skip")
hopper = importlib.import_module("torch_fuse.kernels._hopper_gemm")

BANDWIDTH, FLOPS, L2 = 4.29e12, 783e12, 60 * 2**20

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
          hopper.Config(64, 64, 8, True), hopper.Config(64, 256, 3, together=1), hopper.Config(64, 128, 4, groups=3),
          hopper.Config(64, 128, 6, early=True), hopper.Config(64, 128, 4, groups=3, early=True)]  # fmt: skip
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
    for flag, text in (("--sweep", "also try other tiles"), ("--dry", "tiny, on the CPU: measures nothing")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    for name in given.only:
        torch._dynamo.reset()
        ops = {"op": fused, "tiled": fused_by(False), "saving": lambda *z: fused(*z, save=True),
               "product": product, "apart": torch.compile(unfused, dynamic=False)}  # fmt: skip
        with torch.no_grad():
            try:
                alone(log, name, ops, given.dry, config=_config(name)._asdict())
            except Exception as failure:  # log it, go on
                log.write(what="op", name=name, failed=f"{type(failure).__name__}: {failure}"[:400])
                if given.dry:
                    raise
            if given.sweep:
                sweep(log, name, given.dry)


def _config(name: str) -> Any:
    batch, length, width, _ = SHAPES[name]
    wan = width == 1536
    itemsize = 4 if name.endswith("fp32") else 2
    return hopper.config(batch * length, width, itemsize, True, False, 2 if wan else 1)


if __name__ == "__main__":
    main()
