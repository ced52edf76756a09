"""FlashAttention-2's forward pass (Dao, arXiv:2307.08691) over a band of keys, for one or two parts of the head dim.

    scores = (q1 @ k1.T + q2 @ k2.T) * scale        q1, q2: the first D1 and the last D2 lanes of q; D2 may be 0
    weights = softmax(scores) over the keys j of query i with i - left <= j <= i + right, of which `keep` keeps some
    out = [weights @ v1, weights @ v2]; lse = log(sum(exp(scores)))

With a soft cap, the scores are cap * tanh(scores / cap) from there on. A sink is one more score of each head, whose
weight is nobody's: exp(sink) joins the sum, also in lse.

One pass over tiles of keys with a running maximum and sum, in fp32; the weights are rounded to the inputs' dtype for
the second product; the result is rounded once. Tiles without any key of the band, or before the first and after the
last kept key of the batch, are skipped; only tiles on an edge, and those of a batch with holes, are masked. Late
tiles of queries start first: under a causal mask they have most keys. The last tile of keys of an uneven length
starts earlier and masks the keys it has seen, so that no load needs a mask.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

from torch_fuse._compat import likely

from ._calls import Call
from ._ops import INTERPRETED, tl, triton

# Head dims, each in one or two powers of two that a matrix instruction takes.
PARTS = {32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 160: (128, 32),
         256: (256, 0)}  # fmt: skip


class Config(NamedTuple):
    """A tile of queries, a tile of keys, and how they are run; the benchmarks' --sweep tries others.

    A limit of registers a thread needs an opaque op: Inductor drops it when it launches the kernel itself.
    """

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    wave: int = 0
    maxnreg: int | None = None


class Band(NamedTuple):
    """Which keys a query sees: none further back than `left`, none further ahead than `right`; None: any distance."""

    left: int | None = None
    right: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As constants of a kernel."""
        return {
            "HAS_LEFT": self.left is not None, "LEFT": self.left or 0,
            "HAS_RIGHT": self.right is not None, "RIGHT": self.right or 0,
        }  # fmt: skip


@triton.jit
def load_parts(pointer, exists, lane1, lane2, D2: tl.constexpr):
    """The lanes of rows that exist, zeros for others, in two parts; without a second part, the first one twice."""
    x1 = tl.load(pointer + lane1, exists, other=0.0)
    x2 = x1
    if D2 > 0:
        x2 = tl.load(pointer + lane2, exists, other=0.0)
    return x1, x2


@triton.jit
def dot_parts(a1, a2, b1, b2, D2: tl.constexpr):
    """[a1, a2] @ [b1, b2].T"""
    product = tl.dot(a1, tl.trans(b1))
    if D2 > 0:
        product = tl.dot(a2, tl.trans(b2), product)
    return product


@triton.jit
def store_parts(pointer, x1, x2, exists, lane1, lane2, D2: tl.constexpr):
    """Writes both parts of rows that exist."""
    tl.store(pointer + lane1, x1.to(pointer.dtype.element_ty), exists)
    if D2 > 0:
        tl.store(pointer + lane2, x2.to(pointer.dtype.element_ty), exists)


