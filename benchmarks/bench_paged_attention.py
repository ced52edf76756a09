"""Attention of one token to a paged cache, by this package's op and as Inductor compiles the gather and SDPA.

    python benchmarks/bench_paged_attention.py --out results.jsonl
    python benchmarks/bench_paged_attention.py --dry        # tiny, on the CPU

Both run in CUDA graphs over several caches that do not fit L2 together, in turns; each result is compared with float64
first. Expect 15 s a case, 60 s in all.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from common import Log, captured, error, interleaved_ms

op = importlib.import_module("torch_fuse.kernels.paged_decode_attention")
# batch, keys of a sequence, heads, heads of keys, lanes, keys of a block
CASES = {
    "llama-3-8b-8x1024": (8, 1024, 32, 8, 128, 16),
    "llama-3-8b-1x4096": (1, 4096, 32, 8, 128, 16),
    "pythia-2.8b-8x512": (8, 512, 32, 32, 80, 16),
    "llama-3-8b-32x2048": (32, 2048, 32, 8, 128, 16),
}
L2 = 60 * 2**20


def case(log: Log, name: str, dry: bool, reps: int) -> None:
    """Checks and times one."""
    batch, keys, heads, kv_heads, dim, page = (2, 40, 4, 2, 16, 8) if dry else CASES[name]
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    blocks = batch * keys // page
    torch.manual_seed(0)
    torch._dynamo.reset()
    moved = 2 * batch * keys * kv_heads * dim * dtype.itemsize
    sets = []
    for _ in range(1 if dry else L2 * 2 // moved + 1):
        caches = [torch.randn(blocks, page, kv_heads, dim, device=device, dtype=dtype) for _ in range(2)]
        table = torch.randperm(blocks, device=device).view(batch, -1).int()
        sets.append((torch.randn(batch, 1, heads, dim, device=device, dtype=dtype), *caches, table))
    live = torch.randint(keys // 2, keys, (batch, 1), device=device)
    mask = (torch.arange(keys, device=device) <= live)[:, None, None]
    scale = dim**-0.5
    theirs = torch.compile(op.reference, dynamic=False)
    exact = op.reference(*(x.double() if x.is_floating_point() else x for x in sets[0]), mask, scale)
    ways: dict[str, Any] = {
        "fuse": lambda: [op.paged_decode_attention(*given, mask, scale) for given in sets],
        "fuse_early": lambda: [op.paged_decode_attention(*given, mask, scale, True) for given in sets],
        "inductor": lambda: [theirs(*given, mask, scale) for given in sets],
    }
    row: dict[str, Any] = {
        "name": name,
        "sets": len(sets),
        "live_bytes": int(moved * (live + 1).sum() / (batch * keys)),
    }
    calls = {}
    for way, call in ways.items():
        try:
            row[f"{way}_error"] = error(call()[0], exact)
            calls[way] = call if dry else captured(call)
        except Exception as problem:
            log.write(what="paged", name=name, way=way, problem=repr(problem)[:600])
    for way, ms in interleaved_ms(calls, reps).items():
        row[f"{way}_us"] = round(ms * 1e3 / len(sets), 2)
    log.write(what="paged", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    given = parser.parse_args()
    log = Log(given.out)
    with torch.no_grad():
        for name in [given.only] if given.only else list(CASES)[: 1 if given.dry else None]:
            case(log, name, given.dry, 2 if given.dry else 12)


if __name__ == "__main__":
    main()
