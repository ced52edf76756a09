"""Rotation without a norm for heads whose pairs do not fill 16-byte words: the other lanes are copied in wide words.

GPT-NeoX rotates 20 of 80 lanes. Lanes from the next multiple of 8 on are copied as they are, 16 bytes at a time; the
few below it are loaded in wide words too, and those that rotate read their partner a second time, from L1.
"""

from torch import Tensor

from ._ops import tl, triton
from ._qk_tile import pow2

# Rows (heads of a token) of one program's tile, and its warps.
FLAT_ROWS, FLAT_WARPS = 32, 4


def prefers_flat(q: Tensor, k: Tensor, norm: str, rotary_dim: int, interleaved: bool) -> bool:
    """Whether this kernel is the better one: no norm, and half pairs that do not start at 16-byte words."""
    dim = int(q.shape[3])
    wide = rotary_dim == dim and (rotary_dim // 2) % 8 == 0
    return norm == "none" and rotary_dim > 0 and not interleaved and not wide and dim % 8 == 0


def flat_tiles(x: Tensor) -> int:
    """Programs for one of q and k."""
    return -(-(x.shape[0] * x.shape[1] * x.shape[2]) // FLAT_ROWS)


@triton.jit
def _flat_tile(tile, n_tokens, length, x, x_b, x_s, x_h, x_d, out, cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d,
               H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
               C2: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, TURN: tl.constexpr,
               TURN_PAD: tl.constexpr, COPY_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]  # fewer than 2^31 rows; their offsets are int64
    t, h = row // H, (row % H).to(tl.int64)
    exists = t < n_tokens
    b, s = (t // length).to(tl.int64), (t % length).to(tl.int64)
    source = x + (b * x_b + s * x_s + h * x_h)
    result = out + row.to(tl.int64) * D
    if TURN < D:
        rest = TURN + tl.arange(0, COPY_PAD)[None, :]
        copied = exists & (rest < D)
        values = tl.load(source + rest * x_d, mask=copied)
    lane = tl.arange(0, TURN_PAD)[None, :]
    keep = exists & (lane < TURN)
    rotates = exists & (lane < R)
    first = lane < R // 2
    pair = tl.where(first, lane, lane - R // 2)
    partner = tl.where(first, lane + R // 2, lane - R // 2)
    raw = tl.load(source + lane * x_d, mask=keep)
    other = tl.load(source + partner * x_d, mask=rotates, other=0.0).to(tl.float32)
    c_lane = C0 * pair + tl.where(first, C1, C2)
    s_lane = S0 * pair + tl.where(first, S1, S2)
    cos_row, sin_row = cos + (b * cos_b + s * cos_s), sin + (b * sin_b + s * sin_s)
    c = tl.load(cos_row + c_lane * cos_d, mask=rotates, other=1.0).to(tl.float32)
    d = tl.load(sin_row + s_lane * sin_d, mask=rotates, other=0.0).to(tl.float32)
    own = raw.to(tl.float32)
    y = tl.where(lane < R, own * c + tl.where(first, -other, other) * d, own)
    tl.store(result + lane, y.to(out.dtype.element_ty), mask=keep)
    if TURN < D:
        tl.store(result + rest, values.to(out.dtype.element_ty), mask=copied)


@triton.jit
def flat_kernel(q, q_b, q_s, q_h, q_d, q_out, k, k_b, k_s, k_h, k_d, k_out, n_tokens, length, q_tiles,
                cos, cos_b, cos_s, cos_d, sin, sin_b, sin_s, sin_d, HQ: tl.constexpr, HK: tl.constexpr,
                D: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
                S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, TURN: tl.constexpr,
                TURN_PAD: tl.constexpr, COPY_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Programs below q_tiles rotate q, the others k."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        _flat_tile(tile, n_tokens, length, q, q_b, q_s, q_h, q_d, q_out, cos, cos_b, cos_s, cos_d, sin, sin_b,
                   sin_s, sin_d, HQ, D, R, C0, C1, C2, S0, S1, S2, TURN, TURN_PAD, COPY_PAD, ROWS)  # fmt: skip
    else:
        _flat_tile(tile - q_tiles, n_tokens, length, k, k_b, k_s, k_h, k_d, k_out, cos, cos_b, cos_s, cos_d, sin,
                   sin_b, sin_s, sin_d, HK, D, R, C0, C1, C2, S0, S1, S2, TURN, TURN_PAD, COPY_PAD,
                   ROWS)  # fmt: skip


def flat_lanes(dim: int, rotary_dim: int) -> dict[str, int]:
    """How many lanes the rotating part takes (a multiple of 8), and the powers of two that hold the parts."""
    turn = min(-(-rotary_dim // 8) * 8, dim)
    return {"TURN": turn, "TURN_PAD": pow2(turn), "COPY_PAD": pow2(max(dim - turn, 1))}


FLAT_ARGUMENTS = ("cos", "cos_b", "cos_s", "cos_d", "sin", "sin_b", "sin_s", "sin_d", "D", "R", "C0", "C1", "C2", "S0",
                  "S1", "S2")  # fmt: skip
