"""Attention written out with soft caps and sinks, and things that only look like it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.patterns._softcap_sinks_parts import (
    CAP,
    absent,
    capped,
    causal,
    column_of,
    later,
    present,
    sink,
    weigh,
    window,
)
from torch_fuse.rewrite.pattern import Example

Attend = Callable[..., Any]
Make = Callable[[torch.dtype], tuple[Attend, tuple[Any, ...]]]
B, H, S, D = 2, 4, 9, 8
SCALE = 0.8


def spellings() -> Iterator[Example]:
    """Models that become masked_attention."""
    for name, attend in _CAPPED.items():
        yield Example(name, _heads(attend))
    for name, attend in _SUNK.items():
        yield Example(name, _heads(attend, _sinks))
    yield Example("grouped_heads", _heads(_grouped, _sinks, kv=2))
    yield Example("einsum", _einsum)
    yield Example("cap_and_padding_added_without_gradients", _heads(_capped_padding, _padding, grad=False))
    yield Example("cap_and_padding_of_minus_infinity_added", _heads(_capped_padding_inf, _padding, grad=False))
    yield Example("cap_and_padding_filled", _heads(_capped_filled, _padding))
    yield Example("cap_and_padding_filled_with_minus_infinity", _heads(_capped_filled_inf, _padding))
    yield Example("sinks_and_padding", _heads(_sunk_padding, _sinks, _padding))
    yield Example("sinks_in_float32", _heads(_sunk_in_float32, lambda _: torch.randn(H, requires_grad=True)))


def near_misses() -> Iterator[Example]:
    """Models that look alike and stay as they are."""
    for name, attend in _UNLIKE_CAP.items():
        yield Example(name, _heads(attend), fuses=False)
    for name, attend in _UNLIKE_SINKS.items():
        yield Example(name, _heads(attend, _sinks), fuses=False)
    yield Example(
        "cap_of_an_input", _heads(_cap_of_an_input, lambda dtype: torch.tensor(2.0, dtype=dtype)), fuses=False
    )
    yield Example("cap_and_padding_added_with_gradients", _heads(_capped_padding, _padding), fuses=False)
    yield Example("cap_and_a_mask_of_unknown_values", _heads(_capped_plus, _numbers), fuses=False)
    yield Example("sinks_and_a_mask_of_unknown_values", _heads(_sunk_plus, _sinks, _numbers), fuses=False)
    yield Example("sinks_and_absent_queries", _heads(_absent_queries, _sinks, _padding), fuses=False)
    yield Example("sinks_that_may_be_infinite", _heads(_sunk_padding, _infinite, _padding), fuses=False)


# -- inputs --------------------------------------------------------------------------------------------------------


def _heads(attend: Attend, *more: Callable[[torch.dtype], Tensor], kv: int = H, grad: bool = True) -> Make:
    def make(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:
        def random(heads: int) -> Tensor:
            return torch.randn(B, S, heads, D, dtype=dtype).transpose(1, 2).detach().requires_grad_(grad)

        return lambda *x: _merged(attend(*x)), (random(H), random(kv), random(kv), *(x(dtype) for x in more))

    return make


def _merged(out: Any) -> Any:
    """What a model makes of heads, which may lie in memory in any order."""
    if not isinstance(out, Tensor):
        return (_merged(out[0]), *out[1:])
    return out.transpose(1, 2).flatten(2) * 2


def _einsum(dtype: torch.dtype) -> tuple[Attend, tuple[Any, ...]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(torch.einsum("bqhd,bkhd->bhqk", q, k) / CAP) * CAP + causal(q, 1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v).flatten(2) * 2

    return attend, tuple(torch.randn(B, S, H, D, dtype=dtype, requires_grad=True) for _ in range(3))


def _sinks(dtype: torch.dtype) -> Tensor:
    return torch.randn(H, dtype=dtype, requires_grad=True)


def _infinite(dtype: torch.dtype) -> Tensor:
    return torch.tensor([-math.inf, 0.0, 1.0, 2.0], dtype=dtype)


def _padding(dtype: torch.dtype) -> Tensor:
    """Which tokens are there; the second sequence starts with four that are not."""
    keep = torch.ones(B, S, dtype=torch.long)
    keep[1, :4] = 0
    return keep


def _numbers(dtype: torch.dtype) -> Tensor:
    return torch.randn(S, S, dtype=dtype)


# -- soft caps -----------------------------------------------------------------------------------------------------


def _gemma2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    scores = scores / CAP
    scores = torch.tanh(scores)
    scores = scores * CAP
    return weigh(scores + causal(q), v)


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).div_(CAP).tanh_() * CAP  # what tanh gave is needed for its gradient
    return scores.masked_fill_(later(q), -math.inf).softmax(-1) @ v


def _capped_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return weigh(capped(q @ k.mT) + present(q, padding), v)


def _capped_padding_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return weigh(capped(q @ k.mT) + present(q, padding, -math.inf), v)


def _capped_filled(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return weigh(capped(q @ k.mT).masked_fill(absent(q, padding), torch.finfo(q.dtype).min), v)


def _capped_filled_inf(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return torch.where(absent(q, padding), -math.inf, capped(q @ k.mT)).softmax(-1) @ v


def _cap_of_an_input(q: Tensor, k: Tensor, v: Tensor, cap: Tensor) -> Tensor:
    return weigh(torch.tanh(q @ k.mT / cap) * cap + causal(q), v)


def _capped_plus(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return weigh(capped(q @ k.mT) + mask, v)


def _cap_in_a_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cap = torch.tensor(CAP, dtype=q.dtype, device=q.device)
    return weigh(torch.tanh(q @ k.mT / cap) * cap + window(q), v)


_CAPPED: dict[str, Attend] = {
    "gemma2": _gemma2,
    "cap_in_place": _in_place,
    "cap_without_a_mask": lambda q, k, v: weigh(capped(q @ k.mT), v),
    "cap_in_a_window": lambda q, k, v: (capped(q @ k.mT * SCALE) + window(q)).softmax(-1) @ v,
    "cap_in_a_constant": _cap_in_a_constant,
    "factors_that_differ": lambda q, k, v: weigh(3.0 * (q @ k.mT * 0.25).tanh() + causal(q), v),
    "query_scaled_and_capped_in_float32": lambda q, k, v: weigh(
        capped((q * SCALE).float() @ k.float().mT).masked_fill(later(q), -math.inf), v
    ),
}


def _tanh_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weigh(capped(capped(q @ k.mT)) + causal(q), v)


def _capped_weights_read(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (capped(q @ k.mT) + window(q)).softmax(-1)
    return weights @ v, weights


_UNLIKE_CAP: dict[str, Attend] = {
    "cap_after_the_mask": lambda q, k, v: weigh(capped(q @ k.mT + window(q)), v),
    "cap_after_filling": lambda q, k, v: weigh(capped((q @ k.mT).masked_fill(later(q), -math.inf)), v),
    "mask_within_the_cap": lambda q, k, v: weigh((torch.tanh(q @ k.mT / CAP) + window(q)) * CAP, v),
    "filled_within_the_cap": lambda q, k, v: weigh(torch.tanh(q @ k.mT).masked_fill(later(q), -math.inf) * CAP, v),
    "bias_before_the_cap": lambda q, k, v: weigh(capped(q @ k.mT + q[:, :, :1, :1]) + causal(q), v),
    "tanh_twice": _tanh_twice,
    "negative_cap": lambda q, k, v: weigh(torch.tanh(q @ k.mT / CAP) * -CAP + causal(q), v),
    "capped_weights_read": _capped_weights_read,
    "capped_and_dropped": lambda q, k, v: F.dropout((capped(q @ k.mT) + window(q)).softmax(-1), 0.5) @ v,
    "sigmoid_for_tanh": lambda q, k, v: weigh(torch.sigmoid(q @ k.mT / CAP) * CAP + causal(q), v),
}


# -- sinks ---------------------------------------------------------------------------------------------------------


def _gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return sink(q @ k.transpose(2, 3) * SCALE + causal(q), column_of(sinks, q), v)


def _grouped(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k, v))
    return sink(capped(q @ k.mT * SCALE) + window(q), column_of(sinks, q), v)


def _without_maximum(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:  # MiMo
    weights = torch.cat([q @ k.mT + window(q), column_of(sinks, q)], dim=-1).softmax(-1)
    return weights[..., :-1] @ v


def _detached_maximum(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks[None, :, None, None].repeat(q.shape[0], 1, q.shape[2], 1)
    joined = torch.concat(((q @ k.mT).masked_fill(later(q), -math.inf), column), 3)
    return (joined - joined.amax(-1, keepdim=True).detach()).softmax(3).narrow(-1, 0, S) @ v


def _sunk_padding(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, padding: Tensor) -> Tensor:
    return sink(q @ k.mT + present(q, padding), column_of(sinks, q), v)


def _absent_queries(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, padding: Tensor) -> Tensor:
    """Queries of absent tokens attend to the sink alone."""
    keep = (padding[:, None, None, :] != 0) & (padding[:, None, :, None] != 0) & ~later(q)
    return sink((q @ k.mT).masked_fill(~keep, -math.inf), column_of(sinks, q), v)


def _sunk_plus(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    return sink(q @ k.mT + mask, column_of(sinks, q), v)


def _sunk_in_float32(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return sink((q @ k.mT).float() + causal(q), column_of(sinks.to(q.dtype), q).float(), v)


_SUNK: dict[str, Attend] = {
    "gpt_oss": _gpt_oss,
    "maximum_not_subtracted": _without_maximum,
    "maximum_detached": _detached_maximum,
    "sinks_without_a_mask": lambda q, k, v, s: sink(q @ k.mT, column_of(s, q), v),
    "sinks_and_cap": lambda q, k, v, s: sink(capped(q @ k.mT) + causal(q), column_of(s, q), v),
}


def _not_dropped(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT + window(q), column_of(sinks, q)], dim=-1).softmax(-1)
    return weights @ torch.cat([v, v[:, :, :1]], 2)


def _first_dropped(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return torch.cat([q @ k.mT + window(q), column_of(sinks, q)], dim=-1).softmax(-1)[..., 1:] @ v


def _sinks_in_front(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """The last key's weights are dropped, not the sinks'."""
    return torch.cat([column_of(sinks, q), q @ k.mT + window(q)], dim=-1).softmax(-1)[..., :-1] @ v


def _sinks_read(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
    weights = torch.cat([q @ k.mT + window(q), column_of(sinks, q)], dim=-1).softmax(-1)
    return weights[..., :-1] @ v, weights[..., -1]


def _joined_then(change: Callable[[Tensor], Tensor]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        joined = torch.cat([q @ k.mT + window(q), column_of(sinks, q)], dim=-1)
        return change(joined).softmax(-1)[..., :-1] @ v

    return attend


def _maximum_before(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT + window(q)
    joined = torch.cat([scores - scores.max(-1, keepdim=True).values, column_of(sinks, q)], -1)
    return joined.softmax(-1)[..., :-1] @ v


def _maximum_of_columns(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    joined = torch.cat([q @ k.mT, column_of(sinks, q)], -1)
    return (joined - joined.max(2, keepdim=True).values).softmax(-1)[..., :-1] @ v


def _sinks_of_queries(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = torch.cat([sinks, sinks, sinks[:1]])[None, None, :, None].expand(B, H, S, 1)
    return sink(q @ k.mT + causal(q), column, v)


_UNLIKE_SINKS: dict[str, Attend] = {
    "column_not_dropped": _not_dropped,
    "first_column_dropped": _first_dropped,
    "sinks_in_front": _sinks_in_front,
    "weights_of_sinks_read": _sinks_read,
    "scaled_after_joining": _joined_then(lambda x: x * 0.5),
    "capped_after_joining": _joined_then(capped),
    "biased_after_joining": _joined_then(lambda x: x + x[:, :, :1].detach()),
    "maximum_before_joining": _maximum_before,
    "maximum_of_columns": _maximum_of_columns,
    "sinks_of_queries": _sinks_of_queries,
    "sinks_of_tokens": lambda q, k, v, s: sink(q @ k.mT + causal(q), q[..., :1] + s[0], v),
}
