"""FlashAttention's backward pass (Dao, arXiv:2307.08691; Shah et al., arXiv:2407.08608) for Hopper, without atomics.

    p = exp(scores - lse); delta = sum(out * grad)            per query
    dv = p.T @ grad;  ds = p * (grad @ v.T - delta);  dk = ds.T @ q * scale;  dq = ds @ k * scale

Two kernels, each of one warp that fetches tiles with the memory engine and two or three warp groups. The first holds 64
keys and values a group and lets the queries pass: its scores are transposed, keys by queries, so that p.T and ds.T go
from registers into the next products. The second holds 64 queries a group and lets the keys pass. A sum has one owner
and one order: the same bits in each run. That costs seven products where atomic sums of dq would need five.
Sums are fp32; p and ds are rounded to the inputs' dtype for their products; the results are rounded once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._flash import output
from ._hopper_flash import HALF_L2, descriptors
from ._hopper_flash_backward_kernel import key_kernel
from ._hopper_flash_query_kernel import query_kernel
from ._ops import launch, on_device_of

__all__ = ["Config", "call_keys", "call_queries", "gradients", "key_kernel", "query_kernel"]


class Config(NamedTuple):
    """How many groups of 64 rows a program has, how many rows pass at once, and how many tiles are under way.

    Registers a thread: of a group, and by how many the launch is limited. `early`: the scores of the next tile are
    multiplied while this one's are used. `programs` is how many an SM gets, which then take one tile after the other;
    None: one for each tile.
    """

    groups: int = 2
    rows: int = 64
    stages: int = 2
    registers: int = 240
    early: bool = True
    maxnreg: int | None = None
    programs: int | None = None


def call_keys(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rest: list[Tensor], is_causal: bool, scale: float,
              config: Config) -> tuple[int, list[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `key_kernel`: grid, arguments and constants; `rest`: lse, delta, dk, dv."""
    held = [descriptors(x, 64, (q.shape[3], 0))[0] for x in (k, v)]
    q_, grad_ = (descriptors(x, config.rows, (q.shape[3], 0))[0] for x in (q, grad))
    together = HALF_L2 // (4 * q.shape[2] * q.shape[3]) * k.shape[1] // q.shape[1]
    return _call([q_, *held, grad_], q, k, rest, k, together, is_causal, scale, config)


def call_queries(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, rest: list[Tensor], is_causal: bool, scale: float,
                 config: Config) -> tuple[int, list[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `query_kernel`: grid, arguments and constants; `rest`: lse, delta, dq."""
    passing = [descriptors(x, config.rows, (q.shape[3], 0))[0] for x in (k, v)]
    q_, grad_ = (descriptors(x, 64, (q.shape[3], 0))[0] for x in (q, grad))
    together = HALF_L2 // (4 * k.shape[2] * k.shape[3]) * q.shape[1] // k.shape[1]
    return _call([q_, *passing, grad_], q, k, rest, q, together, is_causal, scale, config)


def _call(inputs: list[Any], q: Tensor, k: Tensor, rest: list[Tensor], held: Tensor, together: int, is_causal: bool,
          scale: float, config: Config) -> tuple[int, list[Any], dict[str, Any]]:  # fmt: skip
    pairs, rows = held.shape[0] * held.shape[1], held.shape[2]
    sizes = [q.shape[0], q.shape[2], k.shape[2], max(1, min(pairs, together)), scale * math.log2(math.e), scale]
    constants = {
        "H": q.shape[1], "HEADS_OF_KEY": q.shape[1] // k.shape[1], "CAUSAL": is_causal, "D": q.shape[3],
        "GROUPS": config.groups, "ROWS": config.rows, "STAGES": config.stages, "REGISTERS": config.registers,
        "EARLY": config.early, "num_warps": 4, **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    }  # fmt: skip
    grid = -(-rows // (64 * config.groups)) * pairs
    if config.programs is not None:
        grid = min(grid, config.programs * torch.cuda.get_device_properties(held.device).multi_processor_count)
    return grid, [*inputs, *rest, *sizes], constants


def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, is_causal: bool, scale: float,
              key_config: Config, query_config: Config) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches both kernels from an opaque op; returns dq, dk and dv, each [B, S, H, D] in memory.

    Args:
        grad: of the result, [B, H, S_q, D], readable by the memory engine as q, k and v (`_hopper_flash.cannot_read`).
        lse: logarithm to base 2 of the softmax's denominators, [B, H, S_q] in fp32, contiguous.
        delta: sums of out * grad, likewise.
        key_config: how the kernel for keys and values runs.
        query_config: how the kernel for queries runs.
    """
    dq, dk, dv = output(q), output(k), output(v)
    with on_device_of(q):
        launch(key_kernel, *call_keys(q, k, v, grad, [lse, delta, dk, dv], is_causal, scale, key_config))
        launch(query_kernel, *call_queries(q, k, v, grad, [lse, delta, dq], is_causal, scale, query_config))
    return dq, dk, dv
