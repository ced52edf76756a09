"""Attention written out in the ways that libraries write it, and things that only look like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.rewrite.pattern import Example

Attend = Callable[..., Any]
Make = Callable[[torch.dtype], tuple[Attend, tuple[Any, ...]]]
B, H, S, D = 2, 3, 9, 8
SCALE = 0.3


def spellings() -> Iterator[Example]:
    """Models that become scaled_dot_product_attention."""
    for name, attend in _PLAIN.items():
        yield Example(name, _heads(attend))
    for name, attend in _MASKED.items():
        yield Example(name, _heads(attend))
    for name, attend in _BIASED.items():
        yield Example(name, _heads(attend, _positions(1, H, S, S)))
    yield Example("lengths_differ", _heads(_plain, keys=5))
    yield Example("one_key_head", _heads(_plain, kv=1))
    yield Example("grouped_heads", _heads(_grouped, kv=1))
    yield Example("value_of_other_width", _heads(_plain, value_dim=5))
    yield Example("bmm", _flat(lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)))
    yield Example("baddbmm_alibi", _flat(_bloom, _positions(B * H, 1, S)))
    yield Example("baddbmm_beta_0", _flat(_beta_zero))
    yield Example("bmm_of_reshaped_heads", _heads(_reshaped_heads))
    yield Example("einsum_bqhd", _einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"))
    yield Example("einsum_operands_swapped", _einsum("bkhd,bqhd->bhqk", "bkhd,bhqk->bqhd"))
    yield Example("padding_added_without_gradients", _heads(_padding_added, _padding, grad=False))
    yield Example("padding_scaled_with_scores", _heads(_padding_scaled, _padding, grad=False))
    yield Example("padding_of_minus_infinity_added", _heads(_padding_added_inf, _padding, grad=False))
    yield Example("padding_filled", _heads(_padding_filled, _padding))
    yield Example("padding_written_into_scores", _heads(_padding_written, _padding))
    yield Example("padding_filled_with_minus_infinity", _heads(_padding_filled_inf, _padding))
    yield Example("padding_filled_before_a_bias", _heads(_padding_and_bias, _padding, _positions(1, H, S, S)))
    yield Example("padding_chosen_by_where", _heads(_padding_where, _padding))


def near_misses() -> Iterator[Example]:
    """Models that look alike and stay as they are, or agree all the same."""
    for name, attend in _UNLIKE.items():
        yield Example(name, _heads(attend), fuses=False)
    yield Example("padding_added_with_gradients", _heads(_padding_added, _padding), fuses=False)
    yield Example("mask_of_unknown_values", _heads(_added_input, _rows_of_minus_infinity), fuses=False)
    yield Example("two_masks_added", _heads(_two_masks, _padding, grad=False), fuses=False)
    yield Example("bias_of_a_filled_row", _heads(_bias_after_padding, _padding, _positions(1, H, S, S)), fuses=False)
    yield Example("scores_times_a_number_for_each_key", _heads(_times_keys, _kept_table), fuses=False)
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


# -- attention -----------------------------------------------------------------------------------------------------


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, dim=-1) @ v


def _causal(x: Tensor) -> Tensor:
    """True for keys that lie after the query."""
    i = torch.arange(S, device=x.device)
    return i[None, :] > i[:, None]


def _float_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.1, training=False) @ v


def _everything_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-J
    scores = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / math.sqrt(D)
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores *= SCALE
    scores = scores.masked_fill_(_causal(q), -math.inf)
    return scores.softmax(-1) @ v


def _written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(_causal(q), -math.inf)
    return scores.softmax(-1) @ v


def _written_to_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores.mul_(SCALE)
    scores.masked_fill_(_causal(q), torch.finfo(q.dtype).min)
    return scores.softmax(-1) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 1, H, S, D).reshape(B, H, S, D) for x in (k, v))
    return _plain(q, k, v)


def _reshaped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # BART, BLOOM
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, S, S)
    weights = scores.masked_fill(_causal(q), torch.finfo(q.dtype).min)
    return torch.bmm(weights.softmax(-1).view(B * H, S, S), v).view(B, H, S, D)


def _bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v)


def _beta_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # diffusers
    empty = torch.empty(B * H, S, S, dtype=q.dtype, device=q.device)
    return torch.bmm(torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE).softmax(dim=-1), v)


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(S, device=q.device)
    keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3)
    scores = q @ k.mT * SCALE
    return (scores + torch.where(keep, 0.0, -math.inf).to(q.dtype)).softmax(-1) @ v


def _mask_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(S, S, device=q.device).masked_fill(_causal(q), torch.finfo(torch.float32).min)
    return (q @ k.mT * SCALE + mask).softmax(-1).to(v.dtype) @ v


def _mask_scaled(q: Tensor, k: Tensor, v: Tensor, factor: float = 0.25) -> Tensor:  # CodeGen
    mask = torch.zeros(S, S, device=q.device).masked_fill(_causal(q), torch.finfo(torch.float32).min)
    return ((q.float() @ k.float().mT + mask) * factor).softmax(-1).to(v.dtype) @ v


def _padding_scaled(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    mask = torch.where(_later_or_absent(q, padding), torch.finfo(torch.float32).min, torch.zeros((), device=q.device))
    return ((q.float() @ k.float().mT + mask) / 3).softmax(-1).to(v.dtype) @ v


def _times_keys(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:  # GPT
    scores = q @ k.mT * SCALE
    return (scores * kept + -1e4 * (1 - kept)).softmax(-1) @ v


def _chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # GPT-2
    low = torch.full([], -math.inf, dtype=q.dtype, device=q.device)
    return torch.where(~_causal(q), q @ k.mT / 3.0, low).softmax(-1) @ v


def _old_bert(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-10000 is no mask but a bias: it is added exactly."""
    late = (torch.arange(S, device=q.device) > 5).to(q.dtype)
    return (q @ k.mT * SCALE + late * -10000.0).softmax(-1) @ v


