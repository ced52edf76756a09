"""What stands around a rotary embedding: scaling, joining, autocast, norms after it, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Comparison, Rewriter, compare, rewritten
from torch import Tensor, nn

from torch_fuse.patterns._rope_examples import rms
from torch_fuse.patterns._rotations import half

PATTERN = "norm_qkv_rope_attention"
B, S, H, D = 2, 6, 2, 8

Around = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Projections, whatever `around` makes of query and key [B, S, H, D], attention."""

    def __init__(self, around: Around) -> None:
        super().__init__()
        self.around = around
        self.q, self.k, self.v = (nn.Linear(H * D, H * D) for _ in range(3))
        angles = torch.outer(torch.arange(S, dtype=torch.float32), 0.5 ** torch.arange(D // 2))
        self.angles: Tensor
        self.register_buffer("angles", torch.cat((angles, angles), -1)[None, :, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(B, S, H, D) for p in (self.q, self.k, self.v))
        q, k = self.around(q, k, self.angles.cos(), self.angles.sin())
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def compared(around: Around, **options: Any) -> Comparison:
    torch.manual_seed(0)
    return compare(Attention(around), (torch.randn(B, S, H * D, requires_grad=True),), **options)


def both(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Around:
    return lambda q, k, c, s: (function(q, c, s), function(k, c, s))


def site(result: Comparison) -> tuple[str, str]:
    (found,) = [s for s in result.report.sites if s.kind == "attention" and s.pattern != "causal_mask"]
    return found.status, found.reason


def _norm_after(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rms(half(x, cos, sin), torch.ones(D))


def _last_lanes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = D // 2
    table = [torch.cat((t[..., : r // 2], t[..., : r // 2]), -1) for t in (cos, sin)]
    return torch.cat((x[..., :r], half(x[..., r:], *table)), -1)


def _shared_by_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multi-head latent attention's key: the rotated lanes are one head, repeated."""
    r = D // 2
    table = [torch.cat((t[..., : r // 2], t[..., : r // 2]), -1) for t in (cos, sin)]
    return torch.cat((x[..., :r], half(x[:, :, :1, r:], *table).expand(-1, -1, H, -1)), -1)


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (both(_norm_after), "the norm comes after the rotary embedding"),
        (both(_last_lanes), "4 of 8 lanes, from lane 4 on, are rotated"),
        (lambda q, k, c, s: (_last_lanes(q, c, s), _shared_by_heads(k, c, s)), "4 of 8 lanes, from lane 4 on"),
        (lambda q, k, c, s: (half(q, c, s), k), "only the query is rotated"),
        (both(lambda x, c, s: half(x.double(), c.double().cos(), s.double().cos()).to(x.dtype)), "float64 from lower"),
    ],
    ids=["norm_after", "last_lanes", "latent", "query_only", "float64"],
)  # fmt: skip
def test_what_no_kernel_does_better_is_kept_and_says_why(around: Around, reason: str) -> None:
    result = compared(around)
    assert not result.problems
    status, said = site(result)
    assert status == "kept" and reason in said


@pytest.mark.parametrize(
    "change",
    [
        lambda x, c, s: torch.roll(x, 1, -1) * c + x * s,
        lambda x, c, s: torch.stack((x * c, x * s), -1).sum(-1),
        lambda x, c, s: (x.unsqueeze(-2) @ torch.eye(D)).squeeze(-2) + x * s,
    ],
    ids=["roll", "sum", "add"],
)
def test_a_value_that_may_be_rotated_is_never_said_to_have_no_rotary_embedding(change: Any) -> None:
    result = compared(both(change))
    assert not result.problems
    status, said = site(result)
    assert status == "missed" and "nothing to fuse" not in said


def test_values_that_are_only_moved_scaled_or_normalised_have_nothing_to_fuse() -> None:
    by_position = torch.arange(1, S + 1).log1p()[:, None, None]
    result = compared(both(lambda x, c, s: rms(x, torch.ones(D)) * 0.5 * torch.log1p(by_position)))
    status, said = site(result)
    assert status == "kept" and "nothing to fuse" in said


def test_a_slice_of_the_key_behind_the_first_reader_of_the_query_is_computed_earlier() -> None:
    """HunyuanVideo: only some tokens are rotated, and the query is joined before the key is cut."""

    def around(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        n = S - 2
        q = torch.cat((half(q[:, :n], c[:, :n], s[:, :n]), q[:, n:]), dim=1)
        k = torch.cat((half(k[:, :n], c[:, :n], s[:, :n]), k[:, n:]), dim=1)
        return q, k

    result = compared(around)
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


def test_a_slice_of_a_key_that_is_written_to_in_between_stays() -> None:
    def around(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        n = S - 2
        k = k.clone()
        q = torch.cat((half(q[:, :n], c[:, :n], s[:, :n]), q[:, n:]), dim=1)
        k.mul_(1.5)
        k = torch.cat((half(k[:, :n], c[:, :n], s[:, :n]), k[:, n:]), dim=1)
        return q, k

    assert not compared(around).problems


def _without_autocast(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return half(x.float(), cos, sin).to(x.dtype)


def test_autocast_that_is_turned_off_where_it_is_off_does_not_matter() -> None:
    result = compared(both(_without_autocast))
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


def test_autocast_around_the_model_makes_another_graph() -> None:
    torch.manual_seed(0)
    model, x, rewriter = Attention(both(_without_autocast)), torch.randn(B, S, H * D), Rewriter()
    compiled = rewritten(model, rewriter)
    with torch.no_grad():
        for enabled in (False, True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                torch.testing.assert_close(compiled(x), model(x), atol=1e-2 if enabled else 1e-5, rtol=1e-2)
    assert len(rewriter.report.graphs) == 2
    assert [graph.rewrites for graph in rewriter.report.graphs] == [1, 0], str(rewriter.report)


def test_repeated_heads_and_a_scale_stay_behind_the_rotation() -> None:
    class Grouped(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(B, S, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
            cos, sin = (t.transpose(1, 2) for t in (self.angles.cos(), self.angles.sin()))
            q, k = half(q, cos, sin) / 3, half(k[:, :1], cos, sin).repeat(1, H, 1, 1)
            return F.scaled_dot_product_attention(q, k, v)

    result = compare(Grouped(lambda *_: _[:2]), (torch.randn(B, S, H * D, requires_grad=True),))
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


def test_a_mask_that_the_model_learns_is_kept_and_says_so() -> None:
    def model(q: Tensor, bias: Tensor) -> Tensor:
        distance = torch.arange(S)[None] - torch.arange(S)[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=F.embedding(distance + S, bias).permute(2, 0, 1))

    result = compare(model, (torch.randn(B, H, S, D, requires_grad=True), torch.randn(2 * S, H, requires_grad=True)))
    assert not result.problems
    (mask,) = [s for s in result.report.sites if s.pattern == "causal_mask"]
    assert mask.status == "kept" and "embedding" in mask.reason


def test_two_attentions_of_one_query_and_key_share_the_rotation() -> None:
    """Differential transformer."""

    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(B, S, H, D).transpose(1, 2) for p in (self.q, self.k, self.v))
            cos, sin = (t.transpose(1, 2) for t in (self.angles.cos(), self.angles.sin()))
            q, k = half(q, cos, sin), half(k, cos, sin)
            return F.scaled_dot_product_attention(q, k, v) - F.scaled_dot_product_attention(q, k, v.flip(1))

    result = compare(Twice(lambda *_: _[:2]), (torch.randn(B, S, H * D, requires_grad=True),))
    assert result.fused(PATTERN) == 1 and not result.problems
    assert "missed" not in {site.status for site in result.report.sites}, result.reasons


@pytest.mark.parametrize("unmeasured", [False, True])
def test_all_heads_at_once_are_rotated_by_the_kernel_only_when_asked_for(
    unmeasured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right, but not measured to win."""
    from torch_fuse import Options
    from torch_fuse.kernels import qk_norm_rope
    from torch_fuse.patterns import _all_heads_examples, norm_qkv_rope_attention

    willing = SimpleNamespace(supports=lambda *arguments: None, qk_norm_rope=qk_norm_rope.qk_norm_rope)
    monkeypatch.setattr(norm_qkv_rope_attention, "qk_norm_rope", willing)
    monkeypatch.setattr(norm_qkv_rope_attention, "MIN_TOKENS", 1)
    model, inputs = next(_all_heads_examples.spellings()).make(torch.float32)
    result = compare(model, inputs, options=Options(unmeasured=unmeasured, on_error="raise"), draws=1, grad=False)
    (site,) = [site for site in result.report.sites if site.pattern == PATTERN]
    assert (site.status, "not measured" in site.reason) == (("fused", False) if unmeasured else ("kept", True))
    assert not result.problems, result.reasons


def test_keys_stored_into_an_empty_tensor_are_looked_at_for_a_rotation() -> None:
    """Multi-head latent attention without positions (Kimi Linear) stores what it projects."""

    def model(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
        key = q.new_empty(q.shape)
        key[..., :8] = F.linear(k, weight)
        key[..., 8:] = k[..., :8]
        return F.scaled_dot_product_attention(q, key, q)

    q, k = (torch.randn(2, 2, 5, 16) for _ in range(2))
    result = compare(model, (q, k, torch.randn(8, 16)), draws=1, grad=False)
    assert "missed" not in {site.status for site in result.report.sites}, result.reasons
    assert not result.problems
