"""The command line at tiny sizes: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from torch_fuse.cli import numerics, pythia
from torch_fuse.cli.app import app
from torch_fuse.cli.compiling import fuse_arguments
from torch_fuse.cli.doctor import device_support
from torch_fuse.cli.small import shrink
from torch_fuse.cli.timing import Timing, measure


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={"NO_COLOR": "1", "COLUMNS": "200"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=97,
        max_position_embeddings=32,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("checkpoint")
    GPTNeoXForCausalLM(config).save_pretrained(directory)
    return directory


def test_demo_runs_a_checkpoint_checks_it_and_writes_its_figures(checkpoint: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    result = run(
        "demo",
        "--model",
        str(checkpoint),
        "--tokens",
        "16",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--json",
        str(figures),
    )
    assert result.exit_code == 0, result.output
    assert "causal_mask" in result.output
    assert "Inductor compiles" in result.output
    data = json.loads(figures.read_text())
    assert data["passed"] and data["tokens"] == 16 and data["batch"] == 2
    assert set(data["runs"]) == {"eager", "inductor", "fuse"}
    assert data["report"]["graphs"] >= 1
    assert any(site["status"] == "fused" for site in data["report"]["sites"])


def test_demo_fails_when_fuse_is_wrong(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_fuse.cli.demo as demo

    def wrong(results: dict[str, torch.Tensor], *rest: Any) -> Any:
        return numerics.check_all({**results, "fuse": results["fuse"] + 1}, *rest)

    monkeypatch.setattr(demo, "check_all", wrong)
    result = run("demo", "--model", str(checkpoint), "--tokens", "8", "--device", "cpu")
    assert result.exit_code == 1
    assert "fuse is wrong" in result.output and "allowed max" in result.output


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--tokens", "0"], ["--tokens", "0", "1 or more"]),
        (["--tokens", "many"], ["--tokens", "many", "an integer"]),
        (["--tokens", "4096"], ["--tokens", "4096", "1 to 2048"]),
        (["--batch", "-1"], ["--batch", "-1", "1 or more"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]),
        (["--device", "tpu"], ["--device", "tpu", "auto, cpu"]),
        (["--mode", "reduce-overhed"], ["--mode", "reduce-overhed", "reduce-overhead"]),
        (["--kernels", "fast"], ["--kernels", "fast", "auto, reference"]),
        (["--size", "3b"], ["--size", "3b", "2.8b"]),
        (["--model", "/no/such/directory"], ["--model", "/no/such/directory"]),
        (["--json", "/no/such/folder/figures.json"], ["--json", "/no/such/folder/figures.json"]),
        (["--seed", "-3"], ["--seed", "-3", "0 or more"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_demo_refuses_wrong_arguments_before_anything_runs(
    args: list[str], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pythia, "build", lambda *_: pytest.fail("a model was built"))
    result = run("demo", *args)
    assert result.exit_code == 2
    for word in named:
        assert word in result.output, result.output


def test_demo_refuses_more_tokens_than_the_checkpoint_has(checkpoint: Path) -> None:
    result = run("demo", "--model", str(checkpoint), "--tokens", "33")
    assert result.exit_code == 2
    assert "1 to 32" in result.output


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    for command in (["demo", "--model", str(tmp_path)], ["explain", str(tmp_path)]):
        result = run(*command)
        assert result.exit_code == 2
        assert "config.json" in result.output


def test_explain_prints_the_report_of_a_class() -> None:
    result = run("explain", "GPTNeoXForCausalLM", "--layers", "1", "--tokens", "16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "causal_mask" in result.output and "fused" in result.output


def test_explain_writes_nothing_but_json_with_json(checkpoint: Path) -> None:
    result = run("explain", str(checkpoint), "--tokens", "16", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["graphs"] >= 1
    assert {"pattern", "status", "reason", "location", "op", "device"} <= set(data["sites"][0])


@pytest.mark.parametrize("name", ["LlamaForCasualLM", "os", "NoSuchModel"])
def test_explain_refuses_what_is_no_model(name: str) -> None:
    result = run("explain", name)
    assert result.exit_code == 2
    assert name in result.output and "allowed" in result.output


def test_explain_names_the_nearest_class() -> None:
    assert "LlamaForCausalLM" in run("explain", "LlamaForCasualLM").output


def test_doctor_names_versions_devices_and_patterns() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch_fuse", torch.__version__, "cpu", "causal_mask", "Inductor's cache"):
        assert word in result.output


def test_doctor_as_json_says_why_an_op_is_unusable() -> None:
    data = json.loads(run("doctor", "--json").stdout)
    assert data["healthy"] and data["backend_found"]
    cpu = next(entry for entry in data["devices"] if entry["device"] == "cpu")
    assert cpu["unusable"] == device_support(torch.device("cpu"))
    masks = next(pattern for pattern in data["patterns"] if pattern["name"] == "causal_mask")
    assert masks["unusable"]["cpu"] is None


@pytest.mark.parametrize("command", [[], ["demo"], ["explain"], ["doctor"]])
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_missing_packages_are_named_with_the_command_that_installs_them() -> None:
    program = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in ('typer', 'rich') else find(name, *rest)\n"
        "from torch_fuse.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 2
    assert 'pip install "torch_fuse[examples]"' in done.stderr


def test_mode_and_kernels_together_reach_inductor_as_options() -> None:
    assert fuse_arguments(None, "auto") == {}
    assert fuse_arguments("max-autotune", "auto") == {"mode": "max-autotune"}
    both = fuse_arguments("reduce-overhead", "reference")
    assert both == {"options": {"kernels": "reference", "inductor": {"triton.cudagraphs": True}}}


def test_the_size_follows_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(pythia, "cores", lambda: 2)
    monkeypatch.setattr(pythia, "free_memory", lambda _: 64 << 30)
    assert pythia.fitting_size(cpu, torch.float32, 1024) == "70m"
    monkeypatch.setattr(pythia, "free_memory", lambda _: 1 << 20)
    assert pythia.fitting_size(cpu, torch.float32, 1024) == "14m"
    monkeypatch.setattr(pythia, "free_memory", lambda _: 140 << 30)
    assert pythia.fitting_size(torch.device("cuda"), torch.bfloat16, 2048) == "2.8b"


def test_shrinking_keeps_the_head_size_and_the_kind_of_grouping() -> None:
    small = shrink(
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
         "intermediate_size": 14336, "vocab_size": 128256, "eos_token_id": 128001},
        2,
    )  # fmt: skip
    assert small["hidden_size"] // small["num_attention_heads"] == 128
    assert small["num_key_value_heads"] == 1 and small["num_hidden_layers"] == 2
    assert small["eos_token_id"] < small["vocab_size"]


def test_timing_interleaves_and_rotates() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = measure(calls, torch.device("cpu"), rounds=3, warmup=1, budget_seconds=0.0, least=2)
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]
    assert {len(timing.rounds) for timing in timings.values()} == {2}


def test_overlapping_quartiles_are_no_difference() -> None:
    assert not Timing((1.0, 2.0, 3.0, 4.0)).differs_from(Timing((2.0, 3.0, 4.0, 5.0)))
    assert Timing((1.0, 1.1, 1.2, 1.3)).differs_from(Timing((2.0, 2.1, 2.2, 2.3)))


def test_a_wrong_inductor_does_not_excuse_a_wrong_fuse() -> None:
    exact = torch.randn(64, dtype=torch.float64)
    right = exact.float()
    checks = numerics.check_all({"eager": right, "inductor": right + 1, "fuse": right + 1}, exact, torch.float32)
    assert checks["eager"].passed
    assert not checks["inductor"].passed and not checks["fuse"].passed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails(bad: float) -> None:
    exact = torch.randn(64, dtype=torch.float64)
    broken = exact.float()
    broken[3] = bad
    results = {"eager": exact.float(), "inductor": exact.float(), "fuse": broken}
    assert not numerics.check_all(results, exact, torch.float32)["fuse"].passed
