"""Attention written out becomes SDPA where that is exact, and stays with a true reason where it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import REFERENCE, Comparison, Rewriter, compare, rewritten
from torch import Tensor

from torch_fuse import Options
from torch_fuse.graph.calls import call_of
from torch_fuse.report import Site
from torch_fuse.rewrite.pattern import STAGES, Pattern
from torch_fuse.rewrite.registry import patterns, register

PATTERN = "written_out_attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEAR_MISSES = {example.name: example for example in patterns()[PATTERN].near_misses()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def site(result: Comparison | Rewriter) -> Site:
    """What became of the only attention."""
    (found,) = [s for s in result.report.sites if s.pattern == PATTERN]
    return found


def qkv(dtype: torch.dtype = torch.float32, *shape: int, grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape or (2, 3, 9, 8), dtype=dtype, requires_grad=grad) for _ in range(3)]


def later(length: int) -> Tensor:
    i = torch.arange(length)
    return i[None, :] > i[:, None]


REASONS = {
    "weights_returned": "the attention weights are used elsewhere too (output_attentions)",
    "squared_scores": "the scores go through square",
    "filled_with_a_score": "replaced by -3.0, which does not take a key out",
    "filled_then_scaled": "the scores are scaled after masking",
    "view_of_scores_written_to": "writes in place to a value of the region",
    "query_written_to": "writes in place to a value of the region",
    "dropout": "dropped at random",
    "padding_added_with_gradients": "may exclude every key: SDPA's gradients are others",
    "mask_of_unknown_values": "excludes every key of a row is not known",
    "two_masks_added": "several masks are added",
    "bias_of_a_filled_row": "the gradient of the bias is another then",
    "five_dimensions": "more than batch, head, query and key",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_sdpa_stays_and_the_report_says_why(name: str) -> None:
    model, inputs = NEAR_MISSES[name].make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    found = site(rewriter)
    assert found.status in ("kept", "missed")
    assert REASONS[name] in found.reason


@pytest.mark.parametrize("name", ["softmax_over_queries", "weights_scaled"])
def test_what_is_no_attention_is_not_taken_for_one(name: str) -> None:
    model, inputs = NEAR_MISSES[name].make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    assert PATTERN not in rewriter.report.counts()


def test_what_already_is_sdpa_is_not_touched() -> None:
    rewriter = Rewriter()
    rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), rewriter)(*qkv())
    assert PATTERN not in rewriter.report.counts() and rewriter.report.graphs[0].rewrites == 0


def test_it_runs_before_the_patterns_that_take_sdpa() -> None:
    stages = [pattern.stage for pattern in patterns().values()]
    assert patterns()[PATTERN].stage == "canonicalise" and stages == sorted(stages, key=STAGES.index)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(later(9), -math.inf).softmax(-1) @ v

    rewriter = Rewriter()
    rewritten(causal, rewriter)(*qkv())
    assert {(PATTERN, "fused"), ("causal_mask", "fused")} <= rewriter.statuses
    (call,) = [c for c in map(call_of, rewriter.graphs[0].graph.nodes) if c and c.op == "scaled_dot_product_attention"]
    assert call["is_causal"] is True and call["attn_mask"] is None


def test_a_stage_that_does_not_exist_is_refused_by_name() -> None:
    class Late(Pattern):
        name = "late"
        stage = "afterwards"  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"'afterwards'; allowed: canonicalise, fuse"):
        register(Late)
    assert "late" not in patterns()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("weights_read", "the attention weights are used elsewhere too"),
        ("masked", "may exclude every key"),
        ("dropout", "dropped at random"),
    ],
)
def test_multi_head_attention_that_needs_its_weights_stays(name: str, reason: str) -> None:
    (example,) = [x for x in patterns()["unread_attention_weights"].near_misses() if x.name == name]
    model, inputs = example.make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    (found,) = [s for s in rewriter.report.sites if s.pattern == "unread_attention_weights"]
    assert found.status != "fused" and reason in found.reason


# -- rows without keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-1e30, -math.inf, "lowest"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_without_keys_are_exact_forward_and_backward_when_scores_are_replaced(
    dtype: torch.dtype, low: float | str
) -> None:
    absent = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    absent[1, :, 2] = True  # a row of the second sequence only: elsewhere nothing may become NaN
    number = torch.finfo(dtype).min if isinstance(low, str) else low
    result = compare(lambda q, k, v, m: (q @ k.mT).masked_fill(m, number).softmax(-1) @ v, (*qkv(dtype), absent))
    assert site(result).status == "fused" and not result.problems


@pytest.mark.parametrize("low", [-math.inf, "lowest"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_without_keys_are_exact_when_masks_are_added(dtype: torch.dtype, low: float | str) -> None:
    keep = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    keep[1, :, 2] = False
    number = torch.finfo(dtype).min if isinstance(low, str) else low

    def model(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, torch.zeros((), dtype=q.dtype), number)
        return (q @ k.mT + mask).softmax(-1) @ v

    result = compare(model, (*qkv(dtype, grad=False), keep), grad=False)
    assert site(result).status == "fused" and not result.problems


def test_a_low_bias_that_is_neither_exact_nor_excluding_is_refused() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (q @ k.mT + torch.where(m, -1e9, 0.0)).softmax(-1) @ v

    result = compare(model, (*qkv(grad=False), torch.rand(9, 9) > 0.5), grad=False)
    assert "too low to be exact" in site(result).reason and not result.problems


def test_a_causal_mask_with_more_queries_than_keys_has_no_row_without_keys() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(later(9)[:, :5], -math.inf).softmax(-1) @ v

    q, k, v = qkv()
    result = compare(model, (q, k[:, :, :5].detach().requires_grad_(), v[:, :, :5].detach().requires_grad_()))
    assert "apart" not in site(result).reason and site(result).status == "fused" and not result.problems


def test_masks_that_exclude_every_key_only_together_are_not_taken_to_be_harmless() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(9)
        not_own = torch.where(i[None, :] == i[:, None], -math.inf, 0.0)  # each row of each mask keeps a key,
        not_before = torch.where(i[None, :] < i[:, None], -math.inf, 0.0)  # but the last row of both keeps none
        return (q @ k.mT + not_own + not_before).softmax(-1) @ v

    result = compare(model, qkv(grad=False), grad=False)
    assert site(result).status == "missed" and not result.problems


@pytest.mark.parametrize("learned", [True, False])
def test_a_frozen_parameter_is_a_bias_and_a_buffer_may_be_a_mask(learned: bool) -> None:
    class Attend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.randn(17, 3)
            if learned:
                self.table = torch.nn.Parameter(table, requires_grad=False)
            else:
                self.register_buffer("table", table)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            i = torch.arange(9)
            bias = self.table[(i[None, :] - i[:, None] + 8).view(-1)].view(9, 9, 3).permute(2, 0, 1).contiguous()
            return (q @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v  # Swin, BEiT

    result = compare(Attend(), qkv())
    assert site(result).status == ("fused" if learned else "missed") and not result.problems


# -- dtypes --------------------------------------------------------------------------------------------------------


def test_a_float32_bias_of_half_precision_scores_is_not_rounded() -> None:
    bias = torch.randn(9, 9, requires_grad=True)
    result = compare(lambda q, k, v, b: (q @ k.mT + b).softmax(-1).to(v.dtype) @ v, (*qkv(torch.bfloat16), bias))
    assert "would round" in site(result).reason and not result.problems


def test_float64_inside_is_refused_and_float64_throughout_is_fused() -> None:
    inside = compare(lambda q, k, v: (q @ k.mT).double().softmax(-1).float() @ v, qkv())
    assert "float64" in site(inside).reason
    assert site(compare(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, qkv(torch.float64))).status == "fused"


def test_autocast_is_refused() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(F.softmax(q @ k.mT, dim=-1), v)

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(q, k, v)

    rewriter = Rewriter()
    rewritten(inside, rewriter)(*qkv())
    assert "autocast" in site(rewriter).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewriter = Rewriter()
        rewritten(model, rewriter)(*qkv())
    assert "autocast" in site(rewriter).reason


def test_a_query_of_another_dtype_is_refused() -> None:
    q, k, v = qkv(torch.bfloat16)
    q = q.detach().float().requires_grad_()
    result = compare(lambda q, k, v: (q @ k.float().mT).softmax(-1).to(v.dtype) @ v, (q, k, v))
    assert "the query is torch.float32" in site(result).reason and not result.problems


# -- batch and heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "status"), [((2, 3), "fused"), ((3, 2), "missed")])
def test_heads_that_are_split_in_two_ways_are_refused(heads: tuple[int, int], status: str) -> None:
    """The bias of the scores is for (3, 2), where one dimension of it is broadcast."""

    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = torch.bmm(q, k.mT).view(2, 3, 9, 9).view(*heads, 9, 9) + bias
        return torch.bmm(scores.view(2, 3, 9, 9).softmax(-1).view(6, 9, 9), v)

    bias = torch.randn(1, heads[1], 9, 9, requires_grad=True)
    result = compare(model, (*qkv(torch.float32, 6, 9, 8), bias))
    assert site(result).status == status and not result.problems


# -- scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_learned_scale_gets_its_gradient_or_is_refused_where_it_would_round(dtype: torch.dtype) -> None:
    scale = torch.rand(3, 1, 1, dtype=dtype).requires_grad_()
    result = compare(lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v, (*qkv(dtype, 2, 3, 33, 16), scale))
    assert site(result).status == ("fused" if dtype == torch.float32 else "kept")
    assert not result.problems


def test_dynamic_sizes_and_scales_are_served_by_one_graph() -> None:
    class Attend(torch.nn.Module):
        scaling = 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.matmul(q, k.transpose(2, 3)) * self.scaling / math.sqrt(q.shape[-1])
            return (scores.masked_fill(later(q.shape[2]), -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)

    rewriter = Rewriter()
    model = rewritten(Attend(), rewriter, dynamic=True)
    for batch, length in ((2, 9), (3, 17), (4, 33)):
        inputs = qkv(torch.float32, batch, 3, length, 8)
        torch.testing.assert_close(model(*inputs), Attend()(*inputs))
    assert len(rewriter.report.graphs) == 1 and (PATTERN, "fused") in rewriter.statuses


# -- profit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "status"), [(9, "kept"), (256, "fused")])
def test_short_attention_stays_with_inductor(length: int, status: str) -> None:
    rewriter = Rewriter(Options(on_error="raise"))
    inputs = qkv(torch.float32, 1, 2, length, 8, grad=False)
    rewritten(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, rewriter)(*inputs)
    assert site(rewriter).status == status
    assert "queries" in site(rewriter).reason or status == "fused"


def test_a_key_stored_transposed_stays_with_inductor() -> None:
    rewriter = Rewriter(Options(on_error="raise"))
    rewritten(lambda q, k, v: (q @ k).softmax(-1) @ v, rewriter)(*qkv(torch.float32, 1, 2, 256, 256, grad=False))
    assert "the key is stored with its head dim strided" in site(rewriter).reason


def test_inductor_compiles_it_forward_and_backward() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.3).view(2, 3, 9, 9)
        weights = scores.masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
        return torch.bmm(weights.view(6, 9, 9), v)

    keep = torch.arange(9) < torch.tensor([[9], [0]])
    inputs: list[Any] = [*qkv(torch.float32, 6, 9, 8), torch.randn(6, 1, 9, requires_grad=True)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fuse", options={"kernels": "reference", "on_error": "raise"})
    found = []
    for run in (model, compiled):
        out = run(*inputs, keep)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_mask_that_is_turned_round_with_the_scores_stays() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).tril() == 0, float("-inf"))
        return ((q @ k.mT + mask) * -0.3).softmax(-1) @ v

    rewriter = Rewriter()
    rewritten(model, rewriter)(*qkv(torch.float32, 1, 2, 5, 8, grad=False))
    assert site(rewriter).reason == "the mask is scaled by -0.3 after it is added"


def test_without_the_pattern_the_report_says_so() -> None:
    rewriter = Rewriter(Options(kernels="reference", disable=(PATTERN,)))
    rewritten(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, rewriter)(*qkv())
    assert site(rewriter).reason == "disabled by options"
    assert REFERENCE.disable == ()