@triton.jit
def in_band(seen, index, key, LEFT: tl.constexpr, RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Where `seen`, whether each query sees each key."""
    if HAS_RIGHT:
        seen = seen & (key <= index + RIGHT)
    if HAS_LEFT:
        seen = seen & (key >= index - LEFT)
    return seen


@triton.jit
def tanh_of(s, rate):
    """tanh(s * rate / (2 * log2(e))), with an absolute error below 2**-20, also where it saturates.

    `tanh.approx` is one instruction, but its error is 2**-11; 1 / x takes more of them than the square of a root.
    """
    y = tl.rsqrt(tl.exp2(s * rate) + 1.0)
    return 1.0 - 2.0 * y * y


@triton.jit
def cap_rate(log2_scale, SOFTCAP: tl.constexpr):
    """`tanh_of`'s rate for capped scores."""
    return log2_scale * (2.0 / SOFTCAP)


@triton.jit
def key_tiles(first_row, q_length, length, ranges, b, ranges_b, LEFT: tl.constexpr, RIGHT: tl.constexpr,
              HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """The tiles of keys [start, end) that a tile of queries sees, of which [solid, full) need no mask."""
    last_row = tl.minimum(first_row + BLOCK_M, q_length) - 1
    low, high, solid_key, full_key = 0, length, 0, length
    if HAS_RIGHT:
        high = tl.minimum(high, tl.maximum(last_row + RIGHT + 1, 0))
        full_key = tl.minimum(full_key, tl.maximum(first_row + RIGHT + 1, 0))
    if HAS_LEFT:
        low = tl.maximum(low, first_row - LEFT)
        solid_key = tl.maximum(solid_key, last_row - LEFT)
    if KEEP:
        first_kept = tl.load(ranges + b * ranges_b)
        end_kept = tl.load(ranges + b * ranges_b + 1)
        holes = tl.load(ranges + b * ranges_b + 2)
        low, high = tl.maximum(low, first_kept), tl.minimum(high, end_kept)
        solid_key = tl.maximum(solid_key, first_kept)
        full_key = tl.where(holes > 0, 0, tl.minimum(full_key, end_kept))
    return low // BLOCK_N, tl.cdiv(high, BLOCK_N), tl.cdiv(solid_key, BLOCK_N), full_key // BLOCK_N


@triton.jit
def _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, keep, j, solid, full, length, index, log2_scale,
            rate, lane1, lane2, D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr,
            HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, CAPPED: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Takes the j-th tile of keys into account: into sums, their weights' total, and the largest score."""
    col = tl.arange(0, BLOCK_N)
    first = tl.minimum(j * BLOCK_N, length - BLOCK_N)
    k += first.to(tl.int64) * k_s + col[:, None] * k_s
    v += first.to(tl.int64) * v_s + col[:, None] * v_s
    s = tl.dot(q1, tl.trans(tl.load(k + lane1)))
    if D2 > 0:
        s = tl.dot(q2, tl.trans(tl.load(k + lane2)), s)
    if CAPPED:
        s = tanh_of(s, rate)
    masked = j >= full
    if HAS_LEFT or KEEP:
        masked = masked | (j < solid)
    if masked:
        key = (first + col)[None, :]
        seen = in_band(key >= j * BLOCK_N, index[:, None], key, LEFT, RIGHT, HAS_LEFT, HAS_RIGHT)
        if KEEP:
            seen = seen & (tl.load(keep + first + col) != 0)[None, :]
        s = tl.where(seen, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top * log2_scale)  # no inf - inf before the first score
    p = tl.exp2(tl.fma(s, log2_scale, -shift[:, None]))  # one rounding: large scores lose nothing
    decay = tl.exp2(top * log2_scale - shift)
    total = total * decay + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    acc1 = tl.dot(p, tl.load(v + lane1), acc1 * decay[:, None])
    if D2 > 0:
        acc2 = tl.dot(p, tl.load(v + lane2), acc2 * decay[:, None])
    return acc1, acc2, new_top, total


@triton.jit
def kernel(q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, keep, keep_b, ranges, ranges_b, out, lse,
            batch, q_length, length, log2_scale, sinks, H: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr,
            D2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr,
            HAS_RIGHT: tl.constexpr, KEEP: tl.constexpr, LSE: tl.constexpr, SOFTCAP: tl.constexpr,
            SINKS: tl.constexpr, WAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            INTERPRET: tl.constexpr):  # fmt: skip
    log2_scale = tl.cast(log2_scale, tl.float32)  # Inductor passes Python floats as float64
    rate = log2_scale
    if SOFTCAP > 0:  # `s` is between -1 and 1 then, and its scale the cap
        rate = cap_rate(log2_scale, SOFTCAP)
        log2_scale = tl.cast(SOFTCAP * 1.4426950408889634, tl.float32)
    program = tl.program_id(0)
    tiles = tl.cdiv(q_length, BLOCK_M)
    if WAVE:  # turn every other WAVE of programs round: an SM that began with long work goes on with short work
        first = program // WAVE * WAVE
        last = tl.minimum(first + WAVE, tiles * batch * H) - 1
        program = tl.where(first // WAVE % 2 == 1, last - (program - first), program)
    tile = tiles - 1 - program // (batch * H)
    b = (program % (batch * H) // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    lane1, lane2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2 if D2 > 0 else D1)[None, :]
    row = tl.arange(0, BLOCK_M)
    index = tile * BLOCK_M + row
    exists = (index < q_length)[:, None]

    q += b * q_b + h * q_h + (tile * BLOCK_M).to(tl.int64) * q_s
    k += b * k_b + h // GROUP * k_h
    v += b * v_b + h // GROUP * v_h
    keep += b * keep_b
    q1, q2 = load_parts(q + row[:, None] * q_s, exists, lane1, lane2, D2)
    acc1, acc2 = tl.zeros([BLOCK_M, D1], tl.float32), tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    top, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    start, end, solid, full = key_tiles(tile * BLOCK_M, q_length, length, ranges, b, ranges_b, LEFT, RIGHT, HAS_LEFT,
                                    HAS_RIGHT, KEEP, BLOCK_M, BLOCK_N)  # fmt: skip
    if INTERPRET:  # `while` is not pipelined, but Triton 3.6's interpreter cannot take a range's bounds from NumPy 2.5
        j = start
        while j < end:
            acc1, acc2, top, total = _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, keep, j, solid, full,
                                             length, index, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT,
                                             HAS_LEFT, HAS_RIGHT, KEEP, SOFTCAP > 0, BLOCK_N)  # fmt: skip
            j += 1
    else:
        for j in tl.range(start, end):
            acc1, acc2, top, total = _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, keep, j, solid, full,
                                             length, index, log2_scale, rate, lane1, lane2, D2, LEFT, RIGHT,
                                             HAS_LEFT, HAS_RIGHT, KEEP, SOFTCAP > 0, BLOCK_N)  # fmt: skip

    highest = top * log2_scale
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * 1.4426950408889634
        shift = tl.maximum(highest, sink)
        shift = tl.where(shift == -float("inf"), 0.0, shift)
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.exp2(sink - shift)
        acc1, acc2 = acc1 * decay[:, None], acc2 * decay[:, None]
        highest = shift
    if LSE:  # in units of log2. A query without a key gives zeros; its +inf makes its weights zero in the backward pass
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
        found = tl.where(total == 0.0, float("inf"), highest + tl.log2(total))
        tl.store(lse + (b * H + h) * q_length + index, found, index < q_length)
    else:
        inverse = (1.0 / total)[:, None]
    out += ((b * q_length + tile * BLOCK_M) * H + h) * (D1 + D2)
    store_parts(out + row[:, None] * (H * (D1 + D2)), acc1 * inverse, acc2 * inverse, exists, lane1, lane2, D2)


def cannot_read(**tensors: Tensor) -> str | None:
    """Why the kernels cannot take the tensors' strides, or None."""
    for name, x in tensors.items():
        if x.stride(3) != 1:
            return f"{name}.stride(3) is {x.stride(3)}; allowed: 1"
        if likely(x.stride(2) >= 2**23):
            return f"{name}.stride(2) is {x.stride(2)}; allowed: below 2**23"
    return None


def output(q: Tensor) -> Tensor:
    """The result's memory [B, S_q, H, D]. The kernel gets this, no view: Inductor would copy a view that is written."""
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim)


def call(q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None, band: Band, scale: float,
         config: Config, out: Tensor, lse: Tensor | None = None, softcap: float = 0.0,
         sinks: Tensor | None = None) -> tuple[int, list[Any], dict[str, Any]]:  # fmt: skip
    """How to launch `kernel`: grid, arguments and constants."""
    batch, heads, length, dim = q.shape
    d1, d2 = PARTS[int(dim)]
    keep, ranges = (q, q) if key_keep is None or key_range is None else (key_keep, key_range)
    arguments = [
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
        keep, batch_stride(keep), ranges, batch_stride(ranges), out, out if lse is None else lse,
        batch, length, k.shape[2], scale * math.log2(math.e), q if sinks is None else sinks,
    ]  # fmt: skip
    constants = {
        "H": int(heads), "GROUP": int(heads) // int(k.shape[1]), "D1": d1, "D2": d2, **band.arguments(),
        "KEEP": key_keep is not None, "LSE": lse is not None, "SOFTCAP": float(softcap), "SINKS": sinks is not None,
        "WAVE": config.wave, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "INTERPRET": INTERPRETED,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    }  # fmt: skip
    return triton.cdiv(length, config.block_m) * batch * heads, arguments, constants


def attend(made: Call, q: Tensor, k: Tensor, v: Tensor, key_keep: Tensor | None, key_range: Tensor | None, band: Band,
           scale: float, config: Config, lse: Tensor | None = None, softcap: float = 0.0,
           sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """Launches the kernel in a call of an opaque op.

    Returns the result, [B, H, S_q, D], the transpose of what is contiguous; writes its log-sum-exp in units of log2
    into `lse` [B, H, S_q].
    """
    _, heads, length, dim = q.shape
    out = made.empty(q.shape, q.dtype, (length * heads * dim, dim, heads * dim, 1))
    made.launch(kernel, *call(q, k, v, key_keep, key_range, band, scale, config, out, lse, softcap, sinks))
    return out


def batch_stride(x: Tensor) -> int:
    """How far the next batch is; one row serves all."""
    return 0 if x.shape[0] == 1 else x.stride(0)
