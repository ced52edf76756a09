"""Masks that stay with SDPA: what the report says of them, and that they are left as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from torch import Tensor

B, H, S, D = 2, 3, 9, 8
LOWEST = torch.finfo(torch.float32).min

Mask = Callable[[Tensor, Tensor], Tensor]


def _index() -> Tensor:
    return torch.arange(S)


def _causal() -> Tensor:
    return _index() <= _index()[:, None]


def _alibi() -> Tensor:
    slopes = 2.0 ** -torch.arange(1, H + 1)
    return torch.where(_causal(), 0.0, -torch.inf) + slopes[:, None, None] * _index()


def _lowest_but(keep: Tensor) -> Tensor:
    """A mask whose constants can only be computed: the condition is counted."""
    return torch.full((S, S), LOWEST).masked_fill(keep[..., None].sum(-1) > 0, 0.0)


def _tokens() -> Tensor:
    return (_index() < torch.tensor([[S - 4], [S]])).long()


def _pairs() -> Tensor:
    return torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(0)) > 0.3


def _same_token(q: Tensor, m: Tensor) -> Tensor:
    """The ones of the inverted mask are those that are filled: no bias."""
    inverted = 1.0 - (m[:, None, :, None] == m[:, None, None]).to(q.dtype)
    return inverted.masked_fill(inverted.bool(), torch.finfo(q.dtype).min)


# what the mask is made of, the mask, what the report says
KEPT: dict[str, tuple[Callable[[], Tensor], Mask, str]] = {
    "a lowered key": (
        lambda: _tokens().bool(),
        lambda q, m: ((1 - m.to(q.dtype)) * -10000.0)[:, None, None],
        "adds -10000 to scores: a bias",
    ),
    "a lowered token": (_tokens, lambda q, m: ((1 - m.to(q.dtype)) * -10000.0)[:, None, None], "adds a bias"),
    "no band": (_tokens, lambda q, m: _index() // 3 == _index()[:, None] // 3, "constant and keeps 33% of the pairs"),
    "no band, and rows without a key": (
        _tokens,
        lambda q, m: _lowest_but(_index() // 3 < _index()[:, None] // 3),
        "which are no band of keys",
    ),
    "alibi": (_tokens, lambda q, m: _alibi().to(q.dtype), "the mask adds a bias"),
}
MISSED: dict[str, tuple[Callable[[], Tensor], Mask, str]] = {
    "pairs given": (_pairs, lambda q, m: m, "input m, which has a value for each query and key"),
    "pairs given and causal": (_pairs, lambda q, m: m & _causal(), "input m, which has a value for each query and key"),
    "numbers given": (lambda: torch.where(_pairs(), 0.0, -3.0), lambda q, m: m, "adds numbers of input m"),
    "numbers given, each head": (
        lambda: torch.where(_tokens().bool(), 0.0, -1e4),
        lambda q, m: m[:, None].repeat_interleave(H, dim=0).view(B, H, 1, S),
        "adds numbers of input m",
    ),
    "numbers given, more before": (
        lambda: torch.where(_tokens().bool(), 0.0, -1e4),
        lambda q, m: F.pad(-1.0 * _index()[2:], (2, 0)) + m[:, None, None],
        "computed with pad, which is not understood",
    ),
    "not understood": (
        _tokens,
        lambda q, m: torch.roll(_causal(), 1, 1),
        "computed with roll, which is not understood",
    ),
    "a band without keys": (
        _tokens,
        lambda q, m: _lowest_but(_index() < _index()[:, None]),
        "rows without a key would average",
    ),
    "the same token": (_tokens, _same_token, "depends on the values of input m"),
    "adds infinity": (_tokens, lambda q, m: torch.where(_causal(), 0.0, torch.inf), "adds inf"),
}


@pytest.mark.parametrize("status", ["kept", "missed"])
def test_the_report_says_what_a_mask_is(status: str) -> None:
    for name, (given, mask, words) in {"kept": KEPT, "missed": MISSED}[status].items():

        def model(q: Tensor, m: Tensor, mask: Mask = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(q, m))

        q = torch.randn(B, S, H, D).transpose(1, 2).requires_grad_()
        result = compare(model, (q, given()), draws=1)
        found = [(site.pattern, site.status) for site in result.report.sites]
        assert found == [("causal_mask", status)], f"{name}: {result.reasons}"
        assert words in result.report.sites[0].reason and not result.problems, f"{name}: {result.reasons}"


def test_layers_that_share_a_mask_that_is_not_understood_are_all_missed() -> None:
    def model(q: Tensor, m: Tensor) -> Tensor:
        q = F.scaled_dot_product_attention(q, q, q, attn_mask=m)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=m)

    rewriter = Rewriter()
    rewritten(model, rewriter)(torch.randn(B, H, S, D), _pairs())
    assert [site.status for site in rewriter.report.sites] == ["missed", "missed"], str(rewriter.report)


def test_padded_queries_and_keys_of_any_length_share_a_graph() -> None:
    """Chroma: a row of a padded query keeps no key, and leaves zeros."""

    def model(q: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=m[:, None, None] * m[:, None, :, None])

    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    for length, kept in ((9, (4, 9)), (13, (1, 12)), (7, (7, 7))):
        q, m = torch.randn(2, length, H, D).transpose(1, 2), torch.arange(length) < torch.tensor([[n] for n in kept])
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(m, 1)
        found = compiled(q, m)
        torch.testing.assert_close(found, model(q, m))
        assert not found[0, :, kept[0] :].any()
    assert len(rewriter.graphs) == 1
    assert rewriter.report.counts()["masked_attention"] == {"fused": 1}, str(rewriter.report)


def test_a_padding_of_heads_and_batches_that_are_split_is_one_of_any_batch() -> None:
    """PixArt's masks are repeated for the heads, one after the other, and split again."""

    def model(q: Tensor, m: Tensor) -> Tensor:
        keep = m[:, None].repeat_interleave(H, dim=0).view(m.shape[0], H, -1, m.shape[1])
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    for batch in (2, 4):
        q, m = torch.randn(batch, S, H, D).transpose(1, 2), torch.rand(batch, S) > 0.4
        m[:, 0] = True
        torch._dynamo.mark_dynamic(q, 0)
        torch._dynamo.mark_dynamic(m, 0)
        torch.testing.assert_close(compiled(q, m), model(q, m))
    assert len(rewriter.graphs) == 1
    assert rewriter.report.counts()["masked_attention"] == {"fused": 1}, str(rewriter.report)
