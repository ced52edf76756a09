"""Attention of INT8 queries and keys and FP8 values for Hopper: FlashAttention-3's structure, SageAttention2's numbers.

    scores = q8 @ k8.T                                  INT8 tensor cores, exact in int32
    weights = exp2(scores * scale - unit + log2(448))   FP8; unit: the largest score of the row in this tile of keys
    sums = sums * decay + weights @ v8                  FP8 tensor cores over one tile; from tile to tile in fp32

The unit is a tile's own, so that its weights fill FP8's range wherever the largest of all scores is; `decay` changes
the sums from one tile's unit, and its values' scale, to the next's, in the multiplication that rescales them anyway.
Units stay within 2^-24 of the largest, so that sums stay finite. (SageAttention2: Zhang et al., arXiv:2411.10958.)

Warps and tiles are as in `_hopper_flash`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._flash import PARTS
from ._hopper_flash import HALF_L2, MISSING, Config
from ._hopper_quantised_kernel import gl, kernel
from ._quantise import Quantised

__all__ = ["MISSING", "Config", "call", "kernel"]


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    kind = gl.int8 if x.dtype == torch.int8 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def call(q: Tensor, k: Tensor, is_causal: bool, config: Config, quantised: Quantised,
         out: Tensor) -> tuple[int, Sequence[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `kernel`: grid, arguments and constants."""
    batch, heads, q_length, dim = q.shape
    length, per_key = k.shape[2], heads // k.shape[1]
    q8, k8, v8, q_scale, kv_scale = quantised
    d1, d2 = PARTS[dim]
    together = max(1, min(batch * heads, HALF_L2 // (2 * length * dim) * per_key))
    q_rows, k_rows = q8.shape[0] // (batch * heads), v8.shape[1]
    n = config.block_n
    second = [_descriptor(q8, 64, 32), _descriptor(k8, n, 32), _descriptor(v8, d2, n)] if d2 else [None] * 3
    arguments = [
        _descriptor(q8, 64, d1), second[0], _descriptor(k8, n, d1), second[1], _descriptor(v8, d1, n), second[2],
        q_scale, kv_scale, out, batch, q_length, length, q_rows, k_rows, together,
    ]  # fmt: skip
    constants = {
        "H": heads, "HEADS_OF_KEY": per_key, "CAUSAL": is_causal, "D1": d1, "D2": d2, "GROUPS": config.groups,
        "N": n, "STAGES": config.stages, "REGISTERS": config.registers, "num_warps": 4,
        **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    }  # fmt: skip
    grid = -(-q_length // (64 * config.groups)) * batch * heads
    if config.programs is not None:
        grid = min(grid, config.programs * torch.cuda.get_device_properties(q.device).multi_processor_count)
    return grid, arguments, constants
