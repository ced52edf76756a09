"""Soft caps and sinks become masked_attention where that is exact, and stay with a true reason where it is not."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Comparison, Rewriter, compare, rewritten
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse.kernels import masked_attention
from torch_fuse.patterns import softcap_sinks_attention
from torch_fuse.report import Site
from torch_fuse.rewrite.registry import patterns

PATTERN = "softcap_sinks_attention"
SPELLINGS = {example.name: example for example in patterns()[PATTERN].spellings()}
NEAR_MISSES = {example.name: example for example in patterns()[PATTERN].near_misses()}
SITES = (PATTERN, "written_out_attention")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def site(result: Comparison | Rewriter) -> Site:
    """What became of the only attention."""
    (found,) = [s for s in result.report.sites if s.pattern in SITES]
    return found


def emitted(name: str) -> list[Any]:
    """The arguments of masked_attention after the mask's, for a spelling: left, right, scale, softcap, sinks."""
    model, inputs = SPELLINGS[name].make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    (call,) = [n for n in rewriter.graphs[0].graph.nodes if n.target is masked_attention.reference]
    return list(call.args[5:])


REASONS = {
    "cap_after_the_mask": "the scores go through tanh after a mask or bias",
    "cap_after_filling": "the scores are scaled after masking",
    "mask_within_the_cap": "the mask is scaled after it is added",
    "filled_within_the_cap": "the scores are scaled after masking",
    "bias_before_the_cap": "the scores go through tanh after a mask or bias",
    "tanh_twice": "the scores go through tanh twice",
    "negative_cap": "the soft cap is -2.0",
    "cap_of_an_input": "the soft cap is no number",
    "capped_weights_read": "the attention weights are used elsewhere too (output_attentions)",
    "capped_and_dropped": "dropped at random",
    "sigmoid_for_tanh": "the scores go through sigmoid",
    "cap_and_padding_added_with_gradients": "may exclude every key: its gradients are others then",
    "cap_and_a_mask_of_unknown_values": "the mask adds numbers of input",
    "sinks_and_a_mask_of_unknown_values": "the mask adds numbers of input",
    "sinks_and_absent_queries": "the mask",
    "sinks_that_may_be_infinite": "whether the sinks are finite is not known",
    "column_not_dropped": "their column is not dropped",
    "first_column_dropped": "a part of the attention weights is taken",
    "sinks_in_front": "what is joined to the scores is not one number a head",
    "weights_of_sinks_read": "the attention weights are used elsewhere too",
    "scaled_after_joining": "changed after they are joined",
    "capped_after_joining": "changed after they are joined",
    "biased_after_joining": "changed after they are joined",
    "maximum_before_joining": "changed after their maximum is subtracted",
    "maximum_of_columns": "the scores go through sub",
    "sinks_of_queries": "not one number a head",
    "sinks_of_tokens": "not one number a head",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_another_computation_stays_and_the_report_says_why(name: str) -> None:
    model, inputs = NEAR_MISSES[name].make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    found = site(rewriter)
    assert found.status in ("kept", "missed") and REASONS[name] in found.reason, found.reason


def test_every_near_miss_has_a_reason() -> None:
    assert set(NEAR_MISSES) == set(REASONS)


@pytest.mark.parametrize("cut", [lambda w: w.split([5, 4], -1)[0], lambda w: w.chunk(2, 1)[1], lambda w: w.max(-1)])
def test_weights_that_are_cut_into_several_are_no_attention(cut: Any) -> None:
    """What is taken out of the list is no view of one tensor."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        part = cut((q @ k.transpose(-1, -2)).softmax(-1))
        part = part[0].unsqueeze(-1) if isinstance(part, tuple) and not isinstance(part, Tensor) else part
        return (part @ v[:, : part.shape[1], : part.shape[-1]]).transpose(1, 2).contiguous()

    inputs = tuple(torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    result = compare(model, inputs)
    assert result.problems == [] and result.fused(PATTERN) == result.fused("written_out_attention") == 0


def test_the_report_tells_what_a_filling_mask_keeps() -> None:
    """One key of nine, not eight."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2))
        first = torch.ones(1, 9).tril().bool()
        return (scores.masked_fill(~first, -1e9).softmax(-1) @ v).transpose(1, 2).contiguous()

    inputs = (torch.randn(2, 4, 1, 8), *(torch.randn(2, 4, 9, 8) for _ in range(2)))
    assert "keeps 11% of the pairs" in site(compare(model, inputs)).reason


@pytest.mark.parametrize(
    ("name", "left", "right", "scale", "softcap", "sinks"),
    [
        ("gemma2", None, 0, 0.8, 2.0, False),
        ("cap_without_a_mask", None, None, 1.0, 2.0, False),
        ("cap_in_a_window", 2, 0, 0.8, 2.0, False),
        ("factors_that_differ", None, 0, 0.75, 3.0, False),
        ("gpt_oss", None, 0, 0.8, 0.0, True),
        ("sinks_and_cap", None, 0, 1.0, 2.0, True),
    ],
)
def test_the_op_gets_the_band_the_scale_the_cap_and_the_sinks(
    name: str, left: Any, right: Any, scale: float, softcap: float, sinks: bool
) -> None:
    found = emitted(name)
    assert found[:2] == [left, right] and (found[4] is not None) == sinks
    assert found[2:4] == pytest.approx([scale, softcap])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "cap_in_a_window", "cap_and_padding_filled"])
