"""Tables of cosines and sines: where they are computed, in which precision, and what is written to them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Comparison, Rewriter, compare, rewritten
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_fuse import Options

PATTERN = "norm_qkv_rope_attention"
B, S, H, D, R = 2, 5, 2, 16, 8

Body = Callable[["Projected", Tensor, Tensor, Tensor], Any]


class Projected(nn.Module):
    """One projection to query, key and value, side by side in each head, and what a body makes of them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.qkv, self.body = nn.Linear(32, 3 * H * D), body

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(B, S, H, 3 * D).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self.body(self, x, cos, sin)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).sum(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first R lanes, in halves."""
    turning, still = x[..., :R], x[..., R:]
    a, b = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-b, a), -1) * sin, still), -1)


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """All lanes, in pairs next to each other."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)


def compared(body: Body, grad: bool = True, **kwargs: Any) -> Comparison:
    torch.manual_seed(0)
    model, x = Projected(body).requires_grad_(grad), torch.randn(B, S, 32, requires_grad=grad)
    angles = torch.outer(torch.arange(float(S)), 0.5 ** torch.arange(R // 2)).repeat(1, 2)
    result = compare(model, (x, angles.cos(), angles.sin()), grad=grad, executor="aot_eager", draws=2, **kwargs)
    assert not result.problems, result.reasons
    return result


def sites(result: Comparison) -> list[tuple[str, str]]:
    return [(site.op or site.status, site.reason) for site in result.report.sites if site.pattern == PATTERN]


def polar(cos: Tensor, layout: str) -> Tensor:
    """A complex table [S, D / 2]: contiguous, transposed, or with gaps between its elements."""
    if layout == "transposed":
        angles = torch.arange(1.0, D // 2 + 1, device=cos.device)[:, None] * cos[:, 0]
        return torch.polar(torch.ones_like(angles), angles).t()
    angles = cos[:, :1] * torch.arange(1.0, D + 1, device=cos.device)
    table = torch.polar(torch.ones_like(angles), angles)
    return table[:, ::2] if layout == "gaps" else table[:, ::2].contiguous()


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_complex_tables_of_any_rank_are_taken(dims: int, layout: str) -> None:
    def body(m, x, cos, sin):
        table = polar(cos, layout)
        for _ in range(dims - 2):
            table = table[None]
        q, k, v = m.heads(x).split(D, -1)
        return attend(rotate_complex(q, table), rotate_complex(k, table), v)

    assert compared(body).fused(PATTERN) == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_a_table_that_is_written_to_between_two_layers_is_read_anew(layout: str) -> None:
    """Layers share what a rewrite makes of a table, which is a copy where the table has gaps."""

    def body(m, x, cos, sin):
        table = polar(cos, layout)[None, None]
        results = []
        for _ in range(2):
            q, k, v = m.heads(x).split(D, -1)
            results.append(attend(rotate_complex(q, table), rotate_complex(k, table), v))
            table.mul_(0.5j)
        return results

    assert compared(body, grad=False).fused(PATTERN) == 2


def test_tables_that_are_rounded_from_float64_are_tables_of_float32() -> None:
    def body(m, x, cos, sin):
        cos, sin = (torch.cat((t, t), -1).float() for t in (cos.double().cos()[:, :4], sin.double().sin()[:, :4]))
        q, k, v = m.heads(x).split(D, -1)
        return attend(rotate(q, cos, sin), rotate(k, cos, sin), v)

    assert compared(body).fused(PATTERN) == 1


@pytest.mark.parametrize("wide", ["q", "k", "table"])
def test_a_rotation_in_float64_of_lower_precision_is_kept(wide: str) -> None:
    def body(m, x, cos, sin):
        q, k, v = m.heads(x).split(D, -1)
        if wide == "table":
            cos, sin = cos.double(), sin.double()
        q, k = q.double() if wide == "q" else q, k.double() if wide == "k" else k
        return attend(rotate(q, cos, sin).float(), rotate(k, cos, sin).float(), v)

    assert sites(compared(body)) == [("kept", "it is computed in float64 from lower precision, which no kernel does")]


def test_values_that_are_read_before_the_tables_are_computed_stay_where_they_are() -> None:
    def body(m, x, cos, sin):
        q, k, v = m.heads(x).split(D, -1)
        v = v.contiguous()
        cos, sin = cos.cos(), sin.sin()
        return attend(rotate(q, cos, sin), rotate(k, cos, sin), v)

    assert sites(compared(body, grad=False)) == [("torch_fuse::qk_norm_rope", "no norm, RoPE on 8 of 16 lanes (half)")]


def test_a_view_of_a_table_behind_the_first_reader_of_the_values_is_computed_earlier() -> None:
    def body(m, x, cos, sin):
        q, k, v = m.heads(x).split(D, -1)
        v = v.contiguous()
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        return attend(rotate(q, cos, sin), rotate(k, cos, sin), v)

    assert sites(compared(body, grad=False)) == [
        ("torch_fuse::partial_rope", "no norm, RoPE on 8 of 16 lanes (half), where they lie")
    ]


def test_autocast_that_is_turned_off_in_a_region_is_not_idle_where_it_is_on_around_it() -> None:
    def block(m, x, cos, sin):
        q, k, v = m.heads(x).float().split(D, -1)
        with torch.autocast("cpu", enabled=False):
            q = rotate(q, cos, sin)
        return attend(q, rotate(k, cos, sin), v)

    def body(m, x, cos, sin):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(block, m, x, cos, sin, use_reentrant=False)

    ((status, reason),) = sites(compared(body))
    assert status == "missed" and reason.startswith("autocast or grad mode changes inside the region")


@pytest.mark.parametrize("grad", [False, True])
def test_all_layers_share_one_table_in_memory(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU: Inductor would compute the table anew for every few of the ops that read it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    module = importlib.import_module("torch_fuse.patterns.norm_qkv_rope_attention")
    monkeypatch.setattr(module.qk_norm_rope, "supports", lambda *_: None)
    monkeypatch.setattr(module, "MIN_TOKENS", 0)
    config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8,
                           vocab_size=8, rotary_pct=0.25)  # fmt: skip
    with torch.device("meta"):
        model, tokens = GPTNeoXForCausalLM(config), torch.zeros(1, 8, dtype=torch.long)
    rewriter = Rewriter(Options(on_error="raise"))
    with torch.set_grad_enabled(grad):
        rewritten(model, rewriter)(tokens, use_cache=False)
    (graph,) = rewriter.graphs
    targets = [node.target for node in graph.graph.nodes]
    assert rewriter.report.counts()[PATTERN] == {"fused": 3}
    assert targets.count(torch.ops.torch_fuse.in_memory.default) == 2


@pytest.mark.parametrize("key_first", [False, True])
def test_a_table_read_by_position_and_by_head_is_two_rotations(key_first: bool) -> None:
    """As many heads as positions: one table is broadcast over either, before and after the transpose."""
    n = S

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 3 * n * R)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = (part.view(B, S, n, R) for part in self.qkv(x).chunk(3, -1))
            by_head, by_position = (q, k) if key_first else (k, q)
            by_head = rotate(by_head, cos, sin).transpose(1, 2)
            by_position = rotate(by_position.transpose(1, 2), cos, sin)
            q, k = (by_head, by_position) if key_first else (by_position, by_head)
            return attend(q, k, v.transpose(1, 2))

    torch.manual_seed(0)
    angles = torch.outer(torch.arange(float(S)), 0.5 ** torch.arange(R // 2)).repeat(1, 2)
    result = compare(Block(), (torch.randn(B, S, 32), angles.cos(), angles.sin()), draws=1)
    assert not result.problems and result.fused(PATTERN) == 0, result.reasons
    assert "differ from head to head" in result.reasons
