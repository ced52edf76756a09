"""qk_norm_rope against Inductor's code for the same lines as transformers and diffusers write them.

    python benchmarks/bench_qk_norm_rope.py --out results.jsonl [--sweep] [--only pythia-2.8b]

Correct first (against float64), then the median of device events over inputs rotated past L2, next to the floor: the
bytes of q and k read and written at 4.29 TB/s (an H200's copy). `--dry` proves the script on a CPU at tiny sizes.
"""

import argparse
import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

forward = importlib.import_module("torch_fuse.kernels.qk_norm_rope")
backward = importlib.import_module("torch_fuse.kernels.qk_norm_rope_backward")

BANDWIDTH, L2 = 4.29e12, 60 * 2**20
# batch, length, q heads, k heads, D, rotary_dim, norm, layout; bf16
GEOMETRIES = {
    "pythia-2.8b": (1, 2048, 32, 32, 80, 20, "none", "neox"),
    "wan-1.3b": (1, 32760, 12, 12, 128, 128, "rms_full", "wan"),
    "llama-3-8b": (1, 4096, 32, 8, 128, 128, "none", "llama"),
    "qwen3-8b": (1, 4096, 32, 8, 128, 128, "rms_head", "llama"),
    "kandinsky-5": (1, 8192, 28, 28, 64, 64, "rms_head", "matrices"),
    "ltx-video": (1, 4864, 1, 1, 2048, 2048, "rms_head", "ltx"),  # 32 heads, normalised and rotated as one
}


# Where a layout's tables keep the cosines and the sines of a pair; else they are in halves.
LANES = {
    "wan": ([2, 0, 0], [2, 1, 1]), "ltx": ([1, 0, 0], [1, 0, 0]), "matrices": ([4, 0, 3], [1, 0, 32]),
}  # fmt: skip


def as_written(q, k, q_weight, k_weight, cos, sin, norm, eps, _offset, rotary, interleaved, lanes, _sin):
    """The models' own lines. q, k [B, S, H, D]; results as attention takes them."""

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if norm == "rms_full":  # diffusers: torch.nn.RMSNorm over the whole projection
            return torch.nn.functional.rms_norm(x.flatten(2), (weight.numel(),), weight, eps).view(x.shape)
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # .float(), but for the float64 run
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    if norm != "none":
        q, k = normed(q, q_weight), normed(k, k_weight)
    if lanes == LANES["matrices"][0]:  # diffusers/models/transformers/transformer_kandinsky.py

        def matrices(x: torch.Tensor) -> torch.Tensor:
            pairs = x.reshape(*x.shape[:-1], -1, 1, 2).to(cos.dtype)
            return (cos.unflatten(-1, (-1, 2, 2)).unsqueeze(2) * pairs).sum(-1).flatten(3).to(x.dtype)

        return matrices(q), matrices(k)

    if lanes == LANES["ltx"][0]:  # diffusers/models/transformers/transformer_ltx.py

        def ltx(x: torch.Tensor) -> torch.Tensor:
            c, s = (table.repeat_interleave(2, -1).unsqueeze(2) for table in (cos, sin))
            x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([-x2, x1], dim=-1).flatten(3)
            return (x.to(c.dtype) * c + turned.to(c.dtype) * s).to(x.dtype)

        return ltx(q), ltx(k)

    if interleaved:  # diffusers/models/transformers/transformer_wan.py

        def wan(x: torch.Tensor) -> torch.Tensor:
            x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
            c, s = cos[..., 0::2].unsqueeze(2), sin[..., 1::2].unsqueeze(2)
            out = torch.empty_like(x)
            out[..., 0::2], out[..., 1::2] = x1 * c - x2 * s, x1 * s + x2 * c
            return out.type_as(x)

        return wan(q), wan(k)

    def half(x: torch.Tensor) -> torch.Tensor:
        x, c, s = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        x, rest = x[..., :rotary], x[..., rotary:]
        x1, x2 = x.chunk(2, -1)
        x = x * c + torch.cat((-x2, x1), -1) * s
        return (torch.cat((x, rest), -1) if rest.shape[-1] else x).transpose(1, 2)

    return half(q), half(k)


