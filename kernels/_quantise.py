"""Query and key as INT8, value as FP8 (e4m3), for `quantised_attention`, in two small kernels.

    q' = (q * balance) @ H            k' = ((k - mean) / balance) @ H         softmax(q' k'.T) = softmax(q k.T)
    q' = q8 * scale of its row        k' = k8 * scale of its tile             v = v8 * scale of its tile

- mean: of the keys (SageAttention, Zhang et al., arXiv:2410.02367): a constant in all scores of a query is nothing.
- balance: powers of two that make query and key equally large in a lane (SmoothQuant, Xiao et al., arXiv:2211.10438).
- H: Hadamard's matrix over 32 lanes, which spreads an outlier over them (QuaRot, Ashkboos et al., arXiv:2404.00456).

None of them changes the weights, whatever mean and balance are, so both are taken of 128 rows, evenly spread over the
sequence. FP8 is a floating-point format: a scale for each tile of keys is as good as one for each lane, and needs no
pass over the values before.

- q8 [B * H * q_rows, lanes], k8 [B * H_kv * k_rows, lanes], int8: rows padded to whole tiles, lanes to whole 32s.
- v8 [B * H_kv * D, k_rows], float8_e4m3fn: transposed; of each 16 keys, those at 4t + 2j + e are 8j + 2t + e, the
  order in which a thread has scores and, for the second product, wants weights.
- q_scale [B * H * q_rows], fp32: with the softmax's scale and log2(e).
- kv_scale [B * H_kv * k_rows / tile, 2], fp32: the keys' scale and log2 of the values'.

Anything not finite makes the scale it belongs to NaN, and with it the result.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import INTERPRETED, tl, triton

SAMPLES = 128
LOG2_E = 1.4426950408889634
LANES = {64: 64, 80: 96, 96: 96, 128: 128}  # of query and key, by head dim


class Quantised(NamedTuple):
    """Query, key, value and their scales."""

    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    kv_scale: Tensor


@triton.jit
def _offsets(b, h, row, lane, stride_b, stride_h, stride_s):
    return b.to(tl.int64) * stride_b + h * stride_h + row[:, None].to(tl.int64) * stride_s + lane[None, :]


@triton.jit
def statistics_kernel(q, k, v, found, q_length, length, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
                      H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                      SAMPLES: tl.constexpr):  # fmt: skip
    """Of one key head: the keys' mean, the balance, the largest value, each of a sample.

    found [B * H_kv, 4, WIDTH]: mean / balance, balance, 1 / balance, largest value.
    """
    pair = tl.program_id(0)
    b, kv = pair // (H // GROUP), pair % (H // GROUP)
    lane = tl.arange(0, WIDTH)
    sample = tl.arange(0, SAMPLES).to(tl.int64)
    exists = (lane < D)[None, :]
    row = sample * length // SAMPLES
    head = kv * GROUP + tl.arange(0, SAMPLES) % GROUP
    q_row = sample * q_length // SAMPLES
    q_at = b.to(tl.int64) * q_b + head[:, None].to(tl.int64) * q_h + q_row[:, None] * q_s + lane[None, :]
    keys = tl.load(k + _offsets(b, kv, row, lane, k_b, k_h, k_s), exists, 0.0)
    queries = tl.load(q + q_at, exists, 0.0)
    values = tl.load(v + _offsets(b, kv, row, lane, v_b, v_h, v_s), exists, 0.0).to(tl.float32)
    keys, queries = keys.to(tl.float32), queries.to(tl.float32)
    mean = tl.sum(keys, 0) / SAMPLES
    rest = keys - mean[None, :]
    of_keys = tl.sum(rest * rest, 0)
    of_queries = tl.sum(queries * queries, 0)
    exponent = tl.floor(0.25 * (tl.log2(of_keys + 1e-20) - tl.log2(of_queries + 1e-20)) + 0.5)
    exponent = tl.where(exponent == exponent, tl.minimum(tl.maximum(exponent, -12.0), 12.0), 0.0)
    at = found + pair * 4 * WIDTH + lane
    inverse = tl.exp2(-exponent)
    tl.store(at, mean * inverse)
    tl.store(at + WIDTH, tl.exp2(exponent))
    tl.store(at + 2 * WIDTH, inverse)
    tl.store(at + 3 * WIDTH, tl.max(tl.abs(values)) + 0.0 * mean)


@triton.jit
def _rotated(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr):
    """x @ H, for each 32 lanes; H's columns have norm sqrt(32). In bf16, which the interpreter cannot multiply."""
    i = tl.arange(0, 32)
    common = i[:, None] & i[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    dtype: tl.constexpr = tl.float32 if INTERPRETED else tl.bfloat16
    h = (1 - 2 * (common & 1)).to(dtype)
    y = tl.dot(tl.reshape(x.to(dtype), (ROWS * WIDTH // 32, 32)), h)
    return tl.reshape(y, (ROWS, WIDTH))


@triton.jit
def _rounded(x):
    """To the nearest integer, as int8; x between -127 and 127. The sum's last bits are the integer's."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, least, axis: tl.constexpr, INTERPRETED: tl.constexpr):
    """The largest magnitude, `least` at least; NaN where anything is not finite."""
    if INTERPRETED:  # noqa: SIM108 (known when it is compiled)
        found = tl.max(tl.abs(x), axis) + tl.sum(x * 0.0, axis)
    else:
        found = tl.reduce(tl.abs(x), axis, _nan_maximum)
    return tl.maximum(found, least) + found * 0.0


@triton.jit
def to_fp8(x, INTERPRETED: tl.constexpr):
    """Rounded to nearest. Triton's interpreter loses the carry where that makes the exponent larger."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def _load(x, b, h, row, length, stride_b, stride_h, stride_s, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a head in fp32, the last one again past its length, zero past its lanes.

    A row past the end is read as any number: it makes no scale larger, and a mask would cost an instruction a number.
    """
    lane = tl.arange(0, WIDTH)
    at = x + _offsets(b, h, tl.minimum(row, length - 1), lane, stride_b, stride_h, stride_s)
    if D == WIDTH:
        return tl.load(at).to(tl.float32)
    else:  # noqa: RET505 (which of the two is known when it is compiled)
        return tl.load(at, (lane < D)[None, :], 0.0).to(tl.float32)


@triton.jit
def _query(q, found, q8, q_scale, program, q_length, q_rows, factor, q_b, q_h, q_s, H: tl.constexpr,
           GROUP: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
           ROWS: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, WIDTH)
    tiles = q_rows // ROWS
    pair, row = program // tiles, program % tiles * ROWS + tl.arange(0, ROWS)
    b, h = pair // H, pair % H
    balance = tl.load(found + ((b * (H // GROUP) + h // GROUP) * 4 + 1) * WIDTH + lane)
    x = _load(q, b, h, row, q_length, q_b, q_h, q_s, D, WIDTH)
    x = _rotated(x * balance[None, :], ROWS, WIDTH, INTERPRETED)
    scale = _largest(x, 1e-15, 1, INTERPRETED)
    at = pair.to(tl.int64) * q_rows + row
    tl.store(q8 + at[:, None] * LANES + lane[None, :], _rounded(x * (127.0 / scale)[:, None]), (lane < LANES)[None, :])
    tl.store(q_scale + at, scale * (factor / (127.0 * 32.0)))


@triton.jit
def _key(k, found, k8, kv_scale, program, length, k_rows, k_b, k_h, k_s, KV: tl.constexpr, D: tl.constexpr,
         LANES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, WIDTH)
    tiles = k_rows // TILE
    pair, tile = program // tiles, program % tiles
    row = tile * TILE + tl.arange(0, TILE)
    mean = tl.load(found + pair * 4 * WIDTH + lane)
    inverse = tl.load(found + (pair * 4 + 2) * WIDTH + lane)
    x = _load(k, pair // KV, pair % KV, row, length, k_b, k_h, k_s, D, WIDTH)
    x = _rotated(x * inverse[None, :] - mean[None, :], TILE, WIDTH, INTERPRETED)
    scale = _largest(x, 1e-15, None, INTERPRETED)
    at = pair.to(tl.int64) * k_rows + row
    tl.store(k8 + at[:, None] * LANES + lane[None, :], _rounded(x * (127.0 / scale)), (lane < LANES)[None, :])
    tl.store(kv_scale + program * 2, scale / 127.0)


@triton.jit
def _value(v, found, v8, kv_scale, program, length, k_rows, v_b, v_h, v_s, KV: tl.constexpr, D: tl.constexpr,
           WIDTH: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, WIDTH)
    tiles = k_rows // TILE
    pair, tile = program // tiles, program % tiles
    place = tl.arange(0, TILE)
    row = tile * TILE + (place & -16) + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2 + (place & 1)
    x = _load(v, pair // KV, pair % KV, row, length, v_b, v_h, v_s, D, WIDTH)
    # Not far below the rest: the kernel's sums are in units of this scale.
    least = tl.maximum(tl.load(found + (pair * 4 + 3) * WIDTH) * 9.5367431640625e-07, 1e-15)
    scale = _largest(x, least, None, INTERPRETED) / 448.0
    x = tl.trans(x * (1.0 / scale))  # to 448 and its rounding, which FP8's takes
    at = (pair.to(tl.int64) * D + lane)[:, None] * k_rows + tile * TILE + place[None, :]
    tl.store(v8 + at, to_fp8(x, INTERPRETED), (lane < D)[:, None])
    tl.store(kv_scale + program * 2 + 1, tl.log2(scale))


@triton.jit(do_not_specialize=["length"])  # why: `_hopper_quantised_kernel`
def quantise_kernel(q, k, v, found, q8, k8, v8, q_scale, kv_scale, q_length, length, q_rows, k_rows, q_programs,
                    k_programs, factor, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, H: tl.constexpr,
                    GROUP: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
                    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
                    INTERPRETED: tl.constexpr):  # fmt: skip
    """Tiles of queries, then of keys, then of values, one after the other: the next is loaded under this one."""
    first, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(first, q_programs, step, num_stages=STAGES):
        _query(q, found, q8, q_scale, tile, q_length, q_rows, factor, q_b, q_h, q_s, H, GROUP, D, LANES, WIDTH,
               ROWS, INTERPRETED)  # fmt: skip
    for tile in tl.range(first, k_programs, step, num_stages=STAGES):
        _key(k, found, k8, kv_scale, tile, length, k_rows, k_b, k_h, k_s, H // GROUP, D, LANES, WIDTH, TILE,
             INTERPRETED)  # fmt: skip
    for tile in tl.range(step - 1 - first, k_programs, step, num_stages=STAGES):
        _value(v, found, v8, kv_scale, tile, length, k_rows, v_b, v_h, v_s, H // GROUP, D, WIDTH, TILE, INTERPRETED)


ROWS = 64  # queries a tile; twice as many where head_dim is 64
STAGES = 3  # tiles in flight
# Programs a multiprocessor, and the registers a thread that so many have; by WIDTH.
RESIDENT = {64: (3, 80), 128: (2, 128)}


def empty(q: Tensor, k: Tensor, tile: int, q_multiple: int) -> Quantised:
    """Where the results go: for tiles of `tile` keys and `q_multiple` queries, a multiple of 64."""
    batch, heads, q_length, dim = q.shape
    pairs = batch * k.shape[1]
    q_rows, k_rows = -(-q_length // q_multiple) * q_multiple, -(-k.shape[2] // tile) * tile
    lanes = LANES[dim]
    return Quantised(
        q.new_empty(batch * heads * q_rows, lanes, dtype=torch.int8),
        q.new_empty(pairs * k_rows, lanes, dtype=torch.int8),
        q.new_empty(pairs * dim, k_rows, dtype=torch.float8_e4m3fn),
        q.new_empty(batch * heads * q_rows, dtype=torch.float32),
        q.new_empty(pairs * (k_rows // tile), 2, dtype=torch.float32),
    )


def statistics(q: Tensor, k: Tensor) -> Tensor:
    """Where the statistics of the samples go."""
    return q.new_empty(q.shape[0] * k.shape[1], 4, triton.next_power_of_2(q.shape[3]), dtype=torch.float32)


def calls(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int, found: Tensor, to: Quantised) -> list[Any]:
    """How to launch the two kernels: kernel, grid, arguments, constants."""
    batch, heads, q_length, dim = q.shape
    pairs, group, length = batch * k.shape[1], heads // k.shape[1], k.shape[2]
    strides = [x.stride(i) for x in (q, k, v) for i in range(3)]
    shared = {"H": heads, "GROUP": group, "D": dim}
    width = found.shape[2]
    programs, registers = RESIDENT[width]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    q_rows, k_rows = to.q8.shape[0] // (batch * heads), to.k8.shape[0] // pairs
    rows = 2 * ROWS if width == 64 and q_rows % (2 * ROWS) == 0 else ROWS
    q_programs, k_programs = to.q8.shape[0] // rows, to.k8.shape[0] // tile
    first = [q, k, v, found, q_length, length, *strides]
    second = [q, k, v, found, *to, q_length, length, q_rows, k_rows, q_programs, k_programs, scale * LOG2_E, *strides]
    return [
        (statistics_kernel, pairs, first, {**shared, "WIDTH": width, "SAMPLES": SAMPLES, "num_warps": 8}),
        (quantise_kernel, min(max(q_programs, k_programs), programs * processors), second,
         {**shared, "LANES": to.q8.shape[1], "WIDTH": width, "ROWS": rows, "TILE": tile, "STAGES": STAGES,
          "INTERPRETED": INTERPRETED, "num_warps": 8, "maxnreg": registers}),
    ]  # fmt: skip
