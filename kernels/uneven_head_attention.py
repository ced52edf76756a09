"""Attention for head dims that are no power of two, computed as two parts that are: 80 = 64 + 16, without padding.

    scores = (q1 @ k1.T + q2 @ k2.T) * scale        q1, q2: the first D1 and the last D2 lanes of q
    weights = softmax(scores), causal or over all keys
    out = [weights @ v1, weights @ v2]

Libraries pad such heads to the next power of two (128 for 80: 60% more work). The algorithm is FlashAttention-2's
(Dao, arXiv:2307.08691): one pass over tiles of keys with a running maximum and sum, in fp32; the weights are rounded
to the inputs' dtype for the second product; the result is rounded once. Causal tiles with most keys start first, so
that the short ones fill the end. Only tiles on the diagonal and the last one are masked; the last one of an uneven
length starts earlier and masks the keys it has seen, so that no load needs a mask.

- q [B, H, S_q, D]; k, v [B, H_kv, S_k, D], H a multiple of H_kv: each key head serves H / H_kv query heads.
  bfloat16 and float16 on a GPU, D in `HEAD_DIMS`, at least 64 keys, last stride 1 and other strides as they are
  (views into a projection); the rest is left to `torch.nn.functional.scaled_dot_product_attention`.
- is_causal: query i attends to keys 0 to i; needs S_q == S_k.
- scale: factor of the scores.
- Returns [B, H, S_q, D] in q's dtype, as the transpose of a contiguous [B, S_q, H, D].
- Raises ValueError, naming the argument, its value and what is allowed; NotImplementedError for a gradient.

Example:
    >>> q, k, v = torch.randn(3, 1, 2, 5, 48).unbind(0)
    >>> uneven_head_attention(q, k, v, True, 48**-0.5).stride()
    (480, 48, 96, 1)
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import INTERPRETED, define_op, no_triton, on_device_of, tl, triton, wrap_triton

# The two parts of each head dim, powers of two that a matrix instruction takes.
HEAD_DIMS = {48: (32, 16), 80: (64, 16), 96: (64, 32), 160: (128, 32)}
DTYPES = (torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """A tile of queries, a tile of keys, and how they are run; benchmarks/bench_attention.py --sweep tries others."""

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3
    wave: int = 0


# Two to four programs an SM by registers and shared memory, so that one's products hide another's softmax.
CONFIGS = {48: Config(), 80: Config(), 96: Config(), 160: Config(num_stages=2)}


def supports(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> str | None:
    """Why the Triton kernel cannot take these arguments (the op then runs its reference), or None."""
    reason = no_triton(q)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype is {q.dtype}; allowed: bfloat16, float16"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim is {q.shape[3]}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if not 0 < scale < math.inf:
        return f"scale is {scale}; allowed: positive numbers"
    block_n = CONFIGS[int(q.shape[3])].block_n
    if k.shape[2] < block_n:
        return f"there are {k.shape[2]} keys; allowed: {block_n} and more"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            return f"{name}.stride(3) is {x.stride(3)}; allowed: 1"
        if x.stride(2) >= 2**23:
            return f"{name}.stride(2) is {x.stride(2)}; allowed: below 2**23"
    return None


def reference(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The op in plain torch: differentiable, compilable, float64 for float64 inputs."""
    gqa = bool(q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _require(ok: bool, argument: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"uneven_head_attention: {argument} is {value}; allowed: {allowed}")


def _check(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.dim() == 4, f"{name}.shape", tuple(x.shape), "four dimensions [B, H, S, D]")
        _require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's {q.dtype}")
        _require(x.device == q.device, f"{name}.device", x.device, f"q's {q.device}")
    wanted = "[B, H_kv, S_k, D] with q's B and D, and H_kv a divisor of q's H"
    heads, kv_heads = q.shape[1], k.shape[1]
    ok = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    _require(ok and kv_heads > 0 and heads % kv_heads == 0, "k.shape", tuple(k.shape), wanted)
    _require(v.shape == k.shape, "v.shape", tuple(v.shape), f"k's {tuple(k.shape)}")
    if is_causal:
        _require(q.shape[2] == k.shape[2], "k.shape[2]", k.shape[2], f"q's {q.shape[2]} when is_causal")


@triton.jit
def _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, j, full, length, index, log2_scale, lane1, lane2,
            CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Takes the j-th tile of keys into account: into sums, their weights' total, and the largest score."""
    col = tl.arange(0, BLOCK_N)
    first = tl.minimum(j * BLOCK_N, length - BLOCK_N)
    k += first.to(tl.int64) * k_s + col[:, None] * k_s
    v += first.to(tl.int64) * v_s + col[:, None] * v_s
    s = tl.dot(q1, tl.trans(tl.load(k + lane1)))
    s = tl.dot(q2, tl.trans(tl.load(k + lane2)), s)
    if j >= full:
        keep = (first + col >= j * BLOCK_N)[None, :]
        if CAUSAL:
            keep = keep & (first + col[None, :] <= index[:, None])
        s = tl.where(keep, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top * log2_scale)  # no inf - inf before the first score
    p = tl.exp2(tl.fma(s, log2_scale, -shift[:, None]))  # one rounding: large scores lose nothing
    decay = tl.exp2(top * log2_scale - shift)
    total = total * decay + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    acc1 = tl.dot(p, tl.load(v + lane1), acc1 * decay[:, None])
    acc2 = tl.dot(p, tl.load(v + lane2), acc2 * decay[:, None])
    return acc1, acc2, new_top, total


@triton.jit
def _kernel(q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, out, batch, q_length, length, log2_scale,
            H: tl.constexpr, GROUP: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr,
            WAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    log2_scale = tl.cast(log2_scale, tl.float32)  # Inductor passes Python floats as float64
    program = tl.program_id(0)
    tiles = tl.cdiv(q_length, BLOCK_M)
    if WAVE:  # turn every other WAVE of programs round: an SM that began with long work goes on with short work
        start = program // WAVE * WAVE
        last = tl.minimum(start + WAVE, tiles * batch * H) - 1
        program = tl.where(start // WAVE % 2 == 1, last - (program - start), program)
    tile = tiles - 1 - program // (batch * H)
    b = (program % (batch * H) // H).to(tl.int64)
    h = (program % H).to(tl.int64)
    lane1, lane2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2)[None, :]
    row = tl.arange(0, BLOCK_M)
    index = tile * BLOCK_M + row
    exists = (index < q_length)[:, None]

    q += b * q_b + h * q_h + (tile * BLOCK_M).to(tl.int64) * q_s
    k += b * k_b + h // GROUP * k_h
    v += b * v_b + h // GROUP * v_h
    q1 = tl.load(q + row[:, None] * q_s + lane1, exists, other=0.0)
    q2 = tl.load(q + row[:, None] * q_s + lane2, exists, other=0.0)
    acc1, acc2 = tl.zeros([BLOCK_M, D1], tl.float32), tl.zeros([BLOCK_M, D2], tl.float32)
    top, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    # Tiles of keys before `full` need no mask.
    full, end = length // BLOCK_N, tl.cdiv(length, BLOCK_N)
    if CAUSAL:
        full = tile * BLOCK_M // BLOCK_N
        end = tl.cdiv(tl.minimum((tile + 1) * BLOCK_M, length), BLOCK_N)
    if INTERPRET:  # `while` is not pipelined, but Triton 3.6's interpreter cannot take a range's bounds from NumPy 2.5
        j = 0
        while j < end:
            acc1, acc2, top, total = _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, j, full, length, index,
                                             log2_scale, lane1, lane2, CAUSAL, BLOCK_N)  # fmt: skip
            j += 1
    else:
        for j in tl.range(0, end):
            acc1, acc2, top, total = _attend(acc1, acc2, top, total, q1, q2, k, k_s, v, v_s, j, full, length, index,
                                             log2_scale, lane1, lane2, CAUSAL, BLOCK_N)  # fmt: skip

    inverse = (1.0 / total)[:, None]
    out += ((b * q_length + tile * BLOCK_M) * H + h) * (D1 + D2)
    out_row = out + row[:, None] * (H * (D1 + D2))
    tl.store(out_row + lane1, (acc1 * inverse).to(out.dtype.element_ty), exists)
    tl.store(out_row + lane2, (acc2 * inverse).to(out.dtype.element_ty), exists)


def _output(q: Tensor) -> Tensor:
    """The result's memory [B, S_q, H, D]. The kernel gets this, no view: Inductor would copy a view that is written."""
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim)


def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    if q.numel() == 0:
        return _output(q).transpose(1, 2)
    if supports(q, k, v, is_causal, scale) is not None:
        return reference(q, k, v, is_causal, scale)
    out = _output(q)
    batch, heads, length, dim = q.shape
    config = CONFIGS[int(dim)]
    with on_device_of(q):
        wrap_triton(_kernel)[(triton.cdiv(length, config.block_m) * batch * heads,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], out,
            batch, length, k.shape[2], scale * math.log2(math.e),
            H=int(heads), GROUP=int(heads) // int(k.shape[1]), D1=HEAD_DIMS[int(dim)][0], D2=HEAD_DIMS[int(dim)][1],
            CAUSAL=is_causal, WAVE=config.wave, BLOCK_M=config.block_m, BLOCK_N=config.block_n, INTERPRET=INTERPRETED,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out.transpose(1, 2)


uneven_head_attention = define_op("torch_fuse::uneven_head_attention", _forward)


@uneven_head_attention.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    _check(q, k, v, is_causal)
    return _output(q).transpose(1, 2)


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    raise NotImplementedError(
        "uneven_head_attention has no gradient; use torch.nn.functional.scaled_dot_product_attention for training"
    )


uneven_head_attention.register_autograd(_no_gradient)
