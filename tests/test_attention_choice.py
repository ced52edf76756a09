"""options={"attention": "measure"}: what is timed, chosen, remembered and said, with a made-up clock."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, rewritten
from torch import Tensor

import torch_fuse
from torch_fuse import Options, measurements
from torch_fuse._compat import cudnn_attention, flash_attention, op_overload
from torch_fuse.graph_timing import HOPELESS, LEAST_ROUNDS, ROUNDS, Times, race
from torch_fuse.kernels import dense_attention
from torch_fuse.patterns import _attention_candidates as candidates
from torch_fuse.patterns import _attention_choice as choice
from torch_fuse.patterns import _attention_site as sites
from torch_fuse.patterns._attention_candidates import Candidate
from torch_fuse.patterns._attention_check import Sample, difference
from torch_fuse.patterns._attention_site import Layout, Site

MEASURE = Options(attention="measure", on_error="raise", only=("dense_attention",))


def right(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def candidate(name: str, target: Callable[..., Any] = right, **options: Any) -> Candidate:
    able = lambda tensors, site: None  # noqa: E731
    return Candidate(name, target, lambda site: ((site.is_causal, site.scale), {}), able, **options)


def make_site(length: int = 9, *, gradients: bool = False, dim: int = 16, kv: int = 4, causal: bool = True) -> Site:
    q, k, v = (torch.randn(2, length, h, dim).transpose(1, 2) for h in (4, kv, kv))
    layouts = [Layout.of(x) for x in (q, k, v)]
    return Site(torch.device("cpu"), torch.bfloat16, *layouts, 1, causal, dim**-0.5, gradients)  # type: ignore[arg-type]


def test_gradients_are_of_leaves_made_in_the_call_and_of_heads_before_they_are_repeated() -> None:
    site = dataclasses.replace(make_site(gradients=True, kv=2), repetition=2)
    tensors = site.tensors()
    cotangent = torch.randn(2, 4, 9, 16, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    call = candidates.pytorch(tensors, site)
    found = choice._run(lambda leaves: call((seen.extend(leaves), leaves)[1]), tensors, cotangent)
    assert [x.shape for x in found] == [cotangent.shape, *(x.shape for x in tensors)]
    assert all(x.is_leaf and x is not y and x.stride() == y.stride() for x, y in zip(seen, tensors, strict=True))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    k, v = (x.repeat_interleave(2, 1) for x in wide[1:])
    exact = torch.nn.functional.scaled_dot_product_attention(wide[0], k, v, is_causal=True, scale=site.scale)
    for x, y in zip(found[1:], torch.autograd.grad(exact, wide, cotangent.double()), strict=True):
        assert (x - y).norm() <= 0.02 * y.norm()


class Clock:
    """In place of `graph_times`: runs nothing, and says what it is told."""

    def __init__(self) -> None:
        self.device_us: dict[str, float] = {"pytorch": 100.0}
        self.host_us: dict[str, float] = {}
        self.timed: list[list[str]] = []

    def __call__(self, calls: dict[str, Any], device: torch.device) -> tuple[dict[str, Times], dict[str, str]]:
        self.timed.append(list(calls))
        return {name: Times(self.device_us[name], self.host_us.get(name, 10.0)) for name in calls}, {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A CPU on which backends can be measured, by a clock; nothing is known yet."""
    clock = Clock()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "graph_times", clock)
    monkeypatch.setattr(choice, "unmeasurable", lambda site: None)
    monkeypatch.setattr(choice, "CANDIDATES", ())
    choice.forget()
    yield clock
    choice.forget()


def given(clock: Clock, monkeypatch: pytest.MonkeyPatch, *found: Candidate, **us: float) -> None:
    monkeypatch.setattr(choice, "CANDIDATES", found)
    clock.device_us.update(us)


def chosen(site: Site, cuda_graphs: bool = True) -> str:
    found = choice.choose(site, cuda_graphs).candidate
    return found.name if found else "pytorch"


# -- the choice ----------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_the_report_has_the_times(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    given(clock, monkeypatch, candidate("cudnn"), candidate("ours"), cudnn=80.0, ours=60.0)
    assert chosen(make_site()) == "ours"
    reason = choice.choose(make_site(), True).reason
    assert "ours 60.0 us" in reason and "cudnn 80.0 us" in reason and "100.0 us" in reason


