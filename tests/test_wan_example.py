"""examples/wan.py runs, tiny, and its parts do what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--device", "cpu", "--layers", "1", "--heads", "1", "--frames", "2", "--height", "4", "--width", "4",
        "--steps", "2", "--rounds", "1"]  # fmt: skip


@pytest.fixture
def wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()
    import wan

    return wan


def test_all_backends_make_one_video_and_a_contact_sheet(
    wan: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Inductor, which takes half a minute of this."""
    from PIL import Image
    from torch._dynamo.backends.debugging import aot_eager

    plain = torch.compile
    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", lambda gm, inputs, patches: aot_eager(gm, inputs))
    monkeypatch.setattr(torch, "compile", lambda model, backend, **how: plain(
        model, backend="aot_eager" if backend == "inductor" else backend, **how))  # fmt: skip
    sheet = tmp_path / "frames.png"
    assert wan.main([*TINY, "--compare", "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    for word in ("eager", "inductor", "fuse", "step 2, ms", "PSNR, dB", "linear projection", "attention_skip"):
        assert word in printed
    with Image.open(sheet) as image:
        assert image.size == (4 * 2 * 6, 4 * 4 * 6)  # two frames of 4 + 2 pixels, and rows with the reference


def test_a_fused_sample_further_from_the_reference_than_inductors_is_an_error(
    wan: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def spoilt(model: nn.Module, backend: str, args: Any) -> Any:
        denoise = wan.Denoiser(model)
        return (lambda *given: denoise(*given) * 1.5) if backend == "fuse" else denoise

    monkeypatch.setattr(wan, "compiled", spoilt)
    assert wan.main([*TINY, "--compare"]) == 1
    assert "fuse is more than 0.5 dB below Inductor" in capsys.readouterr().out
    assert wan.main([*TINY, "--compare", "--lossy", "attention"]) == 0


@pytest.mark.parametrize(
    ("given", "message"), [(["--height", "3"], "allowed: even numbers"), (["--steps", "5"], "allowed: 1 to 4")]
)
def test_what_cannot_be_is_refused(given: list[str], message: str, wan: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        wan.main([*TINY, *given])
    assert message in capsys.readouterr().err


def test_a_network_that_knows_the_velocity_gives_the_sample_in_any_number_of_steps(wan: Any) -> None:
    """x_0 is one point: the velocity of its straight path to any x is (x - x_0) / s."""
    import _wan_sampling as sampling

    target = torch.randn(1, 4, 2, 4, 4).double()

    class Network(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            s = timestep.double()[:, None, None, None, None] / sampling.TIMESTEPS
            return ((hidden_states - target) / s,)

    text = torch.zeros(1, 3, 8, dtype=torch.float64)
    for steps in range(1, 5):
        noise = [n.double() for n in sampling.noises(target.shape, steps, "cpu")]
        found = sampling.sample(sampling.Denoiser(Network()), noise, text, lambda step: step())
        torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)  # the timestep is in float32


def test_psnr_is_that_of_its_definition(wan: Any) -> None:
    from _wan_sampling import psnr

    reference = torch.tensor([0.0, 10.0])
    assert psnr(reference + 0.1, reference) == pytest.approx(40.0, abs=1e-4)
    assert psnr(reference, reference) == math.inf
    assert math.isnan(psnr(reference * math.nan, reference))
