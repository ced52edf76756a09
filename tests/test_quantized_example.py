"""examples/quantized.py runs, and says when a compiled model computes something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--device", "cpu", "--tokens", "16"]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Without Inductor, which takes most of the time."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", lambda gm, inputs, patches: aot_eager(gm, inputs))
    torch._dynamo.reset()
    import quantized

    return quantized


def test_memory_speed_and_perplexity_before_and_after(quantized: Any, capsys: Any) -> None:
    assert quantized.main([*TINY, "--formats", "int8,int4"]) == 0
    printed = capsys.readouterr().out
    for word in ("int8", "int4", "MB", "tokens/s", "perplexity", "dequant_linear", "gelu"):
        assert word in printed
    assert "decode_norm_linear   fused" not in printed


@pytest.mark.parametrize(("name", "most"), [("int8", 0.02), ("int4", 0.3)])
def test_a_quantised_layer_is_close_to_the_layer_and_takes_less_memory(quantized: Any, name: str, most: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64))
    x = torch.randn(4, 96)
    wanted, before = model(x), quantized.stored_bytes(model)
    quantized.FORMATS[name](model)
    assert (model(x) - wanted).norm() < most * wanted.norm()
    assert quantized.stored_bytes(model) < before / (3 if name == "int8" else 4)


def test_a_fused_step_with_another_perplexity_is_an_error(
    quantized: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Spoilt:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = self.model(*args, **kwargs)
            found.logits = found.logits * 1.5
            return found

    monkeypatch.setattr(quantized, "compiled", lambda model, way, args: Spoilt(model) if way == "fuse" else model)
    assert quantized.main([*TINY, "--formats", "int8"]) == 1
    assert "int8: perplexity is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"), [(["--tokens", "3"], "allowed: 16 and more"), (["--formats", "int3"], "allowed: as it is")]
)
def test_what_cannot_be_is_refused(given: list[str], message: str, quantized: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        quantized.main([*TINY, *given])
    assert message in capsys.readouterr().err