@pytest.mark.parametrize(("us", "wanted"), [(97.9, "ours"), (98.1, "pytorch"), (100.0, "pytorch"), (130.0, "pytorch")])
def test_less_than_two_percent_changes_nothing(us: float, wanted: str, clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours"), ours=us)
    assert chosen(make_site()) == wanted


def test_what_a_launch_costs_counts_where_no_cuda_graph_hides_it(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours", own_launch=True), candidate("flash"), ours=80.0, flash=90.0)
    clock.host_us = {"ours": 35.0, "flash": 500.0, "pytorch": 10.0}  # a pinned operator costs what SDPA does
    assert chosen(make_site(), cuda_graphs=True) == "ours"
    assert chosen(make_site(), cuda_graphs=False) == "flash"
    assert "25 us more to launch" in choice.choose(make_site(), False).reason
    assert len(clock.timed) == 1  # one measurement serves both


WRONG = {
    "zeros": lambda *args: torch.zeros_like(right(*args)),
    "nan_in_one_row": lambda *args: right(*args).index_fill(2, torch.tensor([3]), float("nan")),
    "one_wrong_row": lambda *args: right(*args).index_fill(2, torch.tensor([7]), 1.0),
    "heads_in_other_order": lambda *args: right(*args).flip(1),
    "other_scale": lambda q, k, v, c, scale: right(q, k, v, c, 2 * scale),
    "not_causal": lambda q, k, v, c, scale: right(q, k, v, False, scale),
    "other_dtype": lambda *args: right(*args).float(),
    "other_shape": lambda *args: right(*args)[:, :, 1:],
    "coarse": lambda *args: (right(*args) * 64).round() / 64,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_candidate_is_dropped_and_not_timed(name: str, clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours", WRONG[name]), candidate("flash"), ours=1.0, flash=50.0)
    assert chosen(make_site()) == "flash"
    assert clock.timed == [["pytorch", "flash"]]
    assert "ours: wrong" in choice.choose(make_site(), True).reason


def test_a_row_outside_the_sample_counts_too(clock: Clock) -> None:
    site = make_site(length=200)
    tensors = site.tensors()
    out = right(*tensors, True, site.scale)
    sample = Sample(tensors, site)
    row = next(i for i in range(200) if i not in sample.rows.tolist())
    wrong = out.index_fill(2, torch.tensor([row]), 0.0)
    assert not sample.error_beyond_rule(out, wrong)
    assert "8 of 1600 rows" in difference(out, wrong)


def test_a_coarser_result_that_is_near_everywhere_breaks_the_rule() -> None:
    site = make_site(length=64)
    tensors = site.tensors()
    out = right(*tensors, True, site.scale)
    coarse = out * (1 + 0.02 * torch.sign(torch.randn_like(out)))
    assert not difference(out, coarse)
    assert "against float64" in Sample(tensors, site).error_beyond_rule(out, coarse)
    assert not Sample(tensors, site).error_beyond_rule(out, out)


@pytest.mark.parametrize("kv", [1, 2])
def test_the_sample_knows_grouped_heads(kv: int) -> None:
    site = make_site(length=33, kv=kv)
    tensors = [x.double() for x in site.tensors()]
    torch.testing.assert_close(Sample(tensors, site).of(right(*tensors, True, site.scale)), Sample(tensors, site).exact)


def test_a_candidate_that_fails_or_refuses_is_dropped_with_the_reason(clock: Clock, monkeypatch) -> None:
    def fails(*args: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    refuses = dataclasses.replace(candidate("fa4"), refusal=lambda tensors, site: "not installed")
    raises = dataclasses.replace(candidate("cudnn"), refusal=fails)
    given(clock, monkeypatch, candidate("ours", fails), refuses, raises)
    assert chosen(make_site()) == "pytorch"
    reason = choice.choose(make_site(), True).reason
    assert "ours: failed: RuntimeError: no kernel image" in reason and "fa4: not installed" in reason
    assert "cudnn: failed: RuntimeError" in reason


def test_what_ran_out_of_memory_is_tried_again_by_the_next_process(clock: Clock, monkeypatch) -> None:
    def runs_out(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    given(clock, monkeypatch, candidate("ours", runs_out))
    assert chosen(make_site()) == chosen(make_site()) == "pytorch"
    assert len(clock.timed) == 1 and not measurements.stored("attention")


def test_with_gradients_only_those_that_have_them_run(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours"), candidate("flash", gradients=True), ours=1.0, flash=50.0)
    assert chosen(make_site(gradients=True)) == "flash"
    assert "ours: it has no gradient" in choice.choose(make_site(gradients=True), True).reason


def test_a_wrong_gradient_is_dropped(clock: Clock, monkeypatch) -> None:
    def loses(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return right(q, k, 2 * v - v.detach(), *rest)

    given(clock, monkeypatch, candidate("flash", loses, gradients=True), flash=1.0)
    assert chosen(make_site(gradients=True)) == "pytorch"
    assert "gradient of value" in choice.choose(make_site(gradients=True), True).reason


def test_pytorchs_own_pick_is_not_timed_twice(clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(choice, "sdpa_pick", lambda *args: "flash_attention")
    given(clock, monkeypatch, candidate("flash", pick="flash_attention"), flash=1.0)
    assert chosen(make_site()) == "pytorch" and clock.timed == [["pytorch"]]


def test_random_numbers_of_the_program_stay(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("flash", gradients=True), flash=1.0)
    site = make_site(gradients=True)
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    chosen(site)
    assert torch.equal(torch.randn(4), wanted)


@pytest.mark.parametrize("aligned", [True, False])
def test_random_tensors_lie_as_the_sites_do(aligned: bool) -> None:
    layout = Layout((2, 3, 5, 4), (120, 8, 24, 1), aligned)
    x = layout.random(torch.bfloat16, torch.Generator().manual_seed(0))
    assert (x.shape, x.stride(), x.data_ptr() % 16 == 0) == (layout.shape, layout.strides, aligned)
    assert Layout.of(torch.randn(1, 3, 5, 4).expand(2, 3, 5, 4)).strides[0] == 0  # type: ignore[union-attr]


# -- the timer -----------------------------------------------------------------------------------------------------


def test_a_race_takes_turns_and_drops_the_hopeless_but_never_the_baseline() -> None:
    order: list[str] = []
    us = {"pytorch": 100.0 * HOPELESS, "fast": 90.0, "slow": 91.0 * HOPELESS}
    replays = {name: lambda name=name: order.append(name) or us[name] for name in us}
    failed: dict[str, str] = {}
    found = race(replays, failed)
    assert {name: len(times) for name, times in found.items()} == {"pytorch": ROUNDS, "fast": ROUNDS}
    assert list(failed) == ["slow"]
    assert order[3:9] == ["pytorch", "fast", "slow", "fast", "slow", "pytorch"]


def test_a_race_of_long_calls_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("torch_fuse.graph_timing.time.perf_counter", lambda: float(next(ticks)))
    assert len(race({"pytorch": lambda: 1.0}, {})["pytorch"]) == LEAST_ROUNDS


# -- what is remembered --------------------------------------------------------------------------------------------


def entry_file() -> Any:
    (file,) = measurements.directory("attention").glob("*.json")
    return file


def test_another_process_does_not_measure_again(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours"), ours=50.0)
    assert chosen(make_site()) == "ours"
    first = choice.choose(make_site(), True).reason
    choice.forget()
    assert choice.choose(make_site(), True).reason == first
    assert len(clock.timed) == 1
    assert entry_file().stat().st_mode & 0o077 == 0
    assert entry_file().parent.stat().st_mode & 0o077 == 0


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Site]] = {
    "torch": lambda m: m.setattr(torch, "__version__", "9.9") or make_site(),
    "kernels": lambda m: m.setattr(sites, "kernels_hash", lambda: "other") or make_site(),
    "flash_attn_4": lambda m: m.setattr(sites.fa4_attention, "installed", lambda: "4.0") or make_site(),
    "sdpa_settings": lambda m: m.setattr(sites, "sdpa_settings", lambda: "flash off") or make_site(),
    "gpu": lambda m: m.setattr(sites, "platform_of", lambda device: {"gpu": "other"}) or make_site(),
    "length": lambda m: make_site(length=10),
    "heads": lambda m: make_site(kv=2),
    "causal": lambda m: make_site(causal=False),
    "gradients": lambda m: make_site(gradients=True),
    "strides": lambda m: dataclasses.replace(make_site(), value=dataclasses.replace(make_site().value, aligned=False)),
    "repetition": lambda m: dataclasses.replace(make_site(kv=2), repetition=2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_matters_to_a_measurement_is_measured_again(name: str, clock: Clock, monkeypatch) -> None:
    chosen(make_site())
    chosen(CHANGES[name](monkeypatch))
    assert len(clock.timed) == 2


BROKEN = {
    "empty": "",
    "half": '{"key": {"gpu": "c',
    "not_utf8": b"\xff\xfe\x00",
    "no_object": "[1, 2]",
    "no_value": '{"key": KEY}',
    "other_key": '{"key": {}, "value": {"pick": "math", "us": {"pytorch": [1, 1]}, "dropped": {}}}',
    "no_baseline": '{"key": KEY, "value": {"pick": "math", "us": {"ours": [1, 1]}, "dropped": {}}}',
    "no_such_candidate": '{"key": KEY, "value": {"pick": "m", "us": {"pytorch": [9, 1], "x": [1, 1]}, "dropped": {}}}',
    "negative": '{"key": KEY, "value": {"pick": "math", "us": {"pytorch": [-1, 1]}, "dropped": {}}}',
    "nan": '{"key": KEY, "value": {"pick": "math", "us": {"pytorch": [NaN, 1]}, "dropped": {}}}',
    "words": '{"key": KEY, "value": {"pick": "math", "us": {"pytorch": ["fast", 1]}, "dropped": {}}}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_reported_and_written_anew(name: str, clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours"), ours=50.0)
    chosen(make_site())
    good, content = entry_file().read_text(), BROKEN[name]
    key = json.dumps(json.loads(good)["key"])
    entry_file().write_bytes(content if isinstance(content, bytes) else content.replace("KEY", key).encode())
    choice.forget()
    with pytest.warns(UserWarning, match="torch_fuse ignores .*json"):
        assert chosen(make_site()) == "ours"
    assert len(clock.timed) == 2 and entry_file().read_text() == good


def test_a_directory_that_cannot_be_written_to_costs_the_memory_only(clock: Clock, monkeypatch, tmp_path) -> None:
    (tmp_path / "torch_fuse").write_text("in the way")
    given(clock, monkeypatch, candidate("ours"), ours=50.0)
    assert chosen(make_site()) == chosen(make_site()) == "ours"
    assert len(clock.timed) == 1


def test_writers_at_the_same_time_leave_one_whole_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    key, seen = {"gpu": "x"}, []

    def write(n: int) -> None:
        for _ in range(20):
            measurements.store("attention", key, [n] * 2000)
            seen.append(measurements.recall("attention", key, lambda value: (len(value), len(set(value)))))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(seen) == {(2000, 1)}
    assert [file.suffix for file in measurements.directory("attention").iterdir()] == [".json"]


def test_measurements_can_be_listed_and_deleted(clock: Clock) -> None:
    typer = pytest.importorskip("typer.testing")
    from torch_fuse.cli.app import app

    chosen(make_site())
    run = lambda *args: typer.CliRunner().invoke(app, ["measurements", *args]).output  # noqa: E731
    assert "1 measurement(s)" in run() and "pytorch 100.0" in run()
    assert json.loads(run("--json"))["entries"][0]["value"]["us"]["pytorch"] == [100.0, 10.0]
    assert "1 measurement(s) deleted" in run("--clear") and "0 measurement(s)" in run()


# -- in a graph ----------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(dim: int = 80, length: int = 70, gradients: bool = False) -> list[Tensor]:
    return [torch.randn(1, 2, length, dim, dtype=torch.bfloat16).requires_grad_(gradients) for _ in range(3)]


def site_of(options: Options, tensors: list[Tensor], model: Callable[..., Any] = attend) -> Any:
    """The pattern's site in the report (None without one), and the rewritten graph."""
    rewriter = Rewriter(options)
    found = rewritten(model, rewriter)(*tensors)
    torch.testing.assert_close(found, model(*tensors))
    found = (x for x in rewriter.report.sites if x.pattern == "dense_attention")
    return next(found, None), rewriter.graphs[0]


@pytest.mark.parametrize(("dim", "gradients"), [(80, False), (72, False), (80, True)])
def test_the_graph_calls_what_was_chosen(dim: int, gradients: bool, clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("flash", gradients=True), flash=50.0)
    found, graph = site_of(MEASURE, inputs(dim, gradients=gradients))
    assert (found.status, found.pattern, found.op) == ("fused", "dense_attention", "flash")
    assert "flash 50.0 us" in found.reason and "100.0 us" in found.reason
    assert right in [node.target for node in graph.graph.nodes]


def test_the_graph_stays_where_pytorchs_pick_is_fastest(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("ours"), ours=99.0)
    found, _ = site_of(MEASURE, inputs())
    assert found.status == "kept" and "is as fast as any" in found.reason and "ours 99.0 us" in found.reason


def test_ours_is_called_as_an_op(clock: Clock, monkeypatch) -> None:
    ours = next(x for x in candidates.CANDIDATES if x.name == "ours")
    given(clock, monkeypatch, dataclasses.replace(ours, refusal=lambda tensors, site: None), ours=50.0)
    found, graph = site_of(MEASURE, inputs(), lambda *tensors: attend(*tensors).transpose(1, 2).flatten(2))
    assert found.op == "torch_fuse::dense_attention"
    assert op_overload(dense_attention.dense_attention) in [node.target for node in graph.graph.nodes]


def test_repeated_heads_are_read_unrepeated(clock: Clock, monkeypatch) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.repeat(1, 2, 1, 1), k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    given(clock, monkeypatch, candidate("flash"), flash=50.0)
    found, graph = site_of(MEASURE, inputs(), model)
    assert found.status == "fused"
    assert "repeat_interleave" not in str(graph.graph)


def test_dynamic_sizes_are_not_measured(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("flash", gradients=True), flash=50.0)
    for gradients in (False, True):
        x = inputs(gradients=gradients)[0]
        torch._dynamo.mark_dynamic(x, 2)
        found, _ = site_of(MEASURE, [x], lambda x: attend(x, 2 * x, 3 * x))
        assert found.status == "kept" and "dynamic" in found.reason
    assert not clock.timed


def test_nothing_is_timed_unasked(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("flash"), flash=1.0)
    for options in (
        Options(),
        Options(attention="measure", kernels="reference"),
        Options(disable=("dense_attention",)),
    ):
        site_of(options, inputs())
    site_of(dataclasses.replace(MEASURE, disable=("dense_attention",)), inputs())
    torch_fuse.explain(attend, *inputs(), fuse_options={"attention": "measure"})
    assert not clock.timed


def test_explain_reports_what_is_remembered(clock: Clock, monkeypatch) -> None:
    given(clock, monkeypatch, candidate("flash"), flash=50.0)
    before = torch_fuse.explain(attend, *inputs(), fuse_options={"attention": "measure"}).sites[0]
    assert "not measured yet" in before.reason
    site_of(MEASURE, inputs())
    after = torch_fuse.explain(attend, *inputs(), fuse_options={"attention": "measure"}).sites[0]
    assert after.status == "fused" and "flash 50.0 us" in after.reason


def test_a_measurement_that_fails_keeps_nothing_from_compiling(clock: Clock, monkeypatch) -> None:
    def runs_out(*args: Any) -> Any:
        clock.timed.append([])
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(choice, "graph_times", runs_out)
    for _ in range(2):
        found, _ = site_of(MEASURE, inputs(dim=72))
        assert found.status == "kept" and "out of memory" in found.reason
    assert len(clock.timed) == 1 and not measurements.stored("attention")


def test_a_model_that_picks_backends_itself_is_left_alone(clock: Clock, monkeypatch) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(q, k, v)

    given(clock, monkeypatch, candidate("flash"), flash=1.0)
    site_of(MEASURE, inputs(dim=72), model)
    assert not clock.timed


def test_without_a_gpu_the_report_says_why_nothing_is_measured() -> None:
    found, _ = site_of(MEASURE, inputs(dim=72))
    assert found.status == "kept" and "CUDA devices only" in found.reason


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_the_backend_knows_whether_cuda_graphs_hide_launches(mode: str | None, clock: Clock, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("torch_fuse.patterns.dense_attention.choose", lambda site, graphs: seen.append(graphs) or None)
    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", lambda gm, *rest: gm.forward)
    inductor = torch._inductor.list_mode_options(mode) if mode else {}
    torch._dynamo.reset()
    torch.compile(attend, backend="fuse", options={"attention": "measure", "inductor": inductor})(*inputs())
    assert set(seen) == {mode is not None}


# -- PyTorch's operators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_pinned_operators_are_what_sdpa_becomes(name: str, gradients: bool) -> None:
    """Arguments in their places, on tensors without data: shape, order of memory, and a gradient of its own kind."""
    found = next(x for x in candidates.CANDIDATES if x.name == name)
    site = make_site(gradients=gradients, causal=False)
    schema = found.target._schema.arguments
    args, kwargs = found.arguments(site)
    bound = dict(zip([x.name for x in schema], [*"qkv", *args], strict=False)) | kwargs
    expected = {"query": "q", "key": "k", "value": "v", "dropout_p": 0.0, "is_causal": False, "scale": 0.25}
    extra = {"attn_bias": None, "compute_log_sumexp": gradients} if name == "cudnn" else {}
    assert bound == expected | extra
    assert found.target in (cudnn_attention, flash_attention)
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty(2, 9, 4, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3))
        q.requires_grad_(gradients)
        out = found.call((q, k, v), site)
    backward = {"cudnn": "ScaledDotProductCudnnAttentionBackward", "flash": "ScaledDotProductFlashAttentionBackward"}
    assert out.grad_fn.name().startswith(backward[name]) if gradients else out.grad_fn is None
    assert out.shape == q.shape and out.stride() == q.stride() and out.dtype == q.dtype


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_pinned_operators_can_be_cached(name: str) -> None:
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    found, site = next(x for x in candidates.CANDIDATES if x.name == name), make_site()
    gm = torch.fx.symbolic_trace(lambda q, k, v: found.call((q, k, v), site))
    check_cacheable(gm)  # raises where torch's cache of compiled graphs would be bypassed


def test_fa4_says_that_it_is_not_installed() -> None:
    from torch_fuse.kernels import fa4_attention

    if fa4_attention.installed():
        pytest.skip("it is installed")
    assert "torch_fuse[fa4]" in (fa4_attention.supports_device(torch.device("cuda")) or "")
    q, k, v = (torch.randn(1, 2, 9, 64) for _ in range(3))
    torch.testing.assert_close(fa4_attention.fa4_attention(q, k, v, True, 0.1), right(q, k, v, True, 0.1))


@pytest.mark.parametrize("returns", ["tuple", "tensor"])
def test_fa4_is_called_by_its_public_function(returns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fuse.kernels import fa4_attention

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool) -> Any:
        out = right(*(x.transpose(1, 2) for x in (q, k, v)), causal, softmax_scale).transpose(1, 2)
        return (out, None) if returns == "tuple" else out

    monkeypatch.setattr(fa4_attention, "_function", lambda: (flash_attn_func, ""))
    monkeypatch.setattr(fa4_attention, "supports", lambda *args: None)
    q, k, v = (torch.randn(1, 9, heads, 64).transpose(1, 2) for heads in (4, 2, 2))
    found = fa4_attention.fa4_attention(q, k, v, True, 0.1)
    torch.testing.assert_close(found, right(q, k, v, True, 0.1))
    assert found.transpose(1, 2).is_contiguous()


def test_another_choice_is_another_graph_to_torchs_caches(clock: Clock, monkeypatch) -> None:
    """Two backends that a CPU can run, one after the other: the second must not get what was compiled for the first."""
    from torch._inductor.utils import run_and_get_code

    by_name = {x.name: dataclasses.replace(x, refusal=lambda *args: None) for x in candidates.CANDIDATES}
    found = {}
    for name in ("ours", "fa4", "ours"):
        given(clock, monkeypatch, by_name[name], **{name: 50.0})
        choice.forget()
        measurements.clear("attention")
        torch._dynamo.reset()
        model = torch.compile(
            lambda q, k, v: attend(q, k, v).transpose(1, 2).flatten(2),
            backend="fuse",
            options={"attention": "measure", "on_error": "raise"},
        )
        _, code = run_and_get_code(model, *inputs())
        found[name] = "".join(code)
    assert "torch_fuse.dense_attention" in found["ours"] and "fa4" not in found["ours"]
    assert "torch_fuse.fa4_attention" in found["fa4"] and "dense" not in found["fa4"]


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("dim", "causal"), [(64, True), (72, False), (80, True), (128, False)])
def test_backends_are_measured_on_a_gpu(dim: int, causal: bool, gradients: bool, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    choice.forget()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    make = lambda: torch.randn(2, 4, 600, dim, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    tensors = [make().requires_grad_(gradients) for _ in range(3)]
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    torch.manual_seed(5)
    wanted = torch.randn(3, device="cuda")
    torch.manual_seed(5)
    found = torch.compile(model, backend="fuse", options={"attention": "measure", "on_error": "raise"})(*tensors)
    assert torch.equal(torch.randn(3, device="cuda"), wanted)
    torch.testing.assert_close(found, model(*tensors), atol=2e-2, rtol=2e-2)
    if gradients:
        found.sum().backward()
        assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in tensors)
    (entry,) = measurements.stored("attention")
    assert entry["value"]["us"]["pytorch"][0] > 0
    bad = ("wrong", "cannot be captured")
    assert not any(word in reason for reason in entry["value"]["dropped"].values() for word in bad), entry
    assert "us" in torch_fuse.reports().sites[0].reason
