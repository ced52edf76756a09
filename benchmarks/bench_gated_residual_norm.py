"""The op gated_residual_norm against Inductor's code for the models' own lines, and the floor of the bytes.

    python benchmarks/bench_gated_residual_norm.py --out results.jsonl [--sweep] [--only pythia-2.8b]

Correct first (against float64, next to the unfused lines in eager mode), then the median of CUDA graphs of calls over
inputs that do not fit L2 together: forward, and forward + backward. Both sides are compiled by Inductor, ours around
the op. The floor is the bytes of each tensor read and written once at 4.29 TB/s (an H200's copy). `--sweep` then times
the op alone with other warps, parts and programs. `--dry` proves the script on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms
from torch import Tensor

forward = importlib.import_module("torch_fuse.kernels.gated_residual_norm")
backward = importlib.import_module("torch_fuse.kernels.gated_residual_norm_backward")
tile = importlib.import_module("torch_fuse.kernels._gated_residual_norm_tile")

BANDWIDTH, L2, EPS = 4.29e12, 60 * 2**20, 1e-5


class Geometry(NamedTuple):
    shape: tuple[int, int, int]
    kind: str  # neox: two terms, two LayerNorms; rms, layer: one term; wan: gate, modulation; wan2: gate, LayerNorm


GEOMETRIES = {
    "pythia-2.8b": Geometry((1, 2048, 2560), "neox"),
    "pythia-1.4b": Geometry((4, 1024, 2048), "neox"),
    "phi-4096x2048": Geometry((1, 4096, 2048), "layer"),
    "llama-3-8b": Geometry((1, 8192, 4096), "rms"),
    "llama-3-70b": Geometry((1, 4096, 8192), "rms"),
    "bert-base": Geometry((16, 512, 768), "layer"),
    "wan-1.3b-7800": Geometry((1, 7800, 1536), "wan"),
    "wan-1.3b-32760": Geometry((1, 32760, 1536), "wan"),
    "wan-1.3b-32760-cross": Geometry((1, 32760, 1536), "wan2"),
    "wan-14b-7800": Geometry((1, 7800, 5120), "wan"),
}
# residual, two terms, gate, two norms' weights and biases, scale, shift
Tensors = list[Tensor | None]


def make(geometry: Geometry, device: str) -> Tensors:
    batch, _, width = geometry.shape
    half = {"device": device, "dtype": torch.bfloat16}

    def full(wanted: bool = True) -> Tensor | None:
        return torch.randn(geometry.shape, **half) if wanted else None

    def vector(wanted: bool, **options: Any) -> Tensor | None:
        return torch.randn(width, **(options or half)) if wanted else None

    kind = geometry.kind
    affine = kind in ("neox", "layer", "rms", "wan2")
    # diffusers: chunks of one [B, 6, C] tensor in fp32
    chunks = torch.randn(batch, 6, width, device=device).chunk(6, dim=1)
    gated = kind.startswith("wan")
    return [
        full(), full(), full(kind == "neox"), chunks[2] if gated else None,
        vector(affine), vector(affine and kind != "rms"), vector(kind == "neox"), vector(kind == "neox"),
        chunks[1] if kind == "wan" else None, chunks[0] if kind == "wan" else None,
    ]  # fmt: skip


def unfused(kind: str, x, y1, y2, gate, w1, b1, w2, b2, scale, shift):
    """The models' own lines."""
    wide = torch.promote_types(x.dtype, torch.float32)  # .float(), but for the float64 run
    shape = (x.shape[-1],)
    if kind.startswith("wan"):
        r = (x.to(wide) + y1.to(wide) * gate).type_as(x)
        if kind == "wan2":
            return r, F.layer_norm(r.to(wide), shape, w1.to(wide), b1.to(wide), EPS).type_as(r)
        return r, (F.layer_norm(r.to(wide), shape, None, None, EPS) * (1 + scale) + shift).type_as(r)
    if kind == "neox":
        r = y1 + y2 + x
        return r, F.layer_norm(r, shape, w1, b1, EPS), F.layer_norm(r, shape, w2, b2, EPS)
    r = x + y1
    if kind == "layer":
        return r, F.layer_norm(r, shape, w1, b1, EPS)
    h = r.to(wide)
    return r, w1 * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(r.dtype)


def fused(kind: str, x, y1, y2, gate, w1, b1, w2, b2, scale, shift):
    outputs = 2 if kind == "neox" else 1
    found = torch.ops.torch_fuse.gated_residual_norm(
        x, y1, y2, gate, None, w1, b1, w2, b2, scale, shift, [1.0, 1.0], "rms" if kind == "rms" else "layer", EPS,
        0.0, outputs, x.dtype, x.dtype, True,
    )  # fmt: skip
    return found[: 1 + outputs]


Op = Callable[..., Any]


