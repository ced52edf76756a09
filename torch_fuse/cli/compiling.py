"""How the command line calls `torch.compile`."""

from __future__ import annotations

from typing import Any

from torch_fuse.options import mode_options


def fuse_arguments(mode: str | None, kernels: str) -> dict[str, Any]:
    """The arguments of `torch.compile(model, backend="fuse", ...)`.

    torch.compile takes a mode or options, not both; with options the mode goes in as the Inductor options
    that it stands for.
    """
    if kernels == "auto":
        return {"mode": mode} if mode else {}
    options: dict[str, Any] = {"kernels": kernels}
    if mode_options(mode):
        options["inductor"] = mode_options(mode)
    return {"options": options}
