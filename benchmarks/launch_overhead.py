"""Microseconds of processor time that a call of an opaque op takes, down to the driver's launch.

    python benchmarks/launch_overhead.py [--out FILE] [--only OP] [--label TEXT] [--calls N]

Without CUDA graphs these bound a decoding step. The op is called as Inductor's code calls it, by its overload and
without gradients. "empty" is an op of the same arguments that does nothing: what torch's dispatcher takes.

Without a GPU, Triton's compiler and the C function that launches are replaced by ones that do nothing; the Python code
around them is the real one. About 5 s, and 15 s on a GPU, where the kernels are compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from common import Log
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel

from torch_fuse.kernels.packed_weight import Format

OPS = ("norm_linear_gemv", "linear_residual_gemv", "decode_attention", "dense_attention", "masked_attention",
       "dequant_linear")  # fmt: skip
HIDDEN, INNER, HEADS, DIM, SIZE, LENGTH = 256, 1024, 8, 64, 128, 256


class _Launcher(CudaLauncher):  # type: ignore[misc]
    """Triton's launcher without the C function."""

    def __init__(self) -> None:
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl, self.gsan_enabled = 1, False, False, False
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.arg_annotations = self.kernel_signature = b""
        self.launch = _nothing


class _Compiled(CompiledKernel):  # type: ignore[misc]
    """A compiled kernel that launches nothing."""

    def __init__(self) -> None:
        self.module = self.src = None
        self.name = "nothing"
        self._module_pid = None
        self.function, self.packed_metadata, self._run = 0, (4, 1, 0), _Launcher()

    def _init_handles(self) -> None:
        """There is nothing to load."""


def _nothing(*_: Any) -> None:
    pass


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Ops on the CPU take their kernels' path, and launch nothing."""
    driver = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda _: 0)
    with contextlib.ExitStack() as stack:
        for module in ("_gemv_common", "decode_attention", "_attention_arguments", "_dequant_rows", "_dequant_decode"):
            stack.enter_context(mock.patch(f"torch_fuse.kernels.{module}.no_triton", lambda _: None))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(mock.patch.object(triton.runtime.jit.JITFunction, "run", lambda *_, **__: _Compiled()))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver, create=True))
        yield


def arguments(name: str, device: str) -> tuple[Any, ...]:
    """What a layer of a small GPT-NeoX calls the op with."""
    dtype = torch.float16

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    sizes = (3 * HIDDEN, INNER)
    if name == "norm_linear_gemv":
        vectors = [[torch.nn.Parameter(some(n)) for n in lengths] for lengths in (sizes, (HIDDEN,) * 2, (HIDDEN,) * 2)]
        weights = [torch.nn.Parameter(some(n, HIDDEN)) for n in sizes]
        return some(1, 1, HIDDEN), weights, *vectors, "layer", 1e-5, 0.0, "none,gelu", False
    if name == "linear_residual_gemv":
        w1, w2 = (torch.nn.Parameter(some(HIDDEN, n)) for n in (HIDDEN, INNER))
        b1, b2 = (torch.nn.Parameter(some(HIDDEN)) for _ in range(2))
        return some(1, 1, HIDDEN), some(1, 1, HIDDEN), w1, b1, some(1, 1, INNER), w2, b2
    if name == "dequant_linear":
        codes, scale = torch.randint(-128, 128, (INNER, HIDDEN), device=device).to(torch.int8), some(INNER, 1)
        return some(1, 1, HIDDEN), codes, scale, None, None, some(INNER), *Format(8, "int", 1, HIDDEN), "gelu", False
    if name == "decode_attention":
        q, k, v = some(1, 1, HEADS, 3 * DIM).chunk(3, -1)
        cos, sin = (some(1, 1, DIM // 4) for _ in range(2))
        caches = [some(1, HEADS, SIZE, DIM) for _ in range(2)]
        mask = (torch.arange(SIZE, device=device) <= 3)[None, None, None]
        lanes = [1, 0, DIM // 8]
        length = torch.tensor(3, device=device)
        return q, k, v, cos, sin, *caches, length, None, mask, DIM // 4, False, lanes, lanes, DIM**-0.5
    heads = some(1, LENGTH, 3, HEADS, DIM).unbind(2)
    q, k, v = (x.transpose(1, 2) for x in heads)
    if name == "dense_attention":
        return q, k, v, True, DIM**-0.5
    return q, k, v, None, None, 15, 0, DIM**-0.5


def microseconds(call: Callable[[], Any], calls: int, rounds: int = 25) -> float:
    """A call's processor time in the quickest round: others share the machine. The queue is empty before each round."""
    found = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return min(found)


def empty_like(op: Any) -> Any:
    """An op with the same arguments that returns None."""
    schema = str(op._schema).partition("::")[2].partition("(")[2].rpartition(" -> ")[0]
    short = op._schema.name.partition("::")[2] + "_empty"
    torch.library.define(f"launch_overhead::{short}", f"({schema} -> ()")
    torch.library.impl(f"launch_overhead::{short}", "CompositeExplicitAutograd")(_nothing)
    return getattr(torch.ops.launch_overhead, short).default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--only", choices=OPS)
    parser.add_argument("--label", default="", help="of the code that is measured; written into each row")
    parser.add_argument("--calls", type=int, default=200, help="calls in a round; above some hundred the queue is full")
    args = parser.parse_args()
    log, on_gpu = Log(args.out), torch.cuda.is_available()
    for name in OPS:
        if args.only not in (None, name):
            continue
        op = getattr(importlib.import_module(f"torch_fuse.kernels.{name}"), name)
        given = arguments(name, "cuda" if on_gpu else "cpu")
        try:
            with torch.no_grad(), contextlib.nullcontext() if on_gpu else stubbed():
                empty = empty_like(op)
                found = microseconds(lambda op=op, given=given: op(*given), args.calls)
                least = microseconds(lambda op=empty, given=given: op(*given), args.calls)
            row = {"what": "launch_overhead", "label": args.label, "op": name}
            log.write(**row, us=round(found, 2), empty_us=round(least, 2), stubbed=not on_gpu)
        except Exception as error:  # the other ops are still worth measuring
            log.write(what="launch_overhead", label=args.label, op=name, error=repr(error)[:300])


if __name__ == "__main__":
    main()
