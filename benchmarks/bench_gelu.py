"""The op gelu against Inductor's code for F.gelu and the floor of the bytes: MLPs of Pythia and Wan.

    python benchmarks/bench_gelu.py --out results.jsonl [--sweep] [--only pythia-2.8b]

Correct first (against float64), then the median of CUDA graphs of calls over inputs that do not fit L2 together. The
floor is the bytes read and written at 4.29 TB/s (an H200's copy). `--dry` proves the script on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms

module = importlib.import_module("torch_fuse.kernels.gelu")

BANDWIDTH, L2 = 4.29e12, 60 * 2**20
# shape, flavour, with backward; bf16
GEOMETRIES: dict[str, tuple[tuple[int, ...], str, bool]] = {
    "pythia-2.8b": ((1, 2048, 10240), "none", False),
    "wan-32760": ((1, 32760, 8960), "tanh", False),
    "wan-7800": ((1, 7800, 8960), "tanh", False),
    "wan-1560": ((1, 1560, 8960), "tanh", False),
    "pythia-1.4b-train": ((4, 1024, 8192), "none", True),
}
Op = Callable[[torch.Tensor, str], torch.Tensor]


def unfused(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


def step(op: Op, x: torch.Tensor, grad: torch.Tensor, approximate: str, train: bool) -> Callable[[], list[Any]]:
    if not train:
        return lambda: [op(x, approximate)]
    x = x.detach().requires_grad_()

    def both() -> list[Any]:
        y = op(x, approximate)
        return [y.detach(), *torch.autograd.grad(y, x, grad)]

    return both


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All of several calls, whose inputs do not fit L2 together; on a GPU, as a CUDA graph."""
    return captured(lambda: [call() for call in calls]) if torch.cuda.is_available() else lambda: calls[0]()


def measure(log: Log, name: str, ops: dict[str, Op], dry: bool, **fields: Any) -> None:
    shape, approximate, train = GEOMETRIES[name]
    shape = (1, 5, 96) if dry else shape
    options = {"dtype": torch.bfloat16, "device": "cpu" if dry else "cuda"}
    bytes_moved = torch.Size(shape).numel() * 2 * (5 if train else 2)
    torch.manual_seed(0)
    copies = 1 if dry else 3 * L2 // bytes_moved + 2
    pairs = [(torch.randn(shape, **options), torch.randn(shape, **options)) for _ in range(copies)]
    part = slice(0, 4096)  # of each row, in float64
    x, grad = (t[..., part].double() for t in pairs[0])
    exact = step(unfused, x, grad, approximate, train)()
    row: dict[str, Any] = {"name": name, "floor_us": bytes_moved / BANDWIDTH * 1e6}
    calls = {}
    for label, op in ops.items():
        found = step(op, *pairs[0], approximate, train)()
        row[f"{label}_error"] = [error(a[..., part], b) for a, b in zip(found, exact, strict=True)]
        assert all(e["rms"] < 2e-3 for e in row[f"{label}_error"]), row  # NaN fails too
        calls[label] = in_turn([step(op, *pair, approximate, train) for pair in pairs])
    times = interleaved_ms(calls, 1 if dry else 50)
    log.write(**row, **{f"{label}_us": ms * 1e3 / len(pairs) for label, ms in times.items()}, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", choices=GEOMETRIES)
    for flag, text in (("--sweep", "also try other blocks and warps"), ("--dry", "tiny, on the CPU: measures nothing")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log, chosen = Log(given.out), (module.BLOCK, module.NUM_WARPS)
    sizes = list(itertools.product((1024, 2048, 4096, 8192), (2, 4, 8))) if given.sweep else []
    for name in [given.only] if given.only else GEOMETRIES:
        torch._dynamo.reset()
        for block, warps in (chosen, *(pair for pair in sizes if pair != chosen)):
            module.BLOCK, module.NUM_WARPS = block, warps
            ops: dict[str, Op] = {"op": torch.ops.torch_fuse.gelu}
            if (block, warps) == chosen:
                ops["inductor"] = torch.compile(unfused, dynamic=False)
            measure(log, name, ops, given.dry, block=block, warps=warps)
        module.BLOCK, module.NUM_WARPS = chosen


if __name__ == "__main__":
    main()
