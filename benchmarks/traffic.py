"""HBM traffic of the rCM block by Nsight Compute's counters, fused against Inductor, beside the formula.

    python benchmarks/traffic.py --out traffic.jsonl [--only 16x2048x768] [--ncu PATH]

The block is x [B, N, C] -> QKV -> attention -> projection -> c_skip(t) * x + c_out(t) * projection, bfloat16, forward.
For each shape a child process compiles it twice and calls each once, after three unprofiled calls, between
cudaProfilerStart and -Stop; ncu counts dram__bytes_read and dram__bytes_write of every kernel (both fit one pass, so
that nothing is replayed).

What is counted: a call that starts with a cold L2 and keeps it warm from kernel to kernel (--cache-control none). A
kernel that reads 256 MB runs before it, to evict what earlier calls left, and after it, so that what the call has
written and L2 still holds is written back and counted as its writes. Where all tensors fit L2 (60 MB on an H200),
intermediate results are never read back from HBM: then fusing saves fewer bytes than the formula says, as it should.

About 40 s a shape on an H200, most of it compiling. `--dry` runs the child on the CPU, tiny, and reads a counter file
that is made up: it proves the script and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from bench_attention_skip import SHAPES, SkippedAttention
from common import Log, error
from torch import Tensor

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
WAYS = ("inductor", "fuse")
# the largest first: the only one whose tensors do not fit L2
RCM = ("16x2048x768", "8x512x512", "4x128x256")
FLUSH = "_traffic_flush"
FLUSH_BYTES, FLUSH_BLOCK = 2**28, 2**14
COMPILE_S = 300


def formula(batch: int, length: int, width: int, fused: bool) -> dict[str, float]:
    """Megabytes that HBM moves when every kernel reads and writes its tensors once.

    In passes over a tensor like x: QKV reads 1 and writes 3, attention reads 3 and writes 1, the projection reads 1;
    then either writes 1, and the combination reads 2 and writes 1, or it reads 1 (x) and writes 1. Weights: 4 C^2.
    """
    one, weights = 2 * batch * length * width / 1e6, 2 * 4 * width**2 / 1e6
    read, written = (1 + 3 + 1 + 1, 3 + 1 + 1) if fused else (1 + 3 + 1 + 2, 3 + 1 + 1 + 1)
    return {"read_mb": read * one + weights, "write_mb": written * one, "passes": read + written}


# -- the process that is profiled --------------------------------------------------------------------------------------


def child(name: str, report: Path, dry: bool) -> None:
    """Calls the block once in each way, each between two flushes; writes what fuse did to `report`."""
    batch, length, width, heads = (2, 9, 32, 2) if dry else SHAPES[name]
    device = "cpu" if dry else "cuda"
    torch.manual_seed(0)
    model = SkippedAttention(width, heads).to(device, torch.bfloat16).requires_grad_(False)
    x = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
    t = torch.rand(batch, device=device) + 0.1
    options = {"unmeasured": True, **({"kernels": "reference"} if dry else {})}
    ways: dict[str, Callable[..., Tensor]] = {
        "inductor": torch.compile(model, dynamic=False),
        "fuse": torch.compile(model, backend="fuse", options=options, dynamic=False),
    }
    flush = (lambda: None) if dry else flusher()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), t.double())
        allowed = 2 * error(model(x, t), exact)["rms"]
        for way in WAYS:
            for _ in range(3):
                found = ways[way](x, t)
            assert error(found, exact)["rms"] <= allowed, f"{way} is wrong"  # NaN too
            if dry:
                continue
            flush()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            flush()
            ways[way](x, t)
            flush()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    from torch_fuse import reports, reset_reports

    report.write_text(json.dumps([f"{site.pattern} {site.status}: {site.reason}" for site in reports().sites]))
    reset_reports()


@triton.jit
def _traffic_flush(source, out, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    values = tl.load(source + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + program, tl.max(values, 0))


def flusher() -> Callable[[], None]:
    """A kernel, known by its name, that reads more than L2 holds and writes next to nothing."""
    count = FLUSH_BYTES // 4
    source = torch.zeros(count, device="cuda")
    out = torch.empty(count // FLUSH_BLOCK, device="cuda")

    def flush() -> None:
        _traffic_flush[(count // FLUSH_BLOCK,)](source, out, BLOCK=FLUSH_BLOCK)

    return flush


# -- what ncu says -----------------------------------------------------------------------------------------------------


def read_counters(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The kernels of ncu's CSV (with --print-units base) in the order of their launch, each with its metrics.

    Raises:
        ValueError: when there is no table, or a unit is not bytes.
    """
    table = [line for line in lines if line.startswith('"')]
    if not table:
        raise ValueError("ncu wrote no table of counters")
    kernels: dict[int, dict[str, Any]] = {}
    for row in csv.DictReader(table):
        if row["Metric Name"] not in METRICS:
            continue
        if row["Metric Unit"] not in ("byte", "bytes"):
            raise ValueError(f"{row['Metric Name']} is in {row['Metric Unit']!r}; allowed: byte")
        kernel = kernels.setdefault(int(row["ID"]), {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [kernels[number] for number in sorted(kernels)]


def traffic(kernels: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Megabytes of each way: its kernels', and what the flush behind them wrote back.

    Raises:
        ValueError: unless each way stands between two flushes.
    """
    marks = [i for i, kernel in enumerate(kernels) if FLUSH in kernel["name"]]
    if len(marks) != 2 * len(WAYS):
        raise ValueError(f"{len(marks)} flushes among {len(kernels)} kernels; allowed: {2 * len(WAYS)}")
    found = {}
    for way, first, last in zip(WAYS, marks[::2], marks[1::2], strict=True):
        own = kernels[first + 1 : last]
        behind = kernels[last][METRICS[1]]
        read, written = (sum(kernel[metric] for kernel in own) for metric in METRICS)
        found[way] = {
            "read_mb": read / 1e6,
            "write_mb": (written + behind) / 1e6,
            "kernels": [[k["name"][:60], *(round(k[m] / 1e6, 2) for m in METRICS)] for k in own],
        }
    return found


def profiled(name: str, ncu: str, report: Path, folder: Path) -> list[str]:
    """Runs the child under ncu and returns the lines of its log."""
    log = folder / f"{name}.csv"
    command = [
        ncu, "--profile-from-start", "off", "--metrics", ",".join(METRICS), "--csv", "--print-units", "base",
        "--cache-control", "none", "--clock-control", "none", "--log-file", str(log),
        sys.executable, __file__, "--child", name, "--report", str(report),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    lines = log.read_text().splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("==ERROR==")]
    if done.returncode or errors:
        raise RuntimeError("; ".join(errors) or f"exit status {done.returncode}: {done.stderr[-600:]}")
    return lines


def made_up() -> list[str]:
    """A counter file as ncu writes it, for --dry."""
    rows = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for number, kernel in enumerate([FLUSH, "gemm", "combine", FLUSH, FLUSH, "fused", FLUSH]):
        rows += [f'"{number}","{kernel}","{metric}","byte","1,000,{number}00"' for metric in METRICS]
    return ["==PROF== Connected", *rows]


def measured(log: Log, name: str, ncu: str, dry: bool) -> None:
    batch, length, width, _ = SHAPES[name]
    row: dict[str, Any] = {"what": "traffic", "name": name, "l2": "cold at the start, warm between kernels"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        if dry:
            child(name, report, dry)
            lines = made_up()
        else:
            lines = profiled(name, ncu, report, Path(folder))
        row["report"] = json.loads(report.read_text())
    for way, found in traffic(read_counters(lines)).items():
        says = formula(batch, length, width, fused=way == "fuse")
        row |= {f"{way}_{key}": value for key, value in found.items()}
        row |= {f"{way}_formula_{key}": value for key, value in says.items()}
        row[f"{way}_of_formula"] = (found["read_mb"] + found["write_mb"]) / (says["read_mb"] + says["write_mb"])
    for kind in ("", "formula_"):
        both = [row[f"{way}_{kind}read_mb"] + row[f"{way}_{kind}write_mb"] for way in ("fuse", "inductor")]
        row[f"{kind}fuse_to_inductor"] = both[0] / both[1]
    if dry:
        row["dry"] = "counters are made up"
    log.write(**row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(RCM))
    parser.add_argument("--ncu", default=shutil.which("ncu") or "/usr/local/cuda/bin/ncu", help="path of ncu")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU, without ncu: measures nothing")
    parser.add_argument("--child", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.report, given.dry)
        return 0
    log, failures = Log(given.out), 0
    for name in given.only:
        try:
            measured(log, name, given.ncu, given.dry)
        except Exception as failure:  # no permission for counters, no ncu, out of time: the next shape may do
            failures += 1
            log.write(what="traffic", name=name, failed=f"{type(failure).__name__}: {failure}"[:800])
        torch._dynamo.reset()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
