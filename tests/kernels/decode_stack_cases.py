"""Decoders for `decode_stack`: any sizes, and the kernel run by the CPU emulator."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from cuda_emulation import EmulatedKernel, guarded
from torch import Tensor

from torch_fuse.kernels import _decode_stack_launch as launching
from torch_fuse.kernels._cuda import SOURCES
from torch_fuse.kernels._decode_stack_plan import Device, plan
from torch_fuse.kernels.decode_stack import Stack


class Case(NamedTuple):
    """A decoder and how the emulated device divides it."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    inner: int = 256
    vocabulary: int = 50
    parallel: bool = True
    norm: str = "layer"
    activation: str = "gelu"
    gated: bool = False
    fused: bool = True  # one projection for q, k, v, a head's three side by side
    rotary: int = 8
    interleaved: bool = False
    counted: bool = True
    size: int = 40
    live: int = 20
    mask: str = "causal"
    own_masks: bool = False  # each layer keeps one key less
    apart: bool = False  # the cache's rows do not lie side by side
    biased: bool = True
    dtype: torch.dtype = torch.float16
    table_dtype: torch.dtype | None = None
    multiprocessors: int = 5
    matrix_warps: int = 2
    max_chunk: int = 2048
    splits: int = 2
    slots: int = 3
    head_norm: bool = False
    keys: int = 2048
    queries: int | None = None
    round_rows: int = 64


def mask_of(case: Case) -> Tensor:
    j = torch.arange(case.size)
    keep = j <= case.live
    if case.mask == "hole":
        keep = keep & ((j < 5) | (j > 9)) & (j != 0)
    if case.mask == "one":
        keep = j == case.live
    if case.mask == "without_the_token":
        keep = j < case.live
    if case.mask == "beyond":
        keep = j <= case.live + 7
    return (keep & (case.mask != "none"))[None, None, None]


def stack(case: Case, seed: int = 0) -> Stack:
    """The op's arguments on the CPU."""
    torch.manual_seed(seed)
    n, d, h = case.layers, case.head_dim, case.heads

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(case.dtype)

    def weights(count: int, rows: int, columns: int) -> list[Tensor]:
        return [random(rows, columns, scale=columns**-0.5) for _ in range(count)]

    def biases(count: int, rows: int) -> list[Tensor | None]:
        return [random(rows, scale=0.3) if case.biased else None for _ in range(count)]

    if case.fused:
        assert case.kv_heads == h
        in_rows, layout = [3 * h * d], [0, 0, 3 * d, 0, d, 3 * d, 0, 2 * d, 3 * d]
    else:
        in_rows, layout = [h * d, case.kv_heads * d, case.kv_heads * d], [0, 0, d, 1, 0, d, 2, 0, d]
    ups = 2 if case.gated else 1
    table = case.table_dtype or case.dtype
    angles = torch.rand(1, 1, max(case.rotary, 1)) * 6
    lanes = [2, 0, 1] if case.interleaved else [1, 0, case.rotary // 2]
    caches = [[random(1, case.kv_heads, case.size, d) for _ in range(n)] for _ in range(2)]
    if case.apart:
        caches = [[c.transpose(1, 2).contiguous().transpose(1, 2) for c in of_kind] for of_kind in caches]
    for cache in (*caches[0], *caches[1]):
        cache[:, :, case.live + 8 :] = float("nan")  # nobody may look
    masks = [mask_of(case._replace(live=case.live - i)) for i in range(n if case.own_masks else 1)]
    return Stack(
        random(1, 1, case.width), [random(case.width, scale=0.3) + 1 for _ in range(2 * n)],
        biases(2 * n, case.width), [w for _ in range(n) for r in in_rows for w in weights(1, r, case.width)],
        [b for _ in range(n) for r in in_rows for b in biases(1, r)], weights(ups * n, case.inner, case.width),
        biases(ups * n, case.inner), weights(n, case.width, h * d), biases(n, case.width),
        weights(n, case.width, case.inner), biases(n, case.width),
        angles.cos().to(table) if case.rotary else None, angles.sin().to(table) if case.rotary else None, *caches,
        [torch.tensor(case.live) for _ in range(n)] if case.counted else [],
        None if case.counted else torch.tensor([case.live]), masks,
        *([random(case.width), biases(1, case.width)[0], *weights(1, case.vocabulary, case.width), None]
          if case.vocabulary else [None] * 4),
        case.parallel, case.norm, 1e-5, 0.0, case.activation, case.gated, h, case.kv_heads, d, layout, case.rotary,
        case.interleaved, lanes, lanes, d**-0.5,
        *([[random(d, scale=0.3) + 1 for _ in range(n)] for _ in range(2)] if case.head_norm else ([], [])),
        1e-3, 0.25,
    )  # fmt: skip


def copied(s: Stack, dtype: torch.dtype | None = None) -> Stack:
    """The same arguments, to be written to; floats of another dtype."""

    def one(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to(dtype) if dtype is not None and x.is_floating_point() else x.clone()
        return [one(y) for y in x] if isinstance(x, list) else x

    return Stack(*map(one, s))  # type: ignore[arg-type]


def emulated(s: Stack, case: Case, seed: int = 0, races: bool = False, workspace: Tensor | None = None) -> Tensor:
    """The kernel's result; outputs, caches and the workspace end where nobody may read or write."""
    device = Device(case.multiprocessors, 200_000)
    fitting = plan(launching.sizes_of(s), device, case.matrix_warps, case.max_chunk, case.splits, case.round_rows,
                   case.slots, keys=case.keys, queries=case.queries)  # fmt: skip
    assert not isinstance(fitting, str), fitting
    macros = launching.constants(s, fitting)
    kernel = EmulatedKernel(Path(SOURCES / "decode_stack.cu"), "decode_stack", macros, races=races)
    rows = s.x.shape[2] if s.head_weight is None else s.head_weight.shape[0]
    out = guarded(torch.full((1, 1, rows), float("nan"), dtype=s.x.dtype))
    if workspace is None:
        workspace = guarded(torch.full((fitting.workspace,), 0xFF, dtype=torch.uint8))
    workspace[: fitting.counters] = 0
    given, _ = launching.arguments(s, out, workspace.data_ptr())
    kernel(case.multiprocessors, fitting.threads, fitting.shared_bytes, [given], seed=seed)
    return out
