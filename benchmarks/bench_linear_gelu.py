"""A linear layer and its tanh GELU: in the product's epilogue, with a GELU of its own, and as Inductor compiles it.

    python benchmarks/bench_linear_gelu.py --out results.jsonl [--only wan-7800] [--dtype float16]

`op` is torch_fuse::linear_gelu, `apart` addmm and torch_fuse::gelu, `inductor` torch.compile of F.linear and F.gelu.
Names that end in erf have the erf GELU, torch_fuse::linear_gelu_erf and `product`, F.linear alone. Errors are against
float64, times the median of CUDA graphs of calls over operands that do not fit L2 together; `calls` are one by one,
without a graph. The prediction is the bytes of the value before the GELU, written and read at 4.29 TB/s (an H200's
copy). `--dry` proves the script on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms, kernels
from torch import Tensor

gelu = importlib.import_module("torch_fuse.kernels.gelu")
linear_gelu = importlib.import_module("torch_fuse.kernels.linear_gelu")
importlib.import_module("torch_fuse.kernels.linear_gelu_erf")

BANDWIDTH, L2 = 4.29e12, 60 * 2**20
# rows, K, N, weight stored with K first
GEOMETRIES: dict[str, tuple[int, int, int, bool]] = {
    "wan-1.3b-1560": (1560, 1536, 8960, False),
    "wan-1.3b-7800": (7800, 1536, 8960, False),
    "wan-1.3b-32760": (32760, 1536, 8960, False),
    "bert-16384": (16384, 768, 3072, False),
    "gpt2-xl-2048": (2048, 1600, 6400, True),
    "phi-2-2048": (2048, 2560, 10240, False),
    "gpt-j-2048": (2048, 4096, 16384, False),
    "flux-4096": (4096, 3072, 12288, False),
    "phi-2-256": (256, 2560, 10240, False),
    "phi-2-64": (64, 2560, 10240, False),
    "phi-2-8": (8, 2560, 10240, False),
    "pythia-2.8b-2048-erf": (2048, 2560, 10240, False),
    "bert-16384-erf": (16384, 768, 3072, False),
}
Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def unfused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.torch_fuse.gelu(F.linear(x, weight, bias), "tanh")


def unfused_erf(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def apart_erf(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.torch_fuse.gelu(F.linear(x, weight, bias), "none")


def fused_erf(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.torch_fuse.linear_gelu_erf(x, weight, bias, False)[0]


def operands(name: str, dtype: torch.dtype, dry: bool) -> list[Tensor]:
    """x [1, rows, K], weight [N, K], bias [N]; results of about the size of a trained model's."""
    rows, k, n, transposed = GEOMETRIES[name]
    rows, k, n = (7, 32, 48) if dry else (rows, k, n)
    given: dict[str, Any] = {"dtype": dtype, "device": "cpu" if dry else "cuda"}
    weight = torch.randn(k, n, **given).t() if transposed else torch.randn(n, k, **given)
    return [torch.randn(1, rows, k, **given), weight.mul_(k**-0.5), torch.randn(n, **given)]


def measure(log: Log, name: str, dtype: torch.dtype, dry: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = operands(name, dtype, dry)
    moved = 2 * x.shape[1] * weight.shape[0] * x.element_size()
    sets = 1 if dry else L2 // sum(t.nbytes for t in (x, weight)) + 2
    given = [(x, weight, bias), *(operands(name, dtype, dry) for _ in range(sets - 1))]
    part = slice(0, 2048)  # of the rows, in float64
    erf = name.endswith("erf")
    whole = unfused_erf if erf else unfused
    exact = whole(*(t.double() for t in (x[:, part], weight, bias)))
    torch._dynamo.reset()
    ops: dict[str, Op] = {"op": fused_erf if erf else torch.ops.torch_fuse.linear_gelu,
                          "apart": apart_erf if erf else apart,
                          "inductor": torch.compile(whole, dynamic=False)}  # fmt: skip
    if erf:
        ops["product"] = F.linear
    row: dict[str, Any] = {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "predicted_us": moved / BANDWIDTH * 1e6,
    }
    turns: dict[str, Callable[[], Any]] = {}
    for label, op in ops.items():
        if label != "product":
            row[f"{label}_error"] = error(op(x, weight, bias)[:, part], exact)
            assert row[f"{label}_error"]["rms"] < 4e-3, row  # NaN fails too
        turns[label] = lambda op=op: [op(*each) for each in given]
        if not dry:
            row[f"{label}_kernels"] = kernels(lambda op=op: op(x, weight, bias), 4)["top"]
    if not dry:
        graphs = {label: captured(turn) for label, turn in turns.items()}
        row |= {f"{label}_us": ms * 1e3 / sets for label, ms in interleaved_ms(graphs, 20, rest_s=0.2).items()}
    row |= {f"{label}_calls_us": ms * 1e3 / sets for label, ms in interleaved_ms(turns, 1 if dry else 20).items()}
    # The rule for numerics: at most twice the error of what it replaces.
    row["right"] = all(row["op_error"][key] <= 2 * row["inductor_error"][key] for key in ("max", "rms"))
    log.write(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: measures nothing")
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        for name in given.only:
            measure(log, name, getattr(torch, given.dtype), given.dry)


if __name__ == "__main__":
    main()
