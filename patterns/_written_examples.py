"""Attention written out in the ways that libraries write it, and things that only look like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.patterns._written_attentions import (
    SCALE,
    B,
    D,
    H,
    S,
    beta_zero,
    bias_and_causal,
    bias_cast_up,
    bias_scaled_with_scores,
    biased,
    bloom,
    causal,
    chosen,
    everything_in_float,
    float_softmax,
    grouped,
    in_place,
    later_or_absent,
    mask_in_float32,
    mask_scaled,
    old_bert,
    padding_added,
    padding_added_inf,
    padding_and_bias,
    padding_filled,
    padding_filled_inf,
    padding_scaled,
    padding_where,
    padding_written,
    plain,
    reshaped_heads,
    times_keys,
    window,
    written_to,
    written_to_twice,
)
from torch_fuse.rewrite.pattern import Example

Attend = Callable[..., Any]
Make = Callable[[torch.dtype], tuple[Attend, tuple[Any, ...]]]


def spellings() -> Iterator[Example]:
    """Models that become scaled_dot_product_attention."""
    for name, attend in _PLAIN.items():
        yield Example(name, _heads(attend))
    for name, attend in _MASKED.items():
        yield Example(name, _heads(attend))
    for name, attend in _BIASED.items():
        yield Example(name, _heads(attend, _positions(1, H, S, S)))
    yield Example("lengths_differ", _heads(plain, keys=5))
    yield Example("one_key_head", _heads(plain, kv=1))
    yield Example("grouped_heads", _heads(grouped, kv=1))
    yield Example("value_of_other_width", _heads(plain, value_dim=5))
    yield Example("bmm", _flat(lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)))
    yield Example("baddbmm_alibi", _flat(bloom, _positions(B * H, 1, S)))
    yield Example("baddbmm_beta_0", _flat(beta_zero))
    yield Example("bmm_of_reshaped_heads", _heads(reshaped_heads))
    yield Example("einsum_bqhd", _einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"))
    yield Example("einsum_operands_swapped", _einsum("bkhd,bqhd->bhqk", "bkhd,bhqk->bqhd"))
    yield Example("padding_added_without_gradients", _heads(padding_added, _padding, grad=False))
    yield Example("padding_scaled_with_scores", _heads(padding_scaled, _padding, grad=False))
    yield Example("padding_of_minus_infinity_added", _heads(padding_added_inf, _padding, grad=False))
    yield Example("padding_filled", _heads(padding_filled, _padding))
    yield Example("padding_written_into_scores", _heads(padding_written, _padding))
    yield Example("padding_filled_with_minus_infinity", _heads(padding_filled_inf, _padding))
    yield Example("padding_filled_before_a_bias", _heads(padding_and_bias, _padding, _positions(1, H, S, S)))
    yield Example("padding_chosen_by_where", _heads(padding_where, _padding))


def near_misses() -> Iterator[Example]:
    """Models that look alike and stay as they are, or agree all the same."""
    for name, attend in _UNLIKE.items():
        yield Example(name, _heads(attend), fuses=False)
    yield Example("padding_added_with_gradients", _heads(padding_added, _padding), fuses=False)
    yield Example("mask_of_unknown_values", _heads(_added_input, _rows_of_minus_infinity), fuses=False)
    yield Example("two_masks_added", _heads(_two_masks, _padding, grad=False), fuses=False)
    yield Example("bias_of_a_filled_row", _heads(_bias_after_padding, _padding, _positions(1, H, S, S)), fuses=False)
    yield Example("scores_times_a_number_for_each_key", _heads(times_keys, _kept_table), fuses=False)
    yield Example("five_dimensions", _windows, fuses=False)


# -- inputs --------------------------------------------------------------------------------------------------------


def _heads(
    attend: Attend, *more: Callable[[torch.dtype], Tensor], kv: int = H, keys: int = S, value_dim: int = D,
    grad: bool = True,
) -> Make:  # fmt: skip
    def make(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:
        def random(heads: int, length: int, dim: int) -> Tensor:
            return torch.randn(B, length, heads, dim, dtype=dtype).transpose(1, 2).detach().requires_grad_(grad)

        inputs = (random(H, S, D), random(kv, keys, D), random(kv, keys, value_dim), *(x(dtype) for x in more))
        return lambda *x: _merged(attend(*x)), inputs

    return make


def _merged(out: Any) -> Any:
    """What a model makes of heads; SDPA may choose the strides of what it returns."""
    if not isinstance(out, Tensor):
        return (_merged(out[0]), *out[1:])
    return out.transpose(1, 2).flatten(2) * 2 if out.dim() == 4 else out


def _flat(attend: Attend, *more: Callable[[torch.dtype], Tensor]) -> Make:
    def make(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:
        inputs = [torch.randn(B * H, S, D, dtype=dtype, requires_grad=True) for _ in range(3)]
        return lambda *x: attend(*x) * 2, (*inputs, *(x(dtype) for x in more))

    return make


def _einsum(scores: str, result: str) -> Make:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if scores.startswith("bk"):
            weights = torch.einsum(scores, k, q).mul(SCALE).softmax(-1)
            return torch.einsum(result, v, weights).flatten(2) * 2
        return torch.einsum(result, [torch.einsum(scores, [q, k]).mul(SCALE).softmax(-1), v]).flatten(2) * 2

    def make(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:
        return attend, tuple(torch.randn(B, S, H, D, dtype=dtype, requires_grad=True) for _ in range(3))

    return make


def _positions(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.randn(shape, dtype=dtype).requires_grad_()


def _padding(dtype: torch.dtype) -> Tensor:
    """Which tokens are there; the second sequence starts with four that are not."""
    keep = torch.ones(B, S, dtype=torch.long)
    keep[1, :4] = 0
    return keep


def _kept_table(dtype: torch.dtype) -> Tensor:
    return torch.ones(S, S, dtype=dtype).tril()


def _rows_of_minus_infinity(dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(S, S, dtype=dtype)
    mask[2] = -math.inf
    return mask


# -- tables, and what only looks like attention --------------------------------------------------------------------

_PLAIN: dict[str, Attend] = {
    "matmul": plain,
    "mT_and_method": lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(dim=-1).matmul(v),
    "scaled_query": lambda q, k, v: ((q * SCALE) @ k.transpose(2, 3)).softmax(-1) @ v,
    "scaled_both": lambda q, k, v: torch.softmax((q * 0.5) @ (0.5 * k).transpose(-2, -1), dim=-1) @ v,
    "scaled_transposed_key": lambda q, k, v: (q @ (k.permute(0, 1, 3, 2) / 3)).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "key_stored_transposed": lambda q, k, v: (q @ k[:, :, :D]).softmax(-1) @ v[:, :, :D],
    "not_scaled": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "softmax_in_float32": float_softmax,
    "everything_in_float32": everything_in_float,
}
_MASKED: dict[str, Attend] = {
    "in_place": in_place,
    "written_to": written_to,
    "written_to_twice": written_to_twice,
    "sliding_window_added": window,
    "mask_in_float32": mask_in_float32,
    "chosen_by_where": chosen,
    "minus_10000": old_bert,
    "mask_scaled_with_scores": mask_scaled,
}
_BIASED: dict[str, Attend] = {
    "bias": biased,
    "bias_then_causal": bias_and_causal,
    "bias_scaled_with_scores": bias_scaled_with_scores,
    "bias_cast_up": bias_cast_up,
}


def _returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v, weights


def _view_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[0].masked_fill_(causal(q), -math.inf)
    return scores.softmax(-1) @ v


def _written_to_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    out = scores.softmax(-1) @ v
    scores.masked_fill_(causal(q), 0.0)
    return out + scores.sum(-1, keepdim=True)


def _read_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    total = scores.sum(-1, keepdim=True)
    scores.masked_fill_(causal(q), -math.inf)
    return scores.softmax(-1) @ v + total


def _query_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    scaled = q * SCALE
    q.mul_(2)
    return (scaled @ k.mT).softmax(-1) @ v + q


_UNLIKE: dict[str, Attend] = {
    "weights_returned": _returned,
    "softmax_over_queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "squared_scores": lambda q, k, v: (q @ k.mT).square().softmax(-1) @ v,
    "mask_scaled_up": partial(mask_scaled, factor=2.0),
    "mask_scaled_to_nothing": partial(mask_scaled, factor=1e-36),
    "mask_negated": lambda q, k, v: mask_scaled(-q, k, v, -0.5),
    "weights_scaled": lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
    "filled_with_a_score": lambda q, k, v: (q @ k.mT).masked_fill(causal(q), -3.0).softmax(-1) @ v,
    "filled_then_scaled": lambda q, k, v: ((q @ k.mT).masked_fill(causal(q), -math.inf) * 0.5).softmax(-1) @ v,
    "view_of_scores_written_to": _view_written_to,
    "written_to_after_the_softmax": _written_to_late,
    "scores_read_before_they_are_written_to": _read_before,
    "query_written_to": _query_written_to,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5) @ v,
    "bias_rounded": lambda q, k, v: (q @ k.mT + torch.arange(S, device=q.device) * 0.123).softmax(-1).to(v.dtype) @ v,
    "all_keys_excluded": lambda q, k, v: (
        (q @ k.mT).masked_fill(torch.arange(S, device=q.device)[:, None] == 2, -math.inf).softmax(-1) @ v
    ),
}


def _added_input(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


def _two_masks(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    low = torch.finfo(torch.float32).min
    absent = torch.where(padding[:, None, None, :] == 0, low, 0.0)
    return (q @ k.mT + torch.where(causal(q), low, 0.0) + absent).softmax(-1).to(v.dtype) @ v


def _bias_after_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(later_or_absent(q, padding), -1e4 if q.dtype == torch.float16 else -1e30)
    return (scores.float() + bias).softmax(-1).to(v.dtype) @ v


def _windows(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:  # Swin
    q, k, v = (torch.randn(2, 2, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3))
    return lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (q, k, v)