def _bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def _bias_and_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (bias[0] + q @ k.mT).masked_fill(_causal(q), -math.inf).softmax(-1) @ v


def _bias_scaled_with_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


def _bias_cast_up(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q.float() @ k.float().mT) * SCALE + bias.float()).softmax(-1).type_as(v) @ v


def _later_or_absent(q: Tensor, padding: Tensor) -> Tensor:
    return _causal(q) | (padding[:, None, None, :] == 0)


def _padding_added(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, low: float | None = None) -> Tensor:
    low = torch.finfo(torch.float32).min if low is None else low
    mask = torch.where(_later_or_absent(q, padding), low, torch.zeros((), device=q.device))
    return (q @ k.mT * SCALE + mask).softmax(-1).to(v.dtype) @ v


def _padding_added_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _padding_added(q, k, v, padding, -math.inf)


def _padding_filled(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, low: float | None = None) -> Tensor:
    low = torch.finfo(q.dtype).min if low is None else low
    scores = (q @ k.mT * SCALE).masked_fill(_causal(q), low)
    return scores.masked_fill(padding[:, None, None, :] == 0, low).softmax(-1) @ v


def _padding_written(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:  # XLM
    scores = (q * SCALE) @ torch.cat([torch.tensor([], dtype=q.dtype), k], dim=-2).transpose(2, 3)
    mask = (padding == 0).view(B, 1, 1, S).expand_as(scores)
    scores.masked_fill_(mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).type_as(scores) @ v


def _padding_filled_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return _padding_filled(q, k, v, padding, -math.inf)


def _padding_and_bias(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + bias
    return scores.masked_fill(_later_or_absent(q, padding), torch.finfo(q.dtype).min).softmax(-1) @ v


def _padding_where(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return torch.where(_later_or_absent(q, padding), torch.finfo(q.dtype).min, q @ k.mT).softmax(-1) @ v


_PLAIN: dict[str, Attend] = {
    "matmul": _plain,
    "mT_and_method": lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(dim=-1).matmul(v),
    "scaled_query": lambda q, k, v: ((q * SCALE) @ k.transpose(2, 3)).softmax(-1) @ v,
    "scaled_both": lambda q, k, v: torch.softmax((q * 0.5) @ (0.5 * k).transpose(-2, -1), dim=-1) @ v,
    "scaled_transposed_key": lambda q, k, v: (q @ (k.permute(0, 1, 3, 2) / 3)).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "key_stored_transposed": lambda q, k, v: (q @ k[:, :, :D]).softmax(-1) @ v[:, :, :D],
    "not_scaled": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "softmax_in_float32": _float_softmax,
    "everything_in_float32": _everything_in_float,
}
_MASKED: dict[str, Attend] = {
    "in_place": _in_place,
    "written_to": _written_to,
    "written_to_twice": _written_to_twice,
    "sliding_window_added": _window,
    "mask_in_float32": _mask_in_float32,
    "chosen_by_where": _chosen,
    "minus_10000": _old_bert,
    "mask_scaled_with_scores": _mask_scaled,
}
_BIASED: dict[str, Attend] = {
    "bias": _bias,
    "bias_then_causal": _bias_and_causal,
    "bias_scaled_with_scores": _bias_scaled_with_scores,
    "bias_cast_up": _bias_cast_up,
}


def _returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v, weights


def _view_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[0].masked_fill_(_causal(q), -math.inf)
    return scores.softmax(-1) @ v


def _written_to_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    out = scores.softmax(-1) @ v
    scores.masked_fill_(_causal(q), 0.0)
    return out + scores.sum(-1, keepdim=True)


def _read_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    total = scores.sum(-1, keepdim=True)
    scores.masked_fill_(_causal(q), -math.inf)
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
    "mask_scaled_up": partial(_mask_scaled, factor=2.0),
    "mask_scaled_to_nothing": partial(_mask_scaled, factor=1e-36),
    "mask_negated": lambda q, k, v: _mask_scaled(-q, k, v, -0.5),
    "weights_scaled": lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
    "filled_with_a_score": lambda q, k, v: (q @ k.mT).masked_fill(_causal(q), -3.0).softmax(-1) @ v,
    "filled_then_scaled": lambda q, k, v: ((q @ k.mT).masked_fill(_causal(q), -math.inf) * 0.5).softmax(-1) @ v,
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
    return (q @ k.mT + torch.where(_causal(q), low, 0.0) + absent).softmax(-1).to(v.dtype) @ v


def _bias_after_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(_later_or_absent(q, padding), -1e4 if q.dtype == torch.float16 else -1e30)
    return (scores.float() + bias).softmax(-1).to(v.dtype) @ v


def _windows(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:  # Swin
    q, k, v = (torch.randn(2, 2, H, S, D, dtype=dtype, requires_grad=True) for _ in range(3))
    return lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (q, k, v)
