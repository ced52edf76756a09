"""CUDA C++ kernels of this package: compiled by NVRTC when they are first used, launched by the driver.

Both come with torch's CUDA wheels, as `cuda.bindings`; nothing here is imported before a CUDA device is there.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cuda"
Constants = tuple[tuple[str, int], ...]


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why CUDA C++ kernels for sm_90 cannot be built for `device` or launched cooperatively, or None."""
    if device.type != "cuda":
        return f"the kernel is for CUDA devices, not {device.type!r}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "CUDA is not available"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the device's compute capability is {capability}; allowed: (9, 0)"
    try:
        from cuda.bindings import driver, nvrtc

        _checked(nvrtc.nvrtcVersion())
        index = torch.cuda.current_device() if device.index is None else device.index
        cooperative = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
        if not _checked(driver.cuDeviceGetAttribute(cooperative, index)):
            return "the device has no cooperative launches"
    except ImportError:
        return "cuda.bindings is not installed"
    except RuntimeError as problem:
        return f"NVRTC or the driver cannot be used: {problem}"
    return None


def compiled(name: str, constants: Constants, architecture: str = "sm_90a") -> bytes:
    """The binary of the kernel in cuda/`name`.cu; raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    headers = sorted(SOURCES.glob("*.cuh"))
    source = (SOURCES / f"{name}.cu").read_bytes()
    texts, names = [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    program = _checked(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(headers), texts, names))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in constants)]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name}.cu does not compile: {log.decode(errors='replace')[:2000]}")
        binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Kernel:
    """A kernel on one device that is launched cooperatively: its blocks are all there at once.

    Args:
        name: of the source file and the function.
        constants: macros for the compiler.
        index: the device.
        grid: blocks; threads: of a block; shared_bytes: of its dynamic shared memory.

    Raises:
        RuntimeError: it does not compile, or that many blocks do not fit the device at once.
    """

    def __init__(self, name: str, constants: Constants, index: int, grid: int, threads: int, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver, self._grid, self._threads, self._shared_bytes = driver, grid, threads, shared_bytes
        self._index, self._early = index, dict[int, Any]()
        with torch.cuda.device(index):
            self._need_context()
            self._module = _checked(driver.cuModuleLoadData(compiled(name, constants)))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
            blocks = _checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, shared_bytes))
        there = blocks * torch.cuda.get_device_properties(index).multi_processor_count
        if there < grid:
            raise RuntimeError(f"{there} blocks of {name} fit the device at once; needed: {grid}")

    def launch(self, arguments: bytes, zeroed: int, size: int, stream: int) -> None:
        """Sets `size` bytes at address `zeroed` to 0, then launches; arguments: one struct, by value."""
        driver = self._driver
        self._need_context()
        _checked(driver.cuMemsetD8Async(zeroed, 0, size, stream))
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        _checked(
            driver.cuLaunchCooperativeKernel(
                self._function, self._grid, 1, 1, self._threads, 1, 1, self._shared_bytes, stream,
                ctypes.addressof(parameters),
            )
        )  # fmt: skip

    def start(self, arguments: bytes, stream: int, early: bool = False) -> None:
        """Launches without zeros, and not cooperatively: blocks need not all be there at once.

        early: the launch may begin before the one before it on the stream has ended; the kernel waits for it.
        """
        driver = self._driver
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                self.start(arguments, stream, early)
            return
        self._need_context()
        struct = ctypes.create_string_buffer(arguments, len(arguments))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        if early:
            config = self._early.get(stream) or self._early.setdefault(stream, self._early_on(stream))
            _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(parameters), 0))
        else:
            _checked(driver.cuLaunchKernel(self._function, self._grid, 1, 1, self._threads, 1, 1, self._shared_bytes,
                                           stream, ctypes.addressof(parameters), 0))  # fmt: skip

    def _early_on(self, stream: int) -> Any:
        """How a launch on a stream begins before the one before it has ended."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared_bytes, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _need_context(self) -> None:
        """Makes the device's context the thread's, where it has none: torch does so only when it asks the runtime."""
        driver = self._driver
        if int(_checked(driver.cuCtxGetCurrent())) == 0:
            _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(self._index))))


@functools.lru_cache(maxsize=32)
def kernel(name: str, constants: Constants, index: int, grid: int, threads: int, shared_bytes: int) -> Kernel | str:
    """The kernel, compiled once, or why it cannot be used."""
    try:
        return Kernel(name, constants, index, grid, threads, shared_bytes)
    except RuntimeError as problem:
        return str(problem)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of `cuda.bindings` returned behind its status."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__}.{status.name}")
    return values[0] if values else None