def test_other_lengths_agree_without_another_graph(name: str) -> None:
    model, _ = SPELLINGS[name].make(torch.float32)
    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    for length in (9, 12, 15):
        q, k, v = (torch.randn(2, length, 4, 8).transpose(1, 2) for _ in range(3))
        more = [torch.randn(4, requires_grad=True)] if name == "gpt_oss" else []
        if "padding" in name:
            more = [(torch.arange(length) > torch.tensor([[-1], [3]])).long()]
        torch.testing.assert_close(compiled(q, k, v, *more), model(q, k, v, *more))
    assert len(rewriter.graphs) == 2 and rewriter.statuses == {(PATTERN, "fused")}, rewriter.report


def test_numbers_that_dynamic_shapes_make_inputs() -> None:
    """A scale may be one; a cap is a constant of the kernel."""
    for name, status in (("gpt_oss", "fused"), ("gemma2", "missed")):
        model, inputs = SPELLINGS[name].make(torch.float32)
        result = compare(
            lambda *x, run=model: run(*(t.view(2, 4, 9, 8) if t.dim() == 3 else t for t in x)),
            tuple(x.detach().flatten(0, 1).requires_grad_() if x.dim() == 4 else x for x in inputs),
            dynamic=True,
        )
        assert site(result).status == status and not result.problems, result.reasons


def test_repeated_heads_are_not_read() -> None:
    model, inputs = SPELLINGS["grouped_heads"].make(torch.float32)
    rewriter = Rewriter()
    rewritten(model, rewriter)(*inputs)
    nodes = rewriter.graphs[0].graph.nodes
    (call,) = [n for n in nodes if n.target is masked_attention.reference]
    assert [arg.meta["example_value"].shape[1] for arg in call.args[:3]] == [4, 2, 2]


class _Written(nn.Module):
    """Sinks that are changed between the view of them, or the copy, and the softmax."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        sinks = sinks * 1
        column = sinks.reshape(1, -1, 1, 1)
        column = column.repeat(q.shape[0], 1, 9, 1) if self.copies else column.expand(q.shape[0], -1, 9, -1)
        sinks.add_(3.0)
        return (torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2) + sinks[0]


@pytest.mark.parametrize("copies", [False, True])
def test_sinks_that_are_written_to_keep_their_value(copies: bool) -> None:
    _, inputs = SPELLINGS["gpt_oss"].make(torch.float32)
    result = compare(_Written(copies), inputs)
    assert not result.problems, result.reasons
    assert site(result).reason == "add_ writes in place to a value of the region"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v, s: (q, k, v[..., :4], s), "differ from the query in batch or head dim"),
        (lambda q, k, v, s: (q[:, :, None], k[:, :, None], v[:, :, None], s), "do not have four dimensions"),
    ],
)
def test_shapes_that_the_op_does_not_take_are_named(change: Any, reason: str) -> None:
    def model(*x: Tensor) -> Tensor:
        q, k, v, _ = change(*x)
        return (torch.tanh(q @ k.mT) * 5).softmax(-1) @ v

    _, inputs = SPELLINGS["gpt_oss"].make(torch.float32)
    result = compare(model, inputs, grad=False)
    assert reason in site(result).reason and not result.problems


def test_two_masks_stay() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(9)
        scores = torch.tanh(q @ k.mT) * 5
        scores = scores.masked_fill(i[None] > i[:, None], -torch.inf).masked_fill(i[None] < i[:, None] - 3, -torch.inf)
        return scores.softmax(-1) @ v

    _, inputs = SPELLINGS["gemma2"].make(torch.float32)
    assert "several masks" in site(compare(model, inputs)).reason


def test_on_a_cpu_it_stays_as_it_is() -> None:
    model, inputs = SPELLINGS["gemma2"].make(torch.float32)
    rewriter = Rewriter(Options(on_error="raise"))
    rewritten(model, rewriter)(*inputs)
    assert site(rewriter).status == "kept" and "the kernel cannot run: " in site(rewriter).reason


def test_few_queries_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    able = SimpleNamespace(**{**vars(masked_attention), "supports": lambda *args: None})
    monkeypatch.setattr(softcap_sinks_attention, "masked_attention", able)
    model, inputs = SPELLINGS["gemma2"].make(torch.float32)
    few = "9 queries{}: the scores are few; it pays from 256 on"
    cases = ((9, 256, False, False, None), (256, 9, False, False, few.format("")), (256, 9, True, False, None),
             (9, 256, True, False, few.format(" with gradients")), (256, 256, True, True, None))  # fmt: skip
    for least, trained, grad, unmeasured, kept in cases:
        monkeypatch.setattr(softcap_sinks_attention, "MIN_QUERIES", least)
        monkeypatch.setattr(softcap_sinks_attention, "MIN_TRAINED", trained)
        rewriter = Rewriter(Options(on_error="raise", unmeasured=unmeasured))
        with torch.set_grad_enabled(grad):
            rewritten(model, rewriter)(*inputs)
        found = site(rewriter)
        assert (found.status, found.reason if kept else None) == ("kept" if kept else "fused", kept)
    taken = [n for n in rewriter.graphs[0].graph.nodes if n.target is operator.getitem]
    assert "torch_fuse.masked_attention" in {str(n.args[0].target).removesuffix(".default") for n in taken}


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_inductor_compiles_the_rewritten_graph(name: str) -> None:
    model, inputs = SPELLINGS[name].make(torch.float32)
    torch._dynamo.reset()
    options = {"kernels": "reference", "on_error": "raise"}
    out = torch.compile(model, backend="fuse", options=options)(*inputs)
    torch.testing.assert_close(out, model(*inputs))
