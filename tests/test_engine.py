"""What the engine promises whatever the patterns: nothing lost, nothing hidden, nothing changed by a failure."""

import functools
import json
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_fuse
from torch_fuse.backend import MissError, fuse
from torch_fuse.options import Options
from torch_fuse.rewrite import registry
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.pattern import Match, Pattern


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inductor_is_eager(monkeypatch):
    """Leaves Inductor out: the rewritten graph runs as it is."""
    seen = []

    def run(gm, example_inputs, patches):
        seen.append((gm, patches))
        return gm.forward

    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", run)
    return seen


def causal(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=i[:, None] >= i[None, :])


def padded(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv(length=6, **kwargs):
    return [torch.randn(1, 2, length, 8, **kwargs) for _ in range(3)]


def test_the_backend_is_found_without_an_import():
    assert "fuse" in torch._dynamo.list_backends(exclude_tags=())


def test_a_report_is_kept_for_every_graph(inductor_is_eager):
    def model(q, k, v):
        out = causal(q, k, v)
        torch._dynamo.graph_break()
        return causal(out, k, v)

    inputs = qkv()
    torch.testing.assert_close(torch.compile(model, backend="fuse")(*inputs), model(*inputs))
    found = torch_fuse.reports().to_dict()
    assert found["graphs"] == 2 and found["rewrites"] == 2
    assert [site["status"] for site in found["sites"]] == ["fused", "fused"]
    assert all(site["location"].startswith(__file__) and site["device"] == "cpu" for site in found["sites"])
    json.dumps(found)
    assert "causal_mask" in str(torch_fuse.reports())
    torch_fuse.reset_reports()
    assert torch_fuse.reports().to_dict()["graphs"] == 0


def rolled(q, k, v):
    i = torch.arange(q.shape[-2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.roll(i[:, None] >= i[None, :], 1, 0))


def test_a_mask_from_outside_is_missed_with_its_name(inductor_is_eager):
    torch.compile(padded, backend="fuse")(*qkv(), torch.ones(6, 6, dtype=torch.bool))
    [site] = torch_fuse.reports().sites
    assert (site.status, site.pattern) == ("missed", "causal_mask") and "input mask" in site.reason


@pytest.mark.parametrize(("on_miss", "raised"), [("warn", None), ("error", MissError)])
def test_misses_can_warn_or_raise(inductor_is_eager, on_miss, raised):
    compiled = torch.compile(rolled, backend="fuse", options={"on_miss": on_miss})
    inputs = qkv()
    if raised is None:
        with pytest.warns(UserWarning, match="did not recognise 1 attention"):
            compiled(*inputs)
    else:
        with pytest.raises(Exception, match="did not recognise 1 attention") as error:
            compiled(*inputs)
        assert isinstance(error.value.__cause__ or error.value.inner_exception, raised)


def test_fuel_stops_after_n_rewrites(inductor_is_eager):
    def model(q, k, v):
        return causal(causal(causal(q, k, v), k, v), k, v)

    torch.compile(model, backend="fuse", options={"fuel": 2})(*qkv())
    assert torch_fuse.reports().counts() == {"causal_mask": {"fused": 2, "kept": 1}}
    assert "fuel" in torch_fuse.reports().sites[2].reason


@pytest.mark.parametrize("options", [{"disable": ["causal_mask"]}, {"only": ["norm_qkv_rope_attention"]}])
def test_patterns_can_be_switched_off(inductor_is_eager, options):
    torch.compile(causal, backend="fuse", options=options)(*qkv())
    assert torch_fuse.reports().counts() == {"causal_mask": {"kept": 1}}


def test_wrong_options_are_refused_before_compiling(inductor_is_eager):
    with pytest.raises(Exception, match="did you mean 'fuel'"):
        torch.compile(causal, backend="fuse", options={"fule": 1})(*qkv())
    assert inductor_is_eager == []
    with pytest.raises(TypeError, match="'modes'"):
        fuse(None, [], modes="default")


def test_mode_and_inductor_options_reach_inductor(inductor_is_eager):
    options = {"inductor": {"epilogue_fusion": False}}
    backend = functools.partial(fuse, mode="max-autotune-no-cudagraphs", options=options)
    torch.compile(causal, backend=backend)(*qkv())
    [(_, patches)] = inductor_is_eager
    assert patches["max_autotune"] is True and patches["epilogue_fusion"] is False


@pytest.fixture
def broken_pattern():
    @torch_fuse.register
    class Broken(Pattern):
        """Fails half-way through a rewrite."""

        name = "zz_broken"
        kind = "attention"

        def match(self, view, anchor):
            return Match(anchor, {}, (anchor,), frozenset({anchor}), tuple(anchor.all_input_nodes))

        def rewrite(self, match, builder, options):
            builder.call(torch.neg, match.inputs[0])
            raise RuntimeError("half-way")

    yield
    registry._patterns.pop("zz_broken")


def test_a_failing_pattern_leaves_the_graph_as_it_was_and_warns_once(inductor_is_eager, broken_pattern):
    inputs = qkv()
    with pytest.warns(UserWarning, match="half-way"):
        torch.testing.assert_close(torch.compile(causal, backend="fuse")(*inputs), causal(*inputs))
    [(gm, _)] = inductor_is_eager
    targets = [node.target for node in gm.graph.nodes]
    assert torch.neg not in targets
    [sdpa] = [node for node in gm.graph.nodes if node.target is F.scaled_dot_product_attention]
    assert sdpa.kwargs["attn_mask"] is not None, "the rewrite that had worked is undone too"
    assert "half-way" in torch_fuse.reports().to_dict()["errors"][0]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(causal, backend="fuse")(*inputs)


@pytest.mark.parametrize("where", ["match", "check"])
def test_a_pattern_that_fails_before_it_rewrites_costs_its_own_site_only(inductor_is_eager, broken_pattern, where):
    def fail(*_):
        raise RuntimeError(f"{where} fails")

    setattr(registry._patterns["zz_broken"], where, fail)
    inputs = qkv()
    with pytest.warns(UserWarning, match=f"{where} fails"):
        torch.testing.assert_close(torch.compile(causal, backend="fuse")(*inputs), causal(*inputs))
    report = torch_fuse.reports()
    assert report.counts() == {"causal_mask": {"fused": 1}, "zz_broken": {"missed": 1}}, str(report)
    assert f"RuntimeError: {where} fails" in report.to_dict()["errors"][0]


def test_a_failing_pattern_raises_when_asked_to(inductor_is_eager, broken_pattern):
    with pytest.raises(Exception, match="half-way"):
        torch.compile(causal, backend="fuse", options={"on_error": "raise"})(*qkv())


def test_a_fused_graph_that_does_not_compile_is_compiled_unfused(inductor_is_eager, monkeypatch):
    def compile_unfused_only(gm, example_inputs, patches):
        if any(node.kwargs.get("is_causal") for node in gm.graph.nodes):
            raise RuntimeError("no such kernel")
        return gm.forward

    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", compile_unfused_only)
    inputs = qkv()
    with pytest.warns(UserWarning, match="no such kernel"):
        torch.testing.assert_close(torch.compile(causal, backend="fuse")(*inputs), causal(*inputs))
    assert "no such kernel" in torch_fuse.reports().to_dict()["errors"][0]


def test_dynamic_lengths_are_proven_once(inductor_is_eager):
    compiled = torch.compile(causal, backend="fuse")
    for length in (5, 6, 9):
        inputs = qkv(length)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(*inputs), causal(*inputs))
    assert torch_fuse.reports().counts() == {"causal_mask": {"fused": 1}}


def test_checkpointed_regions_are_rewritten(inductor_is_eager):
    def model(q, k, v):
        return torch.utils.checkpoint.checkpoint(causal, q, k, v, use_reentrant=False)

    inputs = qkv(requires_grad=True)
    found = torch.compile(model, backend="fuse")(*inputs)
    torch.testing.assert_close(found, causal(*inputs))
    assert torch_fuse.reports().counts() == {"causal_mask": {"fused": 1}}
    grads = torch.autograd.grad(found.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(causal(*inputs).sum(), inputs))


def test_the_body_of_a_custom_autograd_function_is_left_alone(inductor_is_eager):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            return causal(q, q, q)

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    q = qkv(requires_grad=True)[0]
    found = torch.compile(lambda x: Function.apply(x), backend="fuse")(q)
    [grad] = torch.autograd.grad(found.sum(), [q])
    torch.testing.assert_close(grad, torch.full_like(q, 3))
    assert all(site.status != "fused" for site in torch_fuse.reports().sites)


def test_autocast_outside_and_inside_agree(inductor_is_eager):
    linear = nn.Linear(8, 8)

    def model(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal(linear(q), linear(k), linear(v))

    inputs = qkv()
    with torch.no_grad():
        found, expected = torch.compile(model, backend="fuse")(*inputs), model(*inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_explain_runs_nothing_and_changes_nothing():
    ran = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, q, k, v):
            self.steps += 1
            out = causal(q, k, v)
            torch._dynamo.graph_break()
            ran.append(float(out.abs().max()))
            return causal(out, k, v)

    model = Model()
    report = torch_fuse.explain(model, *qkv())
    assert report.counts() == {"causal_mask": {"fused": 2}}
    assert ran == [0.0] and float(model.steps) == 0
    assert torch_fuse.reports().to_dict()["graphs"] == 0


def test_decisions_are_logged_and_traced(inductor_is_eager, caplog, monkeypatch):
    artifacts = []
    monkeypatch.setattr("torch_fuse.backend.trace_artifact", lambda name, payload: artifacts.append((name, payload)))
    with caplog.at_level(logging.DEBUG, logger="torch_fuse"):
        torch.compile(causal, backend="fuse")(*qkv())
    assert "the mask is causal" in caplog.text
    [(name, payload)] = artifacts
    assert name == "torch_fuse_report" and json.loads(payload)["rewrites"] == 1


def test_a_graph_is_rewritten_in_time_that_grows_linearly():
    weight = torch.randn(8, 8)

    def seconds(layers):
        def model(q, k, v):
            for _ in range(layers):
                q = F.linear(causal(q, k, v), weight)
            return q

        found = []

        def backend(gm, example_inputs):
            found.append(rewrite(gm, Options(), registry.patterns()).report.seconds)
            return gm.forward

        torch._dynamo.reset()
        torch.compile(model, backend=backend)(*qkv())
        return found[0]

    seconds(4)
    few, many = min(seconds(8) for _ in range(3)), min(seconds(32) for _ in range(3))
    assert many < 8 * few, f"8 layers {few:.3f} s, 32 layers {many:.3f} s"


def test_a_pattern_needs_a_name():
    with pytest.raises(ValueError, match="allowed: an identifier"):
        torch_fuse.register(type("Nameless", (Pattern,), {}))
    with pytest.raises(ValueError, match="subclass"):
        torch_fuse.register(int)
