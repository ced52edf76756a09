"""Checks of command-line values: every error names the argument, the value seen and what is allowed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import typer

from torch_fuse.options import mode_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = ("auto", "reference")


def one_of(allowed: Collection[str]) -> Callable[[str], str]:
    """A typer callback that lets only the names in `allowed` pass."""

    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r}; allowed: {', '.join(allowed)}")
        return value

    return check


def at_least(least: int) -> Callable[[str], int]:
    """A typer parser of integers from `least` on."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise typer.BadParameter(f"{value!r}; allowed: an integer, {least} or more")
        return number

    return parse


def check_mode(value: str | None) -> str | None:
    """A typer callback: None, or a mode that Inductor knows."""
    try:
        mode_options(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def available_devices() -> list[str]:
    """The devices that can be named: "cpu", and "cuda:N" for each GPU."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def parse_device(value: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU where there is none.

    Raises:
        typer.BadParameter: when this machine has no such device.
    """
    devices = available_devices()
    if value == "auto":
        return torch.device("cuda:0" if len(devices) > 1 else "cpu")
    name = "cuda:0" if value == "cuda" else value
    if name not in devices:
        raise typer.BadParameter(
            f"{value!r}; allowed on this machine: auto, {', '.join(devices)}", param_hint="--device"
        )
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU bfloat16 where it is native, float16 before that."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def parse_dtype(value: str, device: torch.device) -> torch.dtype:
    """ "auto" is what fits the device; else one of `DTYPES`."""
    return default_dtype(device) if value == "auto" else DTYPES[value]


def read_config(directory: Path, param_hint: str) -> dict[str, Any]:
    """The `config.json` of a local checkpoint.

    Raises:
        typer.BadParameter: when there is none, or it is not a JSON object.
    """
    file = directory / "config.json"
    if not file.is_file():
        hint = "; give the directory of one of its models" if (directory / "model_index.json").is_file() else ""
        raise typer.BadParameter(
            f"'{directory}' has no config.json; allowed: the directory of a saved model{hint}",
            param_hint=param_hint,
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise typer.BadParameter(f"'{file}' cannot be read: {error}", param_hint=param_hint) from None
    if not isinstance(config, dict):
        raise typer.BadParameter(f"'{file}' holds no JSON object", param_hint=param_hint)
    return config


def check_output_file(value: Path | None) -> Path | None:
    """A typer callback: a file that can be written, checked before the work that fills it."""
    if value is None:
        return None
    folder = value.parent
    if value.is_dir() or not folder.is_dir() or not os.access(value if value.exists() else folder, os.W_OK):
        raise typer.BadParameter(f"'{value}'; allowed: a file in an existing folder that can be written")
    return value