def make(name: str, dry: bool, device: str) -> tuple[list[Any], tuple[Any, ...]]:
    batch, length, hq, hk, dim, rotary, norm, layout = GEOMETRIES[name]
    length = 5 if dry else length
    options = {"device": device, "dtype": torch.bfloat16}
    if layout == "neox":
        q, k, _ = torch.randn(batch, length, hq, 3 * dim, **options).chunk(3, -1)
    else:  # separate projections
        q, k = (torch.randn(batch, length, h * dim, **options).unflatten(-1, (h, dim)) for h in (hq, hk))
    dtype = torch.float32 if layout in LANES else torch.bfloat16
    angles = torch.randn(1, length, rotary // 2, device=device)
    sizes = {"none": (None, None), "rms_head": (dim, dim), "rms_full": (hq * dim, hk * dim)}[norm]
    weights = [None if n is None else torch.randn(n, **options) for n in sizes]
    half = [1, 0, rotary // 2]
    args = (norm, 1e-6, 0.0, rotary, layout in LANES, *LANES.get(layout, (half, half)))
    if layout == "matrices":
        cos, sin = angles.cos(), angles.sin()
        return [q, k, *weights, torch.stack([cos, -sin, sin, cos], -1).flatten(2), torch.cat((sin, sin), -1)], args
    if layout == "wan":
        angles = angles.repeat_interleave(2, -1)
    elif layout != "ltx":
        angles = torch.cat((angles, angles), -1)
    return [q, k, *weights, angles.cos().to(dtype), angles.sin().to(dtype)], args


def median_us(calls: list[Callable[[], Any]], dry: bool) -> float:
    """Median time of a call; `calls` are the same work on inputs that do not fit L2 together."""
    for call in calls * (1 if dry else 3):
        call()
    if dry:
        return 0.0
    times = []
    for call in calls * max(1, 200 // len(calls)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_500_000)  # 0.8 ms: the host gets ahead, the events bracket the device's work alone
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3


def step(op: Callable[..., Any], tensors: list[Any], args: tuple[Any, ...], train: bool) -> Callable[[], Any]:
    """A call of the forward, or of the backward alone."""
    if not train:
        return lambda: op(*tensors, *args)
    leaves = [x if x is None or i > 3 else x.detach().requires_grad_() for i, x in enumerate(tensors)]
    out = op(*leaves, *args)
    seeded = torch.Generator(out[0].device).manual_seed(0)  # drawn in bf16: the float64 run gets the same
    grads = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for x in out]
    grads = [g.normal_(generator=seeded).to(out[0].dtype) for g in grads]
    wanted = [x for x in leaves[:4] if x is not None]
    return lambda: torch.autograd.grad(out, wanted, grads, retain_graph=True)


def measure(name: str, train: bool, dry: bool, device: str, ops: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    tensors, args = make(name, dry, device)
    sets = [tensors]
    moved = (3 if train and args[0] != "none" else 2) * 2 * (sets[0][0].numel() + sets[0][1].numel())
    sets += [make(name, dry, device)[0] for _ in range(0 if dry else 3 * L2 // moved + 1)]
    row: dict[str, Any] = {"name": name, "pass": "backward" if train else "forward"}
    row["floor_us"] = moved / BANDWIDTH * 1e6
    exact = step(as_written, [None if x is None else x.double() for x in sets[0]], args, train)()
    for label, op in ops.items():
        values = step(op, sets[0], args, train)()
        row[f"{label}_error"] = max(
            ((x.double() - y).norm() / y.norm()).item() for x, y in zip(values, exact, strict=True)
        )
        assert row[f"{label}_error"] < 2e-2, row  # NaN fails too
        row[f"{label}_us"] = median_us([step(op, s, args, train) for s in sets], dry)
    return row


def fused(*arguments: Any) -> Any:
    return torch.ops.torch_fuse.qk_norm_rope(*arguments, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--only", choices=sorted(GEOMETRIES), help="one geometry")
    parser.add_argument("--sweep", action="store_true", help="also try other tiles and numbers of warps")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU: proves the script, measures nothing")
    flags = parser.parse_args()
    device = "cpu" if flags.dry else "cuda"
    gpu = "none" if flags.dry else torch.cuda.get_device_name()
    versions = {"gpu": gpu, "torch": torch.__version__, "triton": getattr(forward.triton, "__version__", None)}
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over one forward
    compiled = torch.compile(as_written, dynamic=False)
    for name, train in itertools.product([flags.only] if flags.only else GEOMETRIES, (False, True)):
        torch._dynamo.reset()  # else the eighth geometry would run eagerly
        module = backward if train else forward
        chosen = (module.TILE, module.NUM_WARPS)
        tiles = itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8)) if flags.sweep else ()
        for tile, warps in (chosen, *(pair for pair in tiles if pair != chosen)):
            module.TILE, module.NUM_WARPS = tile, warps
            ops = {"op": fused} | ({"inductor": compiled} if (tile, warps) == chosen else {})
            row = versions | {"tile": tile, "warps": warps} | measure(name, train, flags.dry, device, ops)
            with flags.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = list(row.items())[3:]
            print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown), flush=True)
        module.TILE, module.NUM_WARPS = chosen


if __name__ == "__main__":
    main()
