"""Masks that `masked_attention` takes, and masks that only look like them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.rewrite.pattern import Example

BATCH, LENGTH = 2, 9
# [q, tokens] -> mask; tokens [B, S] are 1 where a key is kept, as tokenisers give them.
Mask = Callable[[Tensor, Tensor], Tensor]


def spellings() -> Iterator[Example]:
    """Padding, windows and both, in the ways that libraries write them."""
    for name, mask in _STRUCTURED.items():
        yield Example(name, _attention(mask))
    yield Example("bool_input", _attention(lambda q, m: m[:, None, None, :], tokens=lambda x: x.bool()))
    yield Example("int32_input", _attention(lambda q, m: (m > 0)[:, None, None], tokens=lambda x: x.int()))
    yield Example("without_any_key", _attention(_gathered, tokens=lambda x: x * torch.tensor([[0], [1]])))
    yield Example("left_padding", _attention(_gathered, tokens=lambda x: x.flip(1)))
    yield Example("grouped", _attention(_gathered, kv=1, enable_gqa=True))
    yield Example("grouped_by_expand", _attention(_gathered, kv=1, repeat=True))
    yield Example("fewer_queries", _attention(lambda q, m: _k(m) <= _q(q), queries=5))
    yield Example("offset_queries", _attention(lambda q, m: _k(m) <= _q(q) + 4, queries=5))
    yield Example("more_tokens_than_keys", _attention(_gathered_first, queries=LENGTH - 2, keys=LENGTH - 2))
    yield Example("two_layers", _two_layers)


def near_misses() -> Iterator[Example]:
    """What has no band and no kept keys, or is no mask of 0 and -inf."""
    for name, mask in _OTHER.items():
        yield Example(name, _attention(mask), fuses=False)
    floats = _attention(lambda q, m: (1.0 - m)[:, None, None, :] * -9.0, tokens=lambda x: x.float())
    yield Example("finite_bias", floats, fuses=False)
    yield Example("float_mask", _attention(lambda q, m: m[:, None, None, :], tokens=lambda x: x.float()), fuses=False)
    yield Example("dropout_of_weights", _attention(_gathered, dropout_p=1.0), fuses=False)
    yield Example("one_query_row_for_all", _attention(lambda q, m: _k(m) <= torch.arange(1)[:, None]), fuses=False)


def _attention(
    mask: Mask, queries: int = LENGTH, keys: int = LENGTH, kv: int = 2, repeat: bool = False,
    tokens: Callable[[Tensor], Tensor] = lambda x: x, **kwargs: Any,
) -> Callable[[torch.dtype], Any]:  # fmt: skip
    def make(dtype: torch.dtype) -> Any:
        def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
            keep = mask(q, m)
            if keep.is_floating_point():
                keep = keep.to(q.dtype)
            if repeat:
                b, h, s, d = k.shape
                k, v = (x[:, :, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3, **kwargs)

        def random(heads: int, length: int) -> Tensor:
            return torch.randn(BATCH, length, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()

        lengths = torch.tensor([[LENGTH - 3], [LENGTH]])
        given = tokens((torch.arange(LENGTH) < lengths).long())
        return model, (random(2, queries), random(kv, keys), random(kv, keys), given)

    return make


def _two_layers(dtype: torch.dtype) -> Any:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        keep = _gathered(q, m)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return F.scaled_dot_product_attention(first, k, v, attn_mask=keep)

    _, inputs = _attention(_gathered)(dtype)
    return model, inputs


def _q(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-2], device=x.device)[:, None]


def _k(m: Tensor) -> Tensor:
    return torch.arange(m.shape[-1], device=m.device)[None, :]


def _gathered(q: Tensor, m: Tensor) -> Tensor:
    """As transformers: causal, and the tokens gathered by batch and key index."""
    batch = torch.arange(m.shape[0], device=m.device)[:, None, None, None]
    key = torch.arange(m.shape[1], device=m.device)[None, None, None, :]
    keep = (_k(m) <= _q(q)) & m.to(torch.bool)[batch, key]
    return keep.expand(m.shape[0], -1, q.shape[-2], m.shape[1])


def _gathered_first(q: Tensor, m: Tensor) -> Tensor:
    batch, key = torch.arange(BATCH, device=m.device), torch.arange(q.shape[-2], device=m.device)
    return m.bool()[batch[:, None, None, None], key] & (key <= _q(q))


def _causal(q: Tensor, m: Tensor) -> Tensor:
    return _k(m) <= _q(q)


def _window(q: Tensor, m: Tensor, width: int = 4) -> Tensor:
    return _causal(q, m) & (_k(m) > _q(q) - width)


def _low(keep: Tensor, low: float = float("-inf")) -> Tensor:
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, low)


def _keys(m: Tensor) -> Tensor:
    return m.bool()[:, None, None, :]


def _rows(m: Tensor) -> Tensor:
    return _keys(m).repeat(1, 1, m.shape[1], 1)


_LOWEST = torch.finfo(torch.float32).min
_STRUCTURED: dict[str, Mask] = {
    "padding": lambda q, m: _keys(m),
    "padding_expanded": lambda q, m: _keys(m).expand(m.shape[0], 2, q.shape[-2], m.shape[1]),
    "padding_not_equal_zero": lambda q, m: (m != 0)[:, None, None],
    "padding_equal_one": lambda q, m: (m == 1)[:, None, None],
    "padding_negated": lambda q, m: ~(m == 0).view(m.shape[0], 1, 1, m.shape[1]),
    "padding_of_first_batch": lambda q, m: m[0].bool()[None, :],
    "padding_twice": lambda q, m: _keys(m) & _keys(m.cumsum(1) > 2),
    "padding_by_lengths": lambda q, m: (_k(m) < m.sum(1)[:, None])[:, None, None],
    "padding_by_tokens": lambda q, m: ((m != 5) & (m != 0))[:, None, None],
    "padding_of_either": lambda q, m: ((m == 1) | (m == 2))[:, None, None],
    "every_other_key_from_the_end": lambda q, m: _causal(q, m) & _keys(m).flip(-1) & (_k(m) % 2 == 0),
    "padding_of_one_kind": lambda q, m: ((m > 0) ^ (m > 1))[:, None, None],
    "padding_inf": lambda q, m: _low(_keys(m)),
    "padding_where": lambda q, m: torch.where(_keys(m), 0.0, float("-inf")),
    "causal_and_padding": _gathered,
    "causal_and_padding_inf": lambda q, m: _low(_causal(q, m) & _keys(m)),
    "causal_times_padding": lambda q, m: _causal(q, m) * _keys(m),
    "window": _window,
    "window_inf": lambda q, m: _low(_window(q, m)),
    "window_by_tril": lambda q, m: torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=m.device).tril().triu(-3),
    "window_both_sides": lambda q, m: (_k(m) - _q(q)).abs() <= 2,
    "window_ahead": lambda q, m: (_k(m) >= _q(q)) & (_k(m) < _q(q) + 3),
    "window_and_padding": lambda q, m: _window(q, m) & _keys(m),
    "empty_rows": lambda q, m: _k(m) < _q(q),
}
_STRUCTURED |= {
    "queries": lambda q, m: m.bool()[:, None, :, None],
    "queries_and_causal": lambda q, m: _causal(q, m) & m.bool()[:, None, :, None],
    "queries_and_keys": lambda q, m: m.bool()[:, None, None, :] * m.bool()[:, None, :, None],
    "queries_and_keys_transposed": lambda q, m: _rows(m) & _rows(m).transpose(2, 3),
    "queries_of_first_batch": lambda q, m: m.bool().T[None, None, :, :1] & _causal(q, m),
    "queries_of_one_kind": lambda q, m: _keys(m) & (m == 1)[:, None, :, None],
    "padding_repeated_for_heads": lambda q, m: m.bool().repeat_interleave(2, dim=0).view(BATCH, 2, 1, LENGTH),
    "padding_inf_repeated_for_heads": lambda q, m: (
        _low(m.bool()[:, None]).repeat_interleave(2, 0).view(BATCH, 2, 1, -1)
    ),
    "padding_repeated_for_queries": lambda q, m: _rows(m),
    "padding_flattened_and_split": lambda q, m: m.bool().flatten().view(BATCH, 1, 1, LENGTH),
}
_OTHER: dict[str, Mask] = {
    "queries_or_keys": lambda q, m: _keys(m) | m.bool()[:, None, :, None],
    "another_batch_for_each_head": lambda q, m: m.bool().repeat(2, 1).view(BATCH, 2, 1, LENGTH),
    "batches_as_heads": lambda q, m: m.bool().repeat_interleave(2, 0).view(2, BATCH, 1, LENGTH).transpose(0, 1),
    "every_key_twice": lambda q, m: m.bool()[:, : LENGTH // 2 + 1].repeat_interleave(2, 1)[:, None, None, :LENGTH],
    "queries_two_by_two": lambda q, m: _causal(q, m)[: LENGTH // 2 + 1].repeat_interleave(2, 0)[:LENGTH],
    "per_head": lambda q, m: m.bool()[None, :, None, :],
    "whole_batches": lambda q, m: m.bool()[:, None, None, -1:],
    "transposed": lambda q, m: m.bool().T[None, None, :LENGTH, :1].expand(1, 1, LENGTH, LENGTH) | _causal(q, m),
    "keys_or_causal": lambda q, m: _causal(q, m) | _keys(m),
    "keys_or_diagonal": lambda q, m: (_causal(q, m) & _keys(m)) | (_k(m) == _q(q)),
    "same_document": lambda q, m: _causal(q, m) & (m[:, None, :, None] == m[:, None, None, :]),
    "chunks": lambda q, m: _causal(q, m) & (_k(m) // 3 == _q(q) // 3),
    "last_key_for_all": lambda q, m: m.bool()[:, None, None, -1:] | (_k(m) == 0),
    "finite_padding": lambda q, m: _low(_keys(m) & _causal(q, m), _LOWEST),
    "finite": lambda q, m: _low(_window(q, m), -10.0),
    "finite_and_empty_rows": lambda q, m: _low(_k(m) < _q(q), _LOWEST),
    "not_zero_where_kept": lambda q, m: _low(_window(q, m)) + 1,
    "keys_by_index": lambda q, m: _window(q, m) | (_k(m) == 0),
}
