"""Video latents as pictures: decoded by the VAE where there is one, else projected to red, green and blue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROJECTED = "a fixed linear projection of the latents to red, green and blue (there is no VAE)"
DECODED = "decoded by the VAE"


@torch.no_grad()
def frames_of(latents: Tensor, vae: Any = None) -> Tensor:
    """The frames of the first sample, [F, H, W, 3].

    Args:
        latents: [B, C, F, H, W].
        vae: diffusers' AutoencoderKLWan, or None.
    """
    if vae is None:
        channels = latents.shape[1]
        projection = torch.randn(3, channels, generator=torch.Generator().manual_seed(0)) / channels**0.5
        return torch.einsum("cfhw,rc->fhwr", latents[0].float().cpu(), projection)
    mean, std = (
        torch.tensor(given, device=latents.device).view(1, -1, 1, 1, 1)
        for given in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return video[0].permute(1, 2, 3, 0).float().cpu()


def contact_sheet(videos: dict[str, Tensor], path: Path, columns: int = 8, scale: int = 4) -> None:
    """Writes a PNG with a row of up to `columns` frames for each video; all have the brightness of the first.

    Args:
        videos: frames [F, H, W, 3] by name.
        path: of the PNG.
        columns: frames in a row, evenly spaced.
        scale: pixels of a value, where a frame is small.
    """
    from PIL import Image

    first = next(iter(videos.values())).flatten().sort().values
    low, high = first[len(first) // 100], first[-1 - len(first) // 100]
    rows = []
    for frames in videos.values():
        chosen = frames[torch.linspace(0, len(frames) - 1, min(columns, len(frames))).round().long()]
        rows.append(torch.cat(list(torch.nn.functional.pad(chosen, (0, 0, 1, 1, 1, 1), value=float(high))), 1))
    pixels = ((torch.cat(rows) - low) / (high - low).clamp(min=1e-6)).nan_to_num(0.0).clamp(0, 1) * 255
    if pixels.shape[1] < 1000:
        pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0]))
    image.frombytes(pixels.round().to(torch.uint8).contiguous().numpy().tobytes())
    image.save(path)
