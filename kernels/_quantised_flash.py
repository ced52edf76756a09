"""`_hopper_quantised`'s arithmetic in plain Triton, for other GPUs with FP8 (compute capability 8.9 and later)."""

from typing import Any

from torch import Tensor

from ._ops import INTERPRETED, tl, triton
from ._quantise import Quantised, to_fp8

TILE = 64  # keys
BLOCK_M = 64


@triton.jit(do_not_specialize=["length"])  # why: `_hopper_quantised_kernel`
def kernel(q8, k8, v8, q_scale, kv_scale, out, q_length, length, q_rows, k_rows, H: tl.constexpr,
           GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
           BLOCK_M: tl.constexpr, N: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """A tile of queries of one head a program."""
    tiles = tl.cdiv(q_length, BLOCK_M)
    pair, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    kv = (pair // H) * (H // GROUP) + pair % H // GROUP
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lane, place = tl.arange(0, WIDTH), tl.arange(0, N)
    # Keys in the order of the values' (`_quantise`).
    key = (place & -16) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2 + (place & 1)
    q_at = pair.to(tl.int64) * q_rows + row
    stored = (lane < LANES)[None, :]
    q = tl.load(q8 + q_at[:, None] * LANES + lane[None, :], stored, 0)
    row_scale = tl.load(q_scale + q_at)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    unit = top
    v_log = 0.0
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, (tile + 1) * BLOCK_M)
    for first in range(0, end, N):
        k_at = kv.to(tl.int64) * k_rows + first + key
        k = tl.load(k8 + k_at[:, None] * LANES + lane[None, :], stored, 0)
        scales = kv_scale + (kv * (k_rows // N) + first // N) * 2
        scale = row_scale * tl.load(scales)
        new_v_log = tl.load(scales + 1)
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
        seen = (first + key < length)[None, :]
        if CAUSAL:
            seen = seen & (first + key[None, :] <= row[:, None])
        s = tl.where(seen, s, -float("inf"))
        largest = tl.max(s, 1) * scale
        top = tl.maximum(top, largest)
        new_unit = tl.maximum(largest, top - 24.0)
        safe = tl.where(new_unit == -float("inf"), 0.0, new_unit)
        p = tl.exp2(s * scale[:, None] + (8.807354922057604 - safe)[:, None])  # the largest weight is 448
        decay = tl.exp2(unit - safe)
        total = total * decay + tl.sum(p, 1)
        v_at = (kv.to(tl.int64) * D + lane)[:, None] * k_rows + first + place[None, :]
        v = tl.load(v8 + v_at, (lane < D)[:, None], 0.0)
        p8 = to_fp8(tl.minimum(p, 448.0), INTERPRETED)
        acc = acc * (decay * tl.exp2(v_log - new_v_log))[:, None] + tl.dot(p8, tl.trans(v))
        unit, v_log = new_unit, new_v_log
    acc = acc * (tl.exp2(v_log + tl.zeros([BLOCK_M], tl.float32)) / total)[:, None]
    at = ((pair // H).to(tl.int64) * q_length + row) * H + pair % H
    tl.store(out + at[:, None] * D + lane[None, :], acc.to(out.dtype.element_ty),
             (row < q_length)[:, None] & (lane < D)[None, :])  # fmt: skip


def call(
    q: Tensor, k: Tensor, is_causal: bool, quantised: Quantised, out: Tensor
) -> tuple[int, list[Any], dict[str, Any]]:
    """How to launch `kernel`: grid, arguments and constants."""
    batch, heads, q_length, dim = q.shape
    lanes = quantised.q8.shape[1]
    arguments = [*quantised, out, q_length, k.shape[2], quantised.q8.shape[0] // (batch * heads), quantised.v8.shape[1]]
    constants = {
        "H": heads, "GROUP": heads // k.shape[1], "CAUSAL": is_causal, "D": dim, "LANES": lanes,
        "WIDTH": triton.next_power_of_2(dim), "BLOCK_M": BLOCK_M, "N": TILE,
        "INTERPRETED": INTERPRETED, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    return -(-q_length // BLOCK_M) * batch * heads, arguments, constants
