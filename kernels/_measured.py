"""Where the measurements in benchmarks/results hold."""

from __future__ import annotations

import torch


def not_hopper(device: torch.device) -> str | None:
    """Why what was measured on an NVIDIA H200 says nothing about a device, or None where it does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"not measured to win on {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == (9, 0) else "not measured to win on sm_{}{}, only on sm_90".format(*capability)
