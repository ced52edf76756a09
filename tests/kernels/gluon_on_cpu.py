"""The Gluon kernel of a few rows, run by torch: each statement on whole tensors, layouts only where they matter.

Triton's interpreter does not know Gluon. What layouts decide here is which four elements a step of inline PTX takes;
its instructions are run one by one (`test_dequant_codes.run`). Every address and every hint about one is checked.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from test_dequant_codes import elements, run, words
from torch import Tensor

from torch_fuse.kernels import _dequant_rows_kernel, _dequant_rows_read

__all__ = ["launch"]


class Pointer:
    """Addresses of elements; `element_ty` as Triton's pointer types have it."""

    def __init__(self, memory: Tensor, at: Any) -> None:
        self.memory, self.at, self.dtype, self.element_ty = memory, at, self, memory.dtype

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
        whole = memory[: memory.numel() // x.itemsize * x.itemsize].view(x.dtype)
        return cls(whole, torch.tensor(x.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


def _load(pointer: Pointer, mask: Any = None, other: float = 0, eviction_policy: str = "") -> Tensor:
    at = pointer.at
    if mask is None:
        assert bool((at >= 0).all()) and bool((at < pointer.memory.numel()).all()), "outside of the memory"
        return pointer.memory[at]
    at, mask = torch.broadcast_tensors(at, mask)
    found = _load(Pointer(pointer.memory, torch.where(mask, at, at.new_zeros(()))))
    return torch.where(mask, found, torch.full_like(found, other))


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    at, value, mask = torch.broadcast_tensors(pointer.at, value, mask)
    assert bool(pointer.memory[at[mask]].isnan().all()), "written twice"
    pointer.memory[at[mask]] = value[mask]


def _multiple_of(x: Tensor, values: list[int]) -> Tensor:
    assert bool((x % values[0] == 0).all()), f"no multiples of {values[0]}"
    return x


def _max_contiguous(x: Tensor, values: list[int]) -> Tensor:
    runs = x.reshape(*x.shape[:-1], -1, values[-1])
    assert torch.equal(runs, runs[..., :1] + torch.arange(values[-1]))
    return x


def _steps(x: Tensor, axis: int) -> Tensor:
    """Elements [n, 4] as a lane has them, `axis` the one that is summed over."""
    if x.shape[axis] >= 32:
        return x.movedim(axis, -1).reshape(-1, 4)
    if axis == 2:  # 16 columns: two of row g, then two of row g + 8
        return x.reshape(x.shape[0], -1, 2, 8, 8, 2).movedim(2, 4).reshape(-1, 4)
    return x.reshape(x.shape[0], 2, 4, 2, -1).permute(0, 4, 2, 1, 3).reshape(-1, 4)


def _unstep(x: Tensor, shape: torch.Size, axis: int) -> Tensor:
    places = _steps(torch.arange(shape.numel()).view(shape), axis)
    return torch.empty(shape.numel(), dtype=x.dtype).scatter_(0, places.flatten(), x.flatten()).view(shape)


class _Gl:
    """What the kernel uses of Gluon's language."""

    constexpr, float32, int64, int32, int16 = object, torch.float32, torch.int64, torch.int32, torch.int16
    load, store, multiple_of, max_contiguous = map(staticmethod, (_load, _store, _multiple_of, _max_contiguous))
    static_range, to_tensor = range, staticmethod(torch.tensor)
    erf, exp = staticmethod(torch.erf), staticmethod(torch.exp)
    program, axis_of = 0, staticmethod(lambda program: 2)

    def __getattr__(self, name: str) -> Any:
        assert name.endswith("Layout"), name
        return lambda *args: None

    def program_id(self, axis: int) -> int:
        return self.program

    def arange(self, first: int, last: int, layout: Any) -> Tensor:
        return torch.arange(first, last)

    def minimum(self, x: Tensor, most: int) -> Tensor:
        return x.clamp(max=most)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def inline_asm_elementwise(self, program: str, names: str, operands: Any, dtype: Any, pure: bool, pack: int) -> Any:
        shape, axis = operands[0].shape, self.axis_of(program)
        kinds = dtype if isinstance(dtype, tuple) else (dtype,)
        given = []
        for operand in operands:
            operand = operand.to(torch.int32) if operand.dtype == torch.int64 else operand  # a table's plane
            four = _steps(operand.broadcast_to(shape).contiguous(), axis).contiguous()
            given += words(four).view(four.shape[0], -1).unbind(-1)
        assert names == ",".join(["=r"] * 2 * len(kinds) + ["r"] * len(given))
        found = run(program, given, 2 * len(kinds))
        sides = [_unstep(elements(found[2 * i : 2 * i + 2], kind), shape, axis) for i, kind in enumerate(kinds)]
        return tuple(sides) if isinstance(dtype, tuple) else sides[0]


def _product(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    return acc + a.float() @ b.float()


def launch(kernel: Any, grid: int, arguments: list[Any], options: dict[str, Any]) -> None:
    """As `kernels._ops.launch`, for the kernel of `_dequant_rows_kernel` and tensors on the CPU."""
    files = [inspect.getsource(module) for module in (_dequant_rows_read, _dequant_rows_kernel)]
    source = "".join(text[text.index("@gluon.jit") :] for text in files).replace("DTYPE.value", "DTYPE")
    source = source.replace(".to(gl.int16, bitcast=True)", ".view(gl.int16)")
    source = re.sub(r"^( +)(\w+) ([+*])= (.*)$", r"\1\2 = \2 \3 (\4)", source, flags=re.M)  # not in place
    language = _Gl()
    names: dict[str, Any] = {"gl": language, "mma_v2": _product}
    names["gluon"] = type("gluon", (), {"jit": staticmethod(lambda function: function)})
    exec(compile(source, _dequant_rows_kernel.__file__, "exec"), names)
    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    constants = {name: types.get(str(value), value) for name, value in options.items() if name != "num_warps"}
    language.axis_of = lambda program: 1 if program == options["SPLIT"] else 2  # type: ignore[method-assign]
    given = [Pointer.to(x) if isinstance(x, Tensor) else x for x in arguments]
    arguments[6].fill_(torch.nan)
    for language.program in range(grid):
        names["kernel"](*given, **constants)