def step(op: Op, kind: str, tensors: Tensors, train: bool) -> Callable[[], list[Any]]:
    """A call of the forward, or of forward and backward."""
    if not train:
        return lambda: list(op(kind, *tensors))
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x = leaves[0]
    seeded = torch.Generator(x.device).manual_seed(0)  # drawn in bf16: the float64 run gets the same
    count = 3 if kind == "neox" else 2
    seeds = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for _ in range(count)]
    seeds = [seed.normal_(generator=seeded).to(x.dtype) for seed in seeds]
    wanted = [leaf for leaf in leaves if leaf is not None]

    def both() -> list[Any]:
        outputs = op(kind, *leaves)
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, seeds)]

    return both


def moved(tensors: Tensors, kind: str, train: bool) -> int:
    """Bytes of the large tensors read and written once; the sum's gradient is one tensor for all terms without gate."""
    one = tensors[0].numel() * tensors[0].element_size()
    terms, norms = (2, 2) if kind == "neox" else (1, 1)
    count = 1 + terms + 1 + norms
    if train:  # r, gradients of r and of the norms; of the sum, and where there is a gate y, and its gradient
        count += 2 + norms + 1 + (2 if tensors[3] is not None else 0)
    return one * count


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All of several calls, whose inputs do not fit L2 together; on a GPU, as a CUDA graph."""
    return captured(lambda: [call() for call in calls]) if torch.cuda.is_available() else lambda: calls[0]()


def measure(log: Log, name: str, train: bool, ops: dict[str, Op], dry: bool, **fields: Any) -> None:
    geometry = GEOMETRIES[name]
    if dry:
        geometry = geometry._replace(shape=(geometry.shape[0], 5, 64))
    torch.manual_seed(0)
    sets = [make(geometry, "cpu" if dry else "cuda")]
    moving = moved(sets[0], geometry.kind, train)
    sets += [make(geometry, "cpu" if dry else "cuda") for _ in range(0 if dry else 3 * L2 // moving + 1)]
    exact = step(unfused, geometry.kind, [None if t is None else t.double() for t in sets[0]], train)()
    row: dict[str, Any] = {"name": name, "pass": "forward + backward" if train else "forward"}
    row["floor_us"] = moving / BANDWIDTH * 1e6
    calls = {}
    for label, op in {"eager": unfused, **ops}.items():
        found = step(op, geometry.kind, sets[0], train)()
        errors = [error(a, b)["rms"] / float(b.square().mean().sqrt()) for a, b in zip(found, exact, strict=True)]
        row[f"{label}_error"] = [float(f"{e:.2g}") for e in errors]
        if label != "inductor":
            pairs = zip(errors, row["eager_error"], strict=True)
            assert all(mine <= 2 * other + 1e-5 for mine, other in pairs), row  # NaN fails too
        if label == "eager":
            continue
        calls[label] = in_turn([step(op, geometry.kind, tensors, train) for tensors in sets])
    del exact
    times = interleaved_ms(calls, 1 if dry else 30)
    log.write(**row, **{f"{label}_us": ms * 1e3 / len(sets) for label, ms in times.items()}, **fields)


def sweep(log: Log, name: str, train: bool, dry: bool) -> None:
    """The op without Inductor around it, with other configurations; of the pass that is swept only."""
    module = backward if train else forward
    chosen, programs = module.config, backward.PROGRAMS
    warps = (1, 2) if dry else (1, 2, 4, 8, 16)
    width = GEOMETRIES[name].shape[2]
    splits = (True, False) if tile.parts(width, True) != tile.parts(width, False) else (True,)
    for num_warps, split, count in itertools.product(warps, splits, (132, 264, 528) if train else (programs,)):
        if width > 2048 * num_warps or width < 64 * num_warps:
            continue  # more than 64 values of a row a thread spill; fewer than 2 are no row
        config = tile.Config(num_warps, split)
        module.config, backward.PROGRAMS = (lambda width, config=config: config), count
        measure(log, name, train, {"op_alone": fused}, dry, num_warps=num_warps, split=split, programs=count)
    module.config, backward.PROGRAMS = chosen, programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--only", choices=GEOMETRIES)
    for flag, text in (("--sweep", "also try other warps, parts and programs"), ("--dry", "tiny, on the CPU")):
        parser.add_argument(flag, action="store_true", help=text)
    given = parser.parse_args()
    log = Log(given.out)
    for name, train in itertools.product([given.only] if given.only else GEOMETRIES, (False, True)):
        torch._dynamo.reset()
        ops: dict[str, Op] = {label: torch.compile(f, dynamic=False) for label, f in
                              (("op", fused), ("inductor", unfused))}  # fmt: skip
        chosen = (backward if train else forward).config(GEOMETRIES[name].shape[2])
        measure(log, name, train, ops, given.dry, num_warps=chosen.num_warps, split=chosen.split)
        if given.sweep:
            sweep(log, name, train, given.dry)


if __name__ == "__main__":
    main()
