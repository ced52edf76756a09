"""FlashAttention-3's forward pass (Shah et al., arXiv:2407.08608) for Hopper, for one or two parts of the head dim.

    scores = (q1 @ k1.T + q2 @ k2.T) * scale        q1, q2: the first D1 and the last D2 lanes of q; D2 may be 0
    out = softmax(scores, causal or over all keys) @ [v1, v2]

One warp moves tiles of keys and values to shared memory; one to three warp groups of 64 queries each take them from
there. A group's next scores are multiplied while it takes the exponentials of those before, and its products with the
values run under them, too. Scores and sums are fp32; the weights are rounded to the inputs' dtype for the second
product; the result is rounded once. Tiles of keys go backwards, so that the one with a mask comes first and no other
has one. Heads whose keys fit in half of L2 run together, among them first the tiles with most keys.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_fuse._compat import likely

from ._hopper_flash_kernel import MISSING, gl, kernel

__all__ = ["MISSING", "Config", "call", "cannot_read", "kernel"]

HALF_L2 = 24 << 20  # bytes


class Config(NamedTuple):
    """How many groups of 64 queries a program has, how many keys a tile, how many tiles are under way.

    Registers a thread: of a group, and by how many the launch is limited, which sets how many programs share an SM.
    `programs` is how many an SM gets, which then take one tile of queries after the other; None: one for each tile.
    `turns`: the groups start their products in turn. `lazy`: the shift of the scores follows only when it has to.
    `order`: a branch keeps the exponentials in front of the wait for the products that run under them.
    """

    groups: int = 2
    block_n: int = 128
    stages: int = 2
    registers: int = 240
    maxnreg: int | None = None
    programs: int | None = None
    turns: bool = False
    lazy: bool = True
    order: bool = True


def constants(config: Config) -> dict[str, Any]:
    """The kernel's constants that are the configuration's, and options of the compiler."""
    return {
        "GROUPS": config.groups, "N": config.block_n, "STAGES": config.stages, "REGISTERS": config.registers,
        "TURNS": config.turns, "LAZY": config.lazy, "ORDER": config.order,
        "num_warps": 4, **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    }  # fmt: skip


def cannot_read(**tensors: Tensor) -> str | None:
    """Why the memory engine cannot read the tensors where they lie, or None."""
    for name, x in tensors.items():
        if x.stride(3) != 1:
            return f"{name}.stride(3) is {x.stride(3)}; allowed: 1"
        for i in range(3):
            stride = x.stride(i)
            if likely(x.shape[i] == 1):
                continue
            if likely(stride % 8 != 0) or likely(stride <= 0) or likely(stride >= 2**38):
                return f"{name}.stride({i}) is {x.stride(i)}; allowed: multiples of 8"
    return None


def descriptors(x: Tensor, rows: int, parts: tuple[int, int]) -> list[Any]:
    """How the memory engine finds tiles of rows: of the first part of the lanes, and of the last (None if empty)."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [x.stride(i) if x.shape[i] != 1 else 8 for i in range(3)] + [1]
    found: list[Any] = []
    for offset, lanes in ((0, parts[0]), (parts[0], parts[1])):
        if lanes == 0:
            return [*found, None]
        block, dtype = [1, 1, rows, lanes], {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        part = x[..., offset : offset + lanes]
        found.append(TensorDescriptor(part, list(part.shape), strides, block, layout))
    return found


def call(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, parts: tuple[int, int], config: Config,
         out: Tensor) -> tuple[int, Sequence[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `kernel`: grid, arguments and constants."""
    batch, heads, q_length, dim = q.shape
    length, per_key = k.shape[2], heads // k.shape[1]
    together = max(1, min(batch * heads, HALF_L2 // (4 * length * dim) * per_key))
    arguments = [
        *descriptors(q, 64, parts), *descriptors(k, config.block_n, parts), *descriptors(v, config.block_n, parts),
        out, batch, q_length, length, scale * math.log2(math.e), together,
    ]  # fmt: skip
    known = {"H": heads, "HEADS_OF_KEY": per_key, "CAUSAL": is_causal, "D1": parts[0], "D2": parts[1]}
    grid = -(-q_length // (64 * config.groups)) * batch * heads
    if config.programs is not None:
        grid = min(grid, config.programs * torch.cuda.get_device_properties(q.device).multi_processor_count)
    return grid, arguments, known | constants(config)
