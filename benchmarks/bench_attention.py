"""uneven_head_attention against PyTorch's backends: error against exact attention, then microseconds a call.

    python benchmarks/bench_attention.py --out results.jsonl [--sweep] [--only 1,2048,32,80]

Causal, bf16; q and k are [B, S, H, D] in memory, v is a view into the projection [B, S, H, 3 * D], as GPT-NeoX has it.
Times are medians of CUDA graphs, so without launches. `--sweep` tries configurations (all for the first shape, its
best eight for the others) and goes on when one fails. `--dry` proves the script on a CPU, with TRITON_INTERPRET=1.
"""

import argparse
import importlib
import math
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

op = importlib.import_module("torch_fuse.kernels.uneven_head_attention")

SHAPES = [(1, 2048, 32, 80), (4, 1024, 32, 80), (1, 8192, 32, 80), (1, 2048, 32, 96), (1, 4096, 12, 48),
          (1, 2048, 16, 160)]  # fmt: skip
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}  # flash sets the error allowed
TILES = [(64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4), (128, 64, 4), (128, 32, 8)]
INNER = 8  # calls in one CUDA graph


def make(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, dim = shape
    # Triton's interpreter multiplies the bits of bfloat16 as integers.
    options: Any = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float16}
    q, k = (torch.randn(batch, length, heads, dim, **options).transpose(1, 2) for _ in range(2))
    return q, k, torch.randn(batch, length, heads, 3 * dim, **options)[..., 2 * dim :].transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in float64 (float32 for long sequences), head by head."""
    dtype = torch.float64 if q.shape[2] <= 2048 else torch.float32
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for at in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        scores = (q[at].to(dtype) @ k[at].to(dtype).T).mul_(q.shape[-1] ** -0.5)
        out[at] = scores.masked_fill_(later, -math.inf).softmax(-1) @ v[at].to(dtype)
    return out


def ours(config: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    with patch.dict(op.CONFIGS, {tensors[0].shape[-1]: (config, config)}):
        return op._forward(*tensors, True, tensors[0].shape[-1] ** -0.5)


def sdpa(backend: SDPBackend, tensors: tuple[Tensor, ...]) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, is_causal=True)


def configurations(sms: int) -> list[Any]:
    found = [op.Config(*tile, stages) for tile in TILES for stages in (2, 3)]
    found += [op.Config(*tile, 4) for tile in ((64, 64, 4), (64, 32, 4))]
    found += [op.Config(*TILES[i], stages, 0, 128) for i in (0, 2, 6) for stages in (2, 3)]
    found += [op.Config(*tile, stages, 0, 168) for tile in TILES[:2] for stages in (2, 3)]
    found += [op.Config(*tile, 2, sms) for tile in TILES[:4]]
    return found + [op.Config(*TILES[i], 3, sms, 128) for i in (0, 2)]


def measure(shape: tuple[int, ...], tried: list[Any], dry: bool, log: Log) -> list[Any]:
    """Times the backends and the configurations; returns the configurations, best first."""
    tensors, us = make(shape, "cpu" if dry else "cuda"), {}
    wanted, floor = exact(*tensors), {"max": 2e-3, "rms": 2e-4}
    names = {config: f"{tuple(config[:5])} maxnreg={config.maxnreg}" for config in tried}
    calls: dict[str, Any] = {} if dry else {name: lambda b=b: sdpa(b, tensors) for name, b in BACKENDS.items()}
    calls |= {name: lambda config=config: ours(config, tensors) for config, name in names.items()}
    for name, call in calls.items():
        try:
            found = error(call(), wanted)
            floor = found if name == "flash" else floor
            right = all(found[key] <= 2 * floor[key] + 1e-5 for key in floor)  # NaN is wrong too
            timed = call if dry else captured(call, INNER)
            us[name] = interleaved_ms({name: timed}, 2 if dry else 15)[name] * 1e3 / (1 if dry else INNER)
            log.write(what="attention" if right else "WRONG", shape=shape, name=name, us=us[name], **found)
        except Exception as problem:  # does not compile, too much shared memory, refused by the backend
            log.write(what="failed", shape=shape, name=name, error=f"{type(problem).__name__}: {problem}"[:300])
    useful = 2 * shape[0] * shape[2] * shape[1] ** 2 * shape[3]
    for name in sorted(us, key=us.__getitem__)[:8]:
        log.write(what="best", shape=shape, name=name, us=round(us[name], 1), tflops=round(useful / us[name] / 1e6))
    return sorted(tried, key=lambda config: us.get(names[config], math.inf))[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended here")
    parser.add_argument("--only", help="one shape: batch,length,heads,head_dim")
    parser.add_argument("--sweep", action="store_true", help="also try other configurations")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    log = Log(flags.out)
    shapes = [tuple(map(int, flags.only.split(",")))] if flags.only else SHAPES
    sms = 4 if flags.dry else torch.cuda.get_device_properties(0).multi_processor_count
    others = configurations(sms) if flags.sweep else []
    for shape in shapes:
        shape = (1, 150, 2, shape[-1]) if flags.dry else shape
        best = measure(shape, [*dict.fromkeys([*op.CONFIGS[shape[-1]], *others])], flags.dry, log)
        others = best if flags.sweep else []


if __name__ == "__main__":
    main()
