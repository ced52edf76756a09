"""`torch-fuse doctor`: what this machine has and which ops work on it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torch_fuse import measurements
from torch_fuse._compat import cache_directory
from torch_fuse._version import __version__
from torch_fuse.rewrite import registry

_OLDEST = (7, 5)
_PACKAGES = ("triton", "transformers", "diffusers", "accelerate")


def device_support(device: torch.device) -> str | None:
    """Why no fused kernel runs on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "the kernels are GPU kernels; on a CPU the graph stays with Inductor"
    if device.type != "cuda":
        return f"no kernels for {device.type}; allowed: cuda"
    if torch.version.hip is not None:
        return "ROCm is not tested"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {_dotted(capability)}; at least {_dotted(_OLDEST)} is needed"
    return None


def op_support(op: str, device: torch.device) -> str | None:
    """Why `op` (qualified name) does not run on `device`; its module's `supports_device` may say."""
    name = op.rpartition("::")[2]
    try:
        module = importlib.import_module(f"torch_fuse.kernels.{name}")
    except ModuleNotFoundError:
        return device_support(device)
    supports = getattr(module, "supports_device", device_support)
    return supports(device)


def compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ here, or None if it can."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        name = type(error).__name__
        return f"no working C++ compiler, which Inductor needs on a CPU ({name}); install g++ or clang++"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    number = getattr(torch._C, "_cuda_getDriverVersion", int)()
    if not number:
        return None
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        devices.append(
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device),
                "capability": _dotted(torch.cuda.get_device_capability(device)),
                "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            }
        )
    for entry in devices:
        entry["unusable"] = device_support(torch.device(entry["device"]))
    return devices


def _inside(folder: str) -> int:
    path = Path(folder)
    return sum(1 for _ in path.iterdir()) if path.is_dir() else 0


def diagnose() -> dict[str, Any]:
    """Everything the command shows, as plain data."""
    devices = _devices()
    names = [entry["device"] for entry in devices]
    cache = str(cache_directory())
    return {
        "versions": {
            "torch_fuse": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            **{name: _installed(name) for name in _PACKAGES},
            "cuda": torch.version.cuda,
            "driver": _driver(),
        },
        "devices": devices,
        "patterns": [
            {
                "name": pattern.name,
                "summary": pattern.summary,
                "op": pattern.op,
                "needs_kernel": pattern.needs_kernel,
                "unusable": {
                    name: op_support(pattern.op, torch.device(name)) if pattern.needs_kernel else None for name in names
                },
            }
            for pattern in registry.patterns().values()
        ],
        "backend_found": "fuse" in torch._dynamo.list_backends(exclude_tags=()),
        "compiler": compiler_problem() or shutil.which("g++") or shutil.which("clang++") or "found",
        "compiler_works": compiler_problem() is None,
        "inductor_cache": {"directory": cache, "entries": _inside(cache)},
        "measurements": {
            "directory": str(measurements.directory("attention")),
            "entries": len(measurements.stored("attention")),
        },
    }


def run_doctor(json_output: bool, console: Console) -> int:
    """Prints the diagnosis; returns 1 when `torch.compile` cannot find the backend or there is no pattern."""
    found = diagnose()
    healthy = found["backend_found"] and bool(found["patterns"])
    if json_output:
        sys.stdout.write(json.dumps({**found, "healthy": healthy}, indent=1) + "\n")
    else:
        _print(console, found)
    return 0 if healthy else 1


def _print(console: Console, found: dict[str, Any]) -> None:
    versions = Table(title="Versions", title_justify="left", box=box.SIMPLE, show_header=False)
    for name, value in found["versions"].items():
        versions.add_row(name, escape(value) if value else "[dim]none[/]")
    devices = Table(
        "device",
        "name",
        "capability",
        "fused kernels",
        title="Devices",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for entry in found["devices"]:
        devices.add_row(
            entry["device"], escape(entry["name"]), entry.get("capability", "-"), _verdict(entry["unusable"])
        )
    patterns = Table(
        "pattern",
        "what it does",
        "op",
        "device",
        "usable",
        title="Patterns",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for pattern in found["patterns"]:
        for i, (device, reason) in enumerate(pattern["unusable"].items()):
            first = (pattern["name"], escape(pattern["summary"]), pattern["op"] or "-") if i == 0 else ("", "", "")
            usable = _verdict(reason) if pattern["needs_kernel"] else "[green]yes[/] (needs no kernel)"
            patterns.add_row(*first, device, usable)
    for table in (versions, devices, patterns):
        console.print(table)
    if not found["patterns"]:
        console.print("[red]No pattern is registered.[/]")
    if found["backend_found"]:
        console.print('[green]ok[/]  torch.compile finds backend="fuse"', highlight=False)
    else:
        console.print('[red]torch.compile does not find backend="fuse":[/] the entry point is missing; reinstall')
    style = "[green]ok[/]  C++ compiler:" if found["compiler_works"] else "[red]C++ compiler:[/]"
    console.print(f"{style} {escape(found['compiler'])}", highlight=False)
    cache = found["inductor_cache"]
    console.print(f"    Inductor's cache: {escape(cache['directory'])}, {cache['entries']} entries", highlight=False)
    kept = found["measurements"]
    shown = f"    Measured attentions: {escape(kept['directory'])}, {kept['entries']} entries"
    console.print(shown, highlight=False)


def _verdict(reason: str | None) -> str:
    return "[green]yes[/]" if reason is None else f"[yellow]no:[/] {escape(reason)}"
