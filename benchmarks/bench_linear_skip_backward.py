"""The gradient of linear_skip without its products: in one pass, and as Inductor computes it.

    python benchmarks/bench_linear_skip_backward.py --out results.jsonl [--only 16x2048x768] [--sweep]

From the gradient, x and the projection (bfloat16; EDM's coefficients of t for each sample): the scaled gradient, and
the gradients of bias and t. `one_pass` and `apart`, both compiled, in CUDA graphs that take turns, over operands that
do not fit L2 together; `kernel` is the pass without the sums over its parts; errors against float64. The floor is
three tensors read and one written at 4.29 TB/s (an H200's copy). `--sweep` times the kernel with other tiles.

`--dry` proves the script on a CPU at tiny sizes. A shape takes about 5 s, with the sweep 8 s.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
from bench_attention_skip import SHAPES
from common import Log, captured, error, interleaved_ms
from torch import Tensor

module = importlib.import_module("torch_fuse.kernels.linear_skip_backward")
common = importlib.import_module("torch_fuse.kernels._linear_skip_common")

BANDWIDTH, L2 = 4.29e12, 60 * 2**20
A_OF, B_OF = "rdiv:1.0 add:1.0 square x", "div x sqrt add:1.0 square x"
SPEC = common.Spec(1.0, 1.0, "sum", True, torch.bfloat16, A_OF, B_OF, True)
CONFIGS = [module.Config(*how) for how in ((8, 8, 4 * 132), (4, 4, 8 * 132), (4, 8, 4 * 132), (8, 4, 8 * 132),
                                           (16, 8, 2 * 132), (4, 4, 6 * 132), (8, 4, 3 * 132))]  # fmt: skip
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def operands(name: str, dry: bool) -> Operands:
    """The gradient, x, the projection and t."""
    batch, length, width, _ = (2, 70, 32, 2) if dry else SHAPES[name]
    device = "cpu" if dry else "cuda"
    whole = [torch.randn(batch, length, width, device=device, dtype=torch.bfloat16) for _ in range(3)]
    return whole[0], whole[1], whole[2], torch.rand(batch, 1, 1, device=device) + 0.1


def one_pass(grad: Tensor, x: Tensor, linear: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = module.gradients(grad, x, linear, t, t, SPEC, (True, True, True), torch.bfloat16)
    return found.scaled, found.bias.bfloat16(), found.a + found.b


def apart(grad: Tensor, x: Tensor, linear: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    wide = grad.to(dtype)
    scaled = wide * common.coefficient(t, 1.0, dtype, B_OF)
    into = [common.into_coefficient(wide * z.to(dtype), t, 1.0, of) for z, of in ((x, A_OF), (linear, B_OF))]
    return scaled.to(grad.dtype), scaled.sum((0, 1)).to(grad.dtype), into[0] + into[1]


def kernel_by(how: Any) -> Callable[..., Tensor]:
    """The pass alone, with a configuration."""

    def call(grad: Tensor, x: Tensor, linear: Tensor, t: Tensor) -> Tensor:
        before, module.CONFIG = module.CONFIG, how
        try:
            parts = module.parts_of(grad.shape[0], grad.shape[1], int(grad.shape[2]))
            return module.linear_skip_backward(grad, x, linear, t, 1.0, "sum", B_OF, grad.dtype, True, "all", "all",
                                               parts)[0]  # fmt: skip
        finally:
            module.CONFIG = before

    return call


def measure(log: Log, name: str, calls: dict[str, Callable[..., Any]], dry: bool) -> None:
    torch.manual_seed(0)
    first = operands(name, dry)
    many = 1 if dry else L2 // (4 * first[0].nbytes) + 2
    sets = [first, *(operands(name, dry) for _ in range(many - 1))]
    row: dict[str, Any] = {"what": "gradient", "name": name, "floor_us": 4 * first[0].nbytes / BANDWIDTH * 1e6}
    exact, bound = apart(*(z.double() for z in first)), None
    for label in ("apart", *(other for other in calls if other != "apart")):
        if label not in calls:
            continue
        found = calls[label](*first)
        found = found if isinstance(found, tuple) else (found,)
        errors = [error(a, b)["rms"] / float(b.square().mean().sqrt()) for a, b in zip(found, exact, strict=False)]
        row[f"{label}_error"] = [float(f"{e:.3g}") for e in errors]
        bound = bound or errors
        if any(not a <= 2 * b + 1e-5 for a, b in zip(errors, bound, strict=False)):  # NaN, too
            row["wrong"] = [*row.get("wrong", []), label]
    turns: dict[str, Callable[[], Any]] = {
        label: lambda call=call: [call(*each) for each in sets] for label, call in calls.items()
    }
    if not dry:
        turns = {label: captured(turn) for label, turn in turns.items()}
    times = interleaved_ms(turns, 1 if dry else 15, rest_s=0.0 if dry else 0.05)
    log.write(**row, **{f"{label}_us": ms * 1e3 / len(sets) for label, ms in times.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=["16x2048x768", "8x512x512", *list(SHAPES)[1:6]])
    for flag, text in (("--sweep", "also try other tiles"), ("--dry", "tiny, on the CPU: measures nothing")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        for name in given.only:
            torch._dynamo.reset()
            calls: dict[str, Callable[..., Any]] = {
                "apart": torch.compile(apart, dynamic=False), "one_pass": torch.compile(one_pass, dynamic=False),
                "kernel": kernel_by(module.CONFIG),
            }  # fmt: skip
            if given.sweep:
                calls |= {"x".join(map(str, how)): kernel_by(how) for how in CONFIGS}
            try:
                measure(log, name, calls, given.dry)
            except Exception as failure:  # log it, go on
                log.write(what="gradient", name=name, failed=f"{type(failure).__name__}: {failure}"[:400])
                if given.dry:
                    raise


if __name__ == "__main__":
    main()
