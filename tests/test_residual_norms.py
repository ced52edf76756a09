"""Residual sums with their norms are recognised as models write them, and left where Inductor would fuse more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch import nn

from torch_fuse import Options
from torch_fuse.kernels._ops import INTERPRETED
from torch_fuse.patterns import _gated_residual_norm_examples as examples
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

ONLY = ("gated_residual_norm",)
NOTES = {
    "llama": ["one term, 1 x RMSNorm"],
    "neox_parallel": ["two terms, 2 x LayerNorm"],
    "neox_right_association": ["two terms, 2 x LayerNorm"],
    "bert_post_norm": ["one term, 1 x LayerNorm"] * 2,
    "subtracted_and_scaled": ["two terms, 1 x LayerNorm"],
    "wan_self_attention": ["one term with a gate, 1 x LayerNorm"],
    "wan_feed_forward": ["one term with a gate, 1 x LayerNorm, modulated"],
    "wan_first": ["no term, 1 x LayerNorm, modulated"],
    "sd3": ["one term with a gate, 1 x LayerNorm, modulated"],
    "scale_alone": ["one term, 1 x RMSNorm, modulated"],
    "gate_per_token": ["two terms with a gate, 1 x LayerNorm"],
}


def sites(model, inputs, options=None, grad: bool = False):
    """The pattern's sites and the arguments of the op's calls; the fused graph is not run."""
    found, calls = [], []

    def backend(gm, example_inputs):
        outcome = rewrite(gm, options or Options(on_error="raise", only=ONLY), patterns())
        found.extend(site for site in outcome.report.sites if site.pattern == ONLY[0])
        calls.extend(node.args for node in outcome.gm.graph.nodes if "gated_residual_norm" in str(node.target))
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(*inputs)
    return found, calls


@pytest.mark.parametrize("name", NOTES)
def test_a_spelling_is_recognised_as_what_it_is(name: str) -> None:
    model, inputs = examples._example(getattr(examples, name), True).make(torch.float32)
    found, _ = sites(model, inputs, Options(kernels="reference", on_error="raise", only=ONLY))
    assert [site.reason for site in found if site.status == "fused"] == NOTES[name]


def test_of_two_norms_with_other_epsilons_the_first_is_fused() -> None:
    result = compare(*examples._example(examples.other_eps, False).make(torch.float32))
    assert result.fused(ONLY[0]) == 1 and not result.problems


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("term_written_between", "writes in place"), ("written_in_place", "writes in place"),
        ("step_returned", "output reads rsqrt, a step of the sum or of the norm"),
    ],
)  # fmt: skip
def test_a_refusal_names_its_reason(name: str, reason: str) -> None:
    model, inputs = examples._example(getattr(examples, name), False).make(torch.bfloat16)
    (site,), _ = sites(model, inputs, Options(kernels="reference", on_error="raise", only=ONLY), grad=True)
    assert site.status == "missed" and reason in site.reason


@pytest.mark.parametrize(
    "name",
    ["added_in_place", "broadcast_stream", "norm_over_other_dim", "two_dims", "lerped"],
)
def test_what_is_no_sum_under_a_norm_is_passed_over(name: str) -> None:
    model, inputs = examples._example(getattr(examples, name), False).make(torch.float32)
    assert sites(model, inputs, Options(kernels="reference", on_error="raise", only=ONLY))[0] == []


def test_a_sum_that_is_written_to_after_the_norm_keeps_its_values() -> None:
    def written_after(m, x, _):
        r = m.one(x) + x
        h = m.layer(r)
        r.mul_(1.5)
        return m.left(h), r

    model, inputs = examples._example(written_after, False).make(torch.float32)
    assert not compare(model, inputs, grad=False).problems


@pytest.mark.parametrize(
    "tail",
    [
        lambda m, r, h: h * (1 + m.w1) + r,
        lambda m, r, h: h * (1 + r),
        lambda m, r, h: h * (1 + m.two(r)) + m.b1,
        lambda m, r, h: torch.addcmul(r.sin(), h, 1 + m.w1),
    ],
)
def test_a_modulation_by_the_sum_itself_stays_behind_the_norm(tail) -> None:
    def body(m, x, _):
        r = x + m.one(x)
        return r + m.left(tail(m, r, m.bare(r)))

    model, inputs = examples._example(body, True).make(torch.float32)
    result = compare(model, inputs, draws=2)
    assert not result.problems
    assert [site.reason for site in result.report.sites if site.status == "fused"] == ["one term, 1 x LayerNorm"]


class Block(nn.Module):
    """One linear layer's result on a stream, then norm and another linear layer; wide enough for the kernel."""

    def __init__(self, combine, width: int = 512, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.one, self.two, self.next = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.combine = nn.LayerNorm(width), combine
        self.to(dtype)

    def forward(self, x):
        return self.combine(self, x)


def plain(m, x):
    r = x + m.one(x)
    return r + m.next(m.norm(r))


UNMEASURED = Options(on_error="raise", only=ONLY, unmeasured=True)


def decision(model, shape=(2, 128, 512), dtype=torch.bfloat16, grad: bool = False, options=None):
    found, calls = sites(model, [torch.randn(shape, dtype=dtype)], options, grad)
    (site,) = found
    return site, calls


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton could run on the CPU, and narrow rows paid; nothing is launched."""
    monkeypatch.setattr("torch_fuse.kernels._gated_residual_norm_common.no_triton", lambda x: None)
    monkeypatch.setattr("torch_fuse.patterns.gated_residual_norm.MIN_WIDTH", 512)
    monkeypatch.setattr("torch_fuse.patterns.gated_residual_norm.MIN_ELEMENTS", 256 * 512)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_without_a_gpu_it_is_kept() -> None:
    site, _ = decision(Block(plain))
    assert (site.status, site.reason) == ("kept", "the kernel cannot run: Triton has no backend for device 'cpu'")


@pytest.mark.usefixtures("kernels")
def test_where_the_kernel_runs_wide_rows_of_many_tokens_are_fused() -> None:
    site, calls = decision(Block(plain))
    assert (site.status, site.op) == ("fused", "torch_fuse::gated_residual_norm")
    assert calls[0][-1] is True, "the sum is read"
    site, _ = decision(Block(plain), (2, 127, 512))
    assert site.status == "kept" and site.reason == "130048 elements: bound by the launch; it pays from 131072 on"
    site, _ = decision(Block(plain, 496), (2, 128, 496))
    assert site.status == "kept" and "rows of 496 lanes" in site.reason
    site, _ = decision(Block(plain, 516), (2, 128, 516))
    assert site.status == "kept" and "C is 516; allowed: multiples of 8" in site.reason
    site, _ = decision(Block(plain, dtype=torch.float64), dtype=torch.float64)
    assert site.status == "kept" and "torch.float64" in site.reason


@pytest.mark.usefixtures("kernels")
def test_with_gradients_it_is_kept_until_it_is_measured_to_win() -> None:
    site, _ = decision(Block(plain), grad=True)
    assert (site.status, site.reason) == ("kept", "with gradients it is not measured to win")


@pytest.mark.usefixtures("kernels")
def test_a_sum_that_nothing_reads_is_written_for_a_gradient_only() -> None:
    def post_norm(m, x):
        return m.next(m.norm(x + m.one(x)))

    for grad in (False, True):
        _, calls = decision(Block(post_norm), grad=grad, options=UNMEASURED)
        assert calls[0][-1] is grad


KEPT = {
    "elementwise term": (lambda m, x: (r := x + m.one(x) * x.sigmoid().exp()) + m.next(m.norm(r)), "elementwise"),
    "dropout": (lambda m, x: (r := x + F.dropout(m.one(x), 0.1, True)) + m.next(m.norm(r)), "dropout is computed"),
    "branch norm": (lambda m, x: (r := x + m.norm(m.one(x))) + m.next(m.norm(r)), "elementwise"),
    "elementwise reader": (lambda m, x: m.next((r := x + m.one(x)) + m.norm(r).sin()), "what reads"),
    "modulation by token": (
        lambda m, x: (r := x + m.one(x)) + m.next(F.layer_norm(r, (512,)) * (1 + m.two(x).sin())), "for each token",
    ),
    "stream inside": (lambda m, x: m.next(m.norm(x.sin() + m.one(x))), "elementwise"),
    "strided term": (
        lambda m, x: (r := x + m.one(x).unflatten(2, (256, 2)).transpose(2, 3).flatten(2)[..., ::1])
        + m.next(m.norm(r)), "elementwise",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", KEPT)
def test_where_inductor_would_fuse_more_it_is_kept_with_the_reason(name: str) -> None:
    combine, reason = KEPT[name]
    site, _ = decision(Block(combine))
    assert site.status == "kept" and reason in site.reason, site.reason


@pytest.mark.usefixtures("kernels")
def test_dropout_that_drops_nothing_and_views_are_looked_through() -> None:
    def combine(m, x):
        r = x + F.dropout(m.one(x), 0.1, training=False).view(2, 128, 512)
        return r + m.next(F.dropout(m.norm(r), 0.0).flatten(0, 1)).view(x.shape)

    assert decision(Block(combine))[0].status == "fused"


def tiny(name: str) -> tuple[nn.Module, list]:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0}  # fmt: skip
    if name == "Gemma2":
        sizes |= {"head_dim": 16, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    cls = getattr(transformers, {"Bert": "BertModel", "Gemma2": "Gemma2ForCausalLM"}[name])
    return cls(cls.config_class(**sizes)).eval(), [torch.randint(0, 40, (2, 9))]


@pytest.mark.parametrize(("name", "fused"), [("Bert", 4), ("Gemma2", 4)])
def test_unmodified_models_fire_and_agree_with_their_gradients(name: str, fused: int) -> None:
    model, inputs = tiny(name)
    options = Options(kernels="reference", on_error="raise", only=ONLY)
    result = compare(model, inputs, {"return_dict": False, "use_cache": False}, options=options, draws=1)
    assert result.fused(ONLY[0]) == fused, result.reasons
    # attention does not depend on a bias of the key: its gradient is noise
    assert not [problem for problem in result.problems if "key.bias" not in problem]


def test_one_dynamic_graph_serves_all_batches_and_lengths() -> None:
    model, _ = examples._example(examples.wan_feed_forward, True).make(torch.float32)
    rewritten = []

    def backend(gm, example_inputs):
        rewritten.append(rewrite(gm, Options(kernels="reference", on_error="raise"), patterns()).report)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (4, 2)):
            inputs = torch.randn(batch, length, examples.C), torch.randn(batch, 6, examples.C)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    assert [report.rewrites for report in rewritten] == [1]
