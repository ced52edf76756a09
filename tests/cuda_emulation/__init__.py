"""Runs a CUDA kernel on the CPU, one fiber a CUDA thread, to find deadlocks, races and wrong addresses without a GPU.

g++ compiles the kernel's source as it is, but for `primitives.cuh`, in whose place stands the one of this folder, and
its dynamic shared memory. Threads run one at a time, each until it would wait; which one goes on, and when a bulk load
arrives, is random by `seed`. Shared memory starts as NaN. A kernel that waits for ever or breaks a rule of a primitive
raises `EmulationError`, which says where. Not modelled: memory orders weaker than sequential consistency, caches, time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["EmulatedKernel", "EmulationError", "guarded", "unavailable"]

HERE = Path(__file__).parent
RUNTIME = ("scheduler.cpp", "barriers.cpp", "races.cpp")
FLAGS = ("-std=c++17", "-fPIC", "-g1", "-w", "-U_FORTIFY_SOURCE")
Argument = torch.Tensor | int | bytes | ctypes._SimpleCData | ctypes.Structure | ctypes.Array


class EmulationError(RuntimeError):
    """A deadlock, a broken rule, or an access outside the memory that the kernel was given."""


def unavailable() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if sys.platform != "linux":
        return f"the fibers are made for Linux, not {sys.platform}"
    return None if shutil.which("g++") else "no g++"


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ fails:\n{done.stderr[:6000]}")


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"torch_fuse_emulation_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # what is in there would be run
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _made(name: str, key: Sequence[object], make: Callable[[Path], None]) -> Path:
    """The cached file of `key`, made at first by `make(path)`."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    path = _cache() / f"{digest}_{name}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            made = Path(folder) / name
            make(made)
            os.replace(made, path)
    return path


def _runtime() -> Path:
    texts = [(HERE / name).read_text() for name in ("runtime.h", "fibers.h", *RUNTIME)]
    includes = "".join(f'#include "{HERE / name}"\n' for name in RUNTIME)

    def make(path: Path) -> None:
        source = path.with_suffix(".cpp")
        source.write_text(includes)
        _run("g++", *FLAGS, "-O1", "-c", source, "-o", path)

    return _made("runtime.o", [FLAGS, texts], make)


def _emulated(text: str) -> str:
    """The source with its dynamic shared memory as a pointer to the present CTA's."""
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* const \2 = reinterpret_cast<\1*>(emulated_dynamic_shared());",
        text,
    )
    left = re.search(r"^(?!\s*//).*\b__shared__\b.*$", text, re.MULTILINE)
    if left:
        raise ValueError(f"only `extern __shared__ T name[];` can be emulated, not {left.group(0).strip()!r}")
    return text


class EmulatedKernel:
    """`kernel` of the CUDA file `source` (or of a string of source), with `defines` for the preprocessor.

    Files named `*.cuh` beside `source` can be included; `primitives.cuh` is always the emulator's. With `races`, every
    access is checked for an order with the last ones to that place by other threads: some ten times slower.
    """

    def __init__(
        self, source: Path | str, kernel: str, defines: Mapping[str, object] | None = None, races: bool = False
    ) -> None:
        files = {"kernel.cu": source} if isinstance(source, str) else {source.name: source.read_text()}
        main = next(iter(files))
        if isinstance(source, Path):
            files |= {path.name: path.read_text() for path in sorted(source.parent.glob("*.cuh"))}
        files = {name: _emulated(text) for name, text in files.items() if name != "primitives.cuh"}
        files["primitives.cuh"] = (HERE / "primitives.cuh").read_text()
        files["entry.cpp"] = (HERE / "entry.cpp").read_text()
        chosen = {
            "TORCH_FUSE_EMULATED": 1,
            "EMULATED_SOURCE": f'"{main}"',
            "EMULATED_KERNEL": kernel,
            **(defines or {}),
        }
        macros = [f"-D{name}={value}" for name, value in chosen.items()]
        flags = ("-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0") if races else ("-O1",)
        runtime = _runtime()

        def make(path: Path) -> None:
            for name, text in files.items():
                (path.parent / name).write_text(text)
            main = path.parent / "entry.o"  # linked by itself, for the sanitizer's own library is not wanted
            _run("g++", *FLAGS, *flags, "-c", *macros, path.parent / "entry.cpp", "-o", main)
            _run("g++", "-shared", main, runtime, "-ldl", "-o", path)

        key = [kernel, FLAGS, flags, macros, sorted(files.items()), runtime.name]
        self.path = _made(f"{kernel}.so", key, make)
        self.library = ctypes.CDLL(str(self.path))
        self.races = races
        self.switches = 0

    def __call__(
        self,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        seed: int = 0,
        limit: int = 200_000_000,
    ) -> None:
        """Runs the grid. Tensors are passed as addresses, integers as 32 bits, bytes and what ctypes has as they are.

        Raises:
            EmulationError: with what went wrong, in which thread.
        """
        kept = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(kept)))(*[ctypes.addressof(value) for value in kept])
        message = ctypes.create_string_buffer(20_000)
        launch = self.library.emulated_launch
        launch.argtypes = [ctypes.c_uint] * 5 + [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        failed = launch(grid, block, shared_bytes, seed, self.races, limit, pointers, message, len(message))
        self.library.emulated_switches.restype = ctypes.c_uint64
        self.switches = self.library.emulated_switches()
        if failed:
            raise EmulationError(f"seed {seed}: {self._with_lines(message.value.decode())}")

    def _with_lines(self, message: str) -> str:
        """`<+0x123>`, a place in the compiled kernel, as the line of its source, where there is addr2line."""

        def line(found: re.Match[str]) -> str:
            command = ["addr2line", "-e", str(self.path), hex(int(found[1], 16) - 1)]
            return Path(subprocess.run(command, capture_output=True, text=True).stdout.strip()).name

        return re.sub(r"<\+(0x[0-9a-f]+)>", line, message) if shutil.which("addr2line") else message


def _value(argument: Argument) -> ctypes._SimpleCData | ctypes.Structure | ctypes.Array:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, bytes):
        return (ctypes.c_char * len(argument)).from_buffer_copy(argument)
    return argument


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that ends at a page that nobody may touch: accesses behind it are found.

    Its memory is never given back.
    """
    bytes_ = tensor.numel() * tensor.element_size()
    runtime = _runtime()
    library = ctypes.CDLL(
        str(_made("runtime.so", [runtime.name], lambda path: _run("g++", "-shared", runtime, "-o", path)))
    )
    library.emulated_guarded.restype = ctypes.c_void_p
    library.emulated_guarded.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    address = library.emulated_guarded(max(bytes_, 1), 16)
    buffer = (ctypes.c_char * max(bytes_, 1)).from_address(address)
    copy = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return copy.copy_(tensor)
