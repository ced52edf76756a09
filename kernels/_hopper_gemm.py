"""A persistent matrix product for Hopper with an epilogue that moves by tiles, too.

    linear = y @ weight.T + bias
    out    = a combination of x and linear (see `linear_skip`), or gelu(linear) (see `linear_gelu`)

One warp moves tiles of y, of the weight and of x to shared memory; two groups of four warps multiply. Either both work
on one tile of 2 * block_m rows, which reads least from L2, or, `ping_pong`, each on its own: then one's epilogue runs
beside the other's products (both schedules are CUTLASS's: cooperative and ping-pong). x arrives while the product
runs; the result takes its place, part by part, and the memory engine writes it while the next tile is multiplied. The
sums are fp32, and what is made of them is rounded once.

TMA reads from multiples of 16 bytes with strides of multiples of 16 bytes, and reads zeros behind the end.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._hopper_flash_tiles import MISSING, gl
from ._hopper_gemm_kernel import hopper_gemm as kernel

__all__ = ["CONFIGS", "MISSING", "Config", "call", "cannot_read", "config", "descriptor", "kernel", "ring",
           "stages_that_fit"]  # fmt: skip

BLOCK_K, PART = 64, 64
SHARED = 227 << 10  # bytes of shared memory that a program may have
PROGRAMS = 132  # SMs of an H100 or H200: where the sizes are known but no device


class Config(NamedTuple):
    """Rows of a group and columns of a tile, steps of 64 under way, a tile for each group, tiles of rows in turn.

    `groups` share a tile, two or three; two take turns, each with its own, where `ping_pong`. `early`: the launch
    begins before the one in front of it has ended (programmatic dependent launch), and then waits for it.
    """

    block_m: int
    block_n: int
    stages: int
    ping_pong: bool = False
    together: int = 8
    groups: int = 2
    early: bool = True

    @property
    def shared(self) -> int:
        """How many groups share a tile."""
        return 1 if self.ping_pong else self.groups


# With the part of a full rate that each reaches where it fills the GPU (benchmarks/results/linear_skip_hopper.jsonl).
CONFIGS = {
    Config(64, 256, 4): 0.87,
    Config(128, 128, 5, True): 0.88,
    Config(64, 128, 6): 0.9,
    Config(64, 128, 7, True): 0.8,
    Config(64, 64, 8, True): 0.6,
}


def config(rows: int, columns: int, itemsize: int, skip: bool, keep: bool, lanes: int) -> Config | None:
    """The tile of the shortest predicted time; None where none fits. For the others, see `stages_that_fit`."""
    best: tuple[float, Config] | None = None
    for how, rate in CONFIGS.items():
        stages = stages_that_fit(how, itemsize, skip, keep, lanes)
        if stages < 3:
            continue
        area = how.block_m * how.shared * how.block_n
        tiles = -(-rows // (how.block_m * how.shared)) * -(-columns // how.block_n)
        # The last epilogue of a ping-pong is one group's, and runs beside nothing.
        cost = area * (-(-tiles // PROGRAMS) / rate + (0.3 if how.ping_pong else 0.0))
        if best is None or cost < best[0]:
            best = cost, how._replace(stages=stages)
    return None if best is None else best[1]


def ring(block_n: int, skip: bool) -> int:
    """Places of a group for parts of the result: all have x's part in theirs, without x they take turns."""
    return block_n // PART if skip else min(2, block_n // PART)


def stages_that_fit(how: Config, itemsize: int, skip: bool, keep: bool, lanes: int) -> int:
    """The steps that fit in shared memory, up to the configured ones.

    Args:
        how: the configuration.
        itemsize: bytes of an element of x and the result.
        skip: x is read, so that all of its tile has a place.
        keep: the product is written, too.
        lanes: vectors over the columns, at least 1.
    """
    step = 2 * BLOCK_K * (how.block_m * how.shared + how.block_n)
    parts = ring(how.block_n, skip)
    results = how.block_m * PART * (parts * itemsize + (2 if keep else 0))
    fixed = how.groups * (results + lanes * how.block_n * 4) + 512
    return min(how.stages, (SHARED - fixed) // step)


def cannot_read(name: str, x: Tensor) -> str | None:
    """Why the memory engine cannot read or write the rows [rows, lanes] of a real tensor, or None."""
    if x.data_ptr() % 16:
        return f"{name} begins at no multiple of 16 bytes"
    if x.stride(1) != 1:
        return f"{name}.stride(1) is {x.stride(1)}; allowed: 1"
    stride = x.stride(0) * x.element_size()
    if x.shape[0] > 1 and (stride % 16 or stride <= 0 or stride >= 2**40):
        return f"{name}.stride(0) is {x.stride(0)}; allowed: multiples of {16 // x.element_size()}"
    return None


def descriptor(x: Tensor, rows: int, lanes: int) -> Any:
    """How the memory engine finds tiles [rows, lanes] of a tensor of two dimensions."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, lanes], dtype)
    strides = [x.stride(0) if x.shape[0] > 1 else lanes, 1]
    return TensorDescriptor(x, list(x.shape), strides, [rows, lanes], layout)


def call(how: Config, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor | None, out: Tensor,
         linear: Tensor | None, mode: str, factors: tuple[Any, ...] = (None, 0, 0, 0, None, 0, 0, 0),
         kinds: tuple[str, str] = ("none", "none"), numbers: tuple[float, float] = (1.0, 1.0),
         functions: tuple[str, str] = ("x", "x"),
         length: int = 1) -> tuple[int, list[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `kernel`: grid, arguments and constants.

    Args:
        how: tiles.
        y: [rows, K]; weight [N, K], either stride 1; bias [N], contiguous, or None; x, out and linear [rows, N], x of
            out's dtype, or None, linear of y's, or None.
        mode: a mode of `linear_skip`, or "gelu" or "gelu_tanh".
        factors: a, its strides over batch, position and lane, b and its strides.
        kinds: what a and b have numbers for: "row", "lane", "full" or "none".
        numbers: alpha and beta.
        functions: of a and of b (`_pointwise`), for rows and lanes.
        length: positions in a batch.
    """
    rows, inner = y.shape
    columns = int(weight.shape[0])
    w_rows = weight.stride(1) == 1
    block = (how.block_n, BLOCK_K) if w_rows else (BLOCK_K, how.block_n)
    parts = how.block_m, PART
    arguments = [
        descriptor(y, how.block_m, BLOCK_K), descriptor(weight if w_rows else weight.t(), *block),
        None if x is None else descriptor(x, *parts), descriptor(out, *parts),
        None if linear is None else descriptor(linear, *parts), bias, *factors, *map(float, numbers), rows, length,
    ]  # fmt: skip
    constants = {
        "N": columns, "K": int(inner), "A": kinds[0], "B": kinds[1], "MODE": mode, "ONE_A": numbers[0] == 1,
        "ONE_B": numbers[1] == 1, "A_OF": functions[0], "B_OF": functions[1],
        "W_ROWS": w_rows, "SHARED": how.shared, "BLOCK_M": how.block_m,
        "BLOCK_N": how.block_n, "BLOCK_K": BLOCK_K, "PART": PART, "RING": ring(how.block_n, x is not None),
        "STAGES": how.stages, "TOGETHER": how.together, "EARLY": how.early,
        "num_warps": 4, **({"launch_pdl": True} if how.early else {}),
    }  # fmt: skip
    tiles = -(-rows // (how.block_m * how.shared)) * -(-columns // how.block_n)
    programs = torch.cuda.get_device_properties(y.device).multi_processor_count
    return min(tiles, programs), arguments, constants
