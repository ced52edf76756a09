"""What qk_norm_rope's forward and backward share in plain torch: options, checks, the references' steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("none", "rms_head", "rms_full", "layer_head")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Spec(NamedTuple):
    """The options of qk_norm_rope that are not tensors."""

    norm: str
    eps: float
    weight_offset: float
    rotary_dim: int
    interleaved: bool
    cos_lanes: Sequence[int]
    sin_lanes: Sequence[int]


def require(op: str, ok: bool, argument: str, value: object, allowed: str) -> None:
    """Raises ValueError naming the op, the argument, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {argument} is {value}; allowed: {allowed}")


def _check_table(op: str, name: str, table: Tensor | None, lanes: Sequence[int], q: Tensor, rotary_dim: int) -> None:
    if rotary_dim == 0:
        require(op, table is None, name, "given", "None when rotary_dim is 0")
        return
    batch, length = q.shape[:2]
    if table is None:
        require(op, False, name, None, f"a [B or 1, S, ...] table when rotary_dim is {rotary_dim}")
        return
    require(op, table.dim() == 3, f"{name}.shape", tuple(table.shape), "three dimensions, [B or 1, S, ...]")
    require(op, table.device == q.device, f"{name}.device", table.device, f"the heads', {q.device}")
    require(op, table.dtype.is_floating_point, f"{name}.dtype", table.dtype, "a floating-point dtype")
    require(op, table.shape[1] == length, f"{name}.shape[1]", table.shape[1], f"the heads' length {length}")
    # 1 first: it is known without a guard when the batch is symbolic
    require(op, table.shape[0] == 1 or table.shape[0] == batch, f"{name}.shape[0]", table.shape[0],
            f"1 or the heads' batch {batch}")  # fmt: skip
    require(op, len(lanes) == 3 and lanes[0] >= 1 and min(lanes) >= 0, f"{name}_lanes", list(lanes),
            "[mult >= 1, first >= 0, second >= 0]")  # fmt: skip
    last = lanes[0] * (rotary_dim // 2 - 1) + max(lanes[1:])
    require(op, last < table.shape[2], f"{name}_lanes", list(lanes),
            f"lanes below {name}.shape[2] = {table.shape[2]}; the last one used is {last}")  # fmt: skip


def check_tables(op: str, q: Tensor, cos: Tensor | None, sin: Tensor | None, spec: Spec) -> None:
    """Raises ValueError unless cos and sin are tables for heads q [B, S, H, D]."""
    _check_table(op, "cos", cos, spec.cos_lanes, q, spec.rotary_dim)
    _check_table(op, "sin", sin, spec.sin_lanes, q, spec.rotary_dim)


def check(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
          cos: Tensor | None, sin: Tensor | None, spec: Spec) -> None:  # fmt: skip
    """Raises ValueError naming the argument, its value and what is allowed."""
    need = partial(require, "qk_norm_rope")
    for name, x in (("q", q), ("k", k)):
        need(x.dim() == 4, f"{name}.shape", tuple(x.shape), "four dimensions, [B, S, H, D]")
        need(x.dtype in (*DTYPES, torch.float64), f"{name}.dtype", x.dtype, "fp32, bf16, fp16 or fp64")
    batch, length, _, dim = q.shape
    need(k.shape[0] == batch and k.shape[1] == length and k.shape[3] == dim, "k.shape", tuple(k.shape),
             f"q's but for the number of heads: [{batch}, {length}, Hk, {dim}]")  # fmt: skip
    need(k.dtype == q.dtype, "k.dtype", k.dtype, f"q's, {q.dtype}")
    need(k.device == q.device, "k.device", k.device, f"q's, {q.device}")
    need(spec.norm in NORMS, "norm", repr(spec.norm), ", ".join(NORMS))
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        if weight is not None:
            sizes = (dim, x.shape[2] * dim)
            need(spec.norm != "none", name, "given", "None when norm is 'none'")
            need(weight.numel() in sizes, f"{name}.numel()", weight.numel(), f"D or H * D: {sizes}")
            need(weight.is_contiguous(), f"{name}.stride()", weight.stride(), "contiguous")
            need(weight.device == q.device, f"{name}.device", weight.device, f"q's, {q.device}")
    rotary = spec.rotary_dim
    need(0 <= rotary <= dim and rotary % 2 == 0, "rotary_dim", rotary, f"an even number, 0 to D = {dim}")
    check_tables("qk_norm_rope", q, cos, sin, spec)


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalise(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """x * rstd (of x - mean for layer_head) and rstd, for x [B, S, H, D]."""
    if spec.norm == "layer_head":
        x = x - x.mean(-1, keepdim=True)
    dims = (-2, -1) if spec.norm == "rms_full" else (-1,)
    rstd = torch.rsqrt((x * x).mean(dims, keepdim=True) + spec.eps)
    return x * rstd, rstd


def scale(weight: Tensor, like: Tensor, spec: Spec) -> Tensor:
    """What the normalised values [B, S, H, D] are multiplied with: weight + weight_offset, [1 or H, D]."""
    return weight.to(like.dtype).reshape(-1, like.shape[-1]) + spec.weight_offset


def table_values(table: Tensor, lanes: Sequence[int], spec: Spec,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The table's values for the pairs' first and second lanes, [B or 1, S, 1, R / 2] each."""
    mult, pairs = lanes[0], spec.rotary_dim // 2
    first, second = (table[..., at : at + mult * (pairs - 1) + 1 : mult] for at in lanes[1:])
    return first.to(dtype).unsqueeze(2), second.to(dtype).unsqueeze(2)


def split_pairs(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the second lanes of the rotary pairs of x [.., D], and the lanes that do not rotate."""
    rotary, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.interleaved:
        return rotary[..., 0::2], rotary[..., 1::2], rest
    half = spec.rotary_dim // 2
    return rotary[..., :half], rotary[..., half:], rest


def join_pairs(x1: Tensor, x2: Tensor, rest: Tensor, spec: Spec) -> Tensor:
    """The reverse of split_pairs."""
    rotary = torch.stack((x1, x2), -1).flatten(-2) if spec.interleaved else torch.cat((x1, x2), -1)
    return torch.cat((rotary, rest), -1)
