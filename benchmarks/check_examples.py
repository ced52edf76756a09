"""Every pattern's spellings and near misses on the GPU, fused against float64 and against the unfused graph.

python benchmarks/check_examples.py --out checks.jsonl
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from common import Log

import torch_fuse
from torch_fuse.options import Options
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns


def moved(obj: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    if isinstance(obj, torch.Tensor):
        target = dtype if dtype is not None and obj.is_floating_point() else obj.dtype
        return obj.detach().to(device, target).requires_grad_(obj.requires_grad)
    return copy.deepcopy(obj).to(device, dtype) if isinstance(obj, torch.nn.Module) else obj


def run(model: Any, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    out = model(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out.square().sum(), [x for x in inputs if x.requires_grad])
    return [out, *grads]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    log = Log(parser.parse_args().out)
    failures = 0
    import torch_fuse.patterns.norm_qkv_rope_attention as pattern_module
    from torch_fuse.patterns import mlp_gelu

    pattern_module.MIN_TOKENS = mlp_gelu.MIN_ELEMENTS = 0
    for pattern in patterns().values():
        for example in [*pattern.spellings(), *pattern.near_misses()]:
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                made, given = example.make(dtype)
                model, inputs = moved(made, "cuda"), tuple(moved(x, "cuda") for x in given)
                wide_model, wide_inputs = (
                    moved(made, "cuda", torch.float64),
                    [moved(x, "cuda", torch.float64) for x in given],
                )
                exact = run(wide_model, tuple(wide_inputs))
                plain = run(model, inputs)
                torch._dynamo.reset()
                reports = []

                def backend(gm: Any, example_inputs: Any, reports: list = reports) -> Any:
                    reports.append(rewrite(gm, Options(), patterns()).report)
                    return gm.forward

                fused = run(torch.compile(model, backend=backend), inputs)
                counts = torch_fuse.Report(reports).counts().get(pattern.name, {})
                fired = counts.get("fused", 0) > 0
                worst = 0.0
                for e, p, f in zip(exact, plain, fused, strict=True):
                    allowed = 2 * (p.double() - e).abs().max() + 4 * torch.finfo(dtype).eps * e.abs().max()
                    worst = max(worst, float((f.double() - e).abs().max() / allowed))
                ok = worst <= 1 and (fired or not example.fuses)
                failures += not ok
                if not ok:
                    log.write(
                        what="FAILED",
                        pattern=pattern.name,
                        example=example.name,
                        dtype=str(dtype),
                        worst=worst,
                        counts=counts,
                    )
    log.write(what="examples", failures=failures)
    return failures


if __name__ == "__main__":
    sys.exit(main())
