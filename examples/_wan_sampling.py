"""Few-step sampling as rCM does it: a flow-matching network used as a TrigFlow consistency model.

x_t = cos(t) x_0 + sin(t) noise, t from 0 to pi / 2, sigma_data = 1. A network that predicts the velocity of the
straight path x_0 + s (noise - x_0) gives the sample in one call:

    c_in = c_skip = 1 / (cos t + sin t),  c_out = -sin t / (cos t + sin t),  s = sin t / (cos t + sin t)
    x_0 = c_skip x_t + c_out network(c_in x_t, s)

and the loop goes back to the next time with new noise (rCM, arXiv:2510.08431; sCM, arXiv:2410.11081).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# rCM's times: from sigma = tan(t) = 80 on
TIMES = (math.atan(80.0), 1.5, 1.4, 1.0)
TIMESTEPS = 1000.0  # the network's unit of s

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser(nn.Module):
    """An unmodified WanTransformer3DModel as a consistency model: x_t [B, C, F, H, W] and t [B] give x_0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        total = torch.cos(t) + torch.sin(t)
        c_skip, c_out = (c[:, None, None, None, None] for c in (1 / total, -torch.sin(t) / total))
        (velocity,) = self.network(
            hidden_states=(c_skip * x).to(text.dtype),
            timestep=(TIMESTEPS * torch.sin(t) / total).float(),
            encoder_hidden_states=text,
            return_dict=False,
        )
        return c_skip * x + c_out * velocity.to(x.dtype)


def noises(shape: tuple[int, ...], steps: int, device: str) -> list[Tensor]:
    """The noise of every step, drawn on the CPU: the same on every device and for every way to compute."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(steps)]


def sample(
    denoise: Denoise, noise: list[Tensor], text: Tensor, around: Callable[[Callable[[], Tensor]], Tensor]
) -> Tensor:
    """x_0 after a step for each noise.

    Args:
        denoise: a `Denoiser`, compiled or not.
        noise: of each step, in float32 or float64; the loop computes in its type.
        text: the prompt's embedding, in the network's type.
        around: calls the step that it is given; times it, say.
    """
    x = noise[0]
    times = TIMES[: len(noise)]
    for i, t in enumerate(times):
        now = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
        x = around(lambda x=x, now=now: denoise(x, now, text))  # type: ignore[misc]
        if i + 1 < len(times):
            x = math.cos(times[i + 1]) * x + math.sin(times[i + 1]) * noise[i + 1]
    return x


def psnr(found: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of the reference."""
    reference = reference.double()
    error = (found.double() - reference).square().mean()
    if not bool(error > 0):
        return math.nan if bool(error.isnan()) else math.inf
    return float(10 * torch.log10((reference.max() - reference.min()).square() / error))
