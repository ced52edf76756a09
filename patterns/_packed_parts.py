"""What the parts of a quantised weight could be, by the shapes and types of what it is computed from.

Candidates only: `_packed_formats` proves one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_fuse.graph.closure import Closure
from torch_fuse.graph.values import tensor, tensors, value
from torch_fuse.kernels._bit_planes import BITS
from torch_fuse.kernels.packed_weight import COMPUTE, NIBBLES, Format, weight_shape
from torch_fuse.rewrite.builder import Builder

_TAILED = (128, 64, 32, 256, 16)  # sizes of groups and blocks of which the last may be shorter
_RUNS = (32, 16, 64)  # bytes of which the low halves are a run of columns, and the high ones the next
_PLANE_RUNS = (32, 64, 16, 1)  # the same of planes of bits
_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
Steps = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Part:
    """A part of a weight: leaf number `leaf` of the closure, after `steps`, (method, *arguments) each."""

    leaf: int
    steps: Steps

    def of(self, leaves: list[Tensor]) -> Tensor:
        """The part of given leaves."""
        found = leaves[self.leaf]
        for name, *args in self.steps:
            found = getattr(found, name)(*args)
        return found

    def emit(self, leaves: list[Node], builder: Builder) -> Node:
        """The part in a graph that has the leaves."""
        node = leaves[self.leaf]
        for name, *args in self.steps:
            node = builder.call(name, node, *args)
        return node


@dataclass(frozen=True)
class Number:
    """A scale that is a number in the graph, or 1 where there is none."""

    value: float

    def of(self, leaves: list[Tensor]) -> Tensor:
        """The scale, on the leaves' device."""
        return torch.full((1, 1), self.value, device=leaves[0].device)

    def emit(self, leaves: list[Node], builder: Builder) -> Node:
        """The scale in a graph that has the leaves."""
        device = tensor(leaves[0]).device  # type: ignore[union-attr]
        return builder.call(torch.full, (1, 1), self.value, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Reading:
    """A weight as a format and the parts that it takes; the scale of an "output" is no part of the weight."""

    form: Format
    codes: Part
    scale: Part | Number | None
    zero: Part | None = None
    lut: Part | None = None

    def parts(self, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """codes, scale, zero, lut of given leaves; ones for an output's scale."""
        codes = self.codes.of(leaves)
        zero, lut = (None if part is None else part.of(leaves) for part in (self.zero, self.lut))
        if self.scale is None:
            n, _ = weight_shape(codes, self.form)
            return codes, codes.new_ones((-(-n // self.form.rows), 1), dtype=torch.float32), zero, lut
        return codes, self.scale.of(leaves), zero, lut


Role = tuple[Part | Number, int, int, Part | None, Part | None]


def candidates(
    closure: Closure, shape: tuple[int, int], codes: list[tuple[Part, int, str, str]], output: tuple[int, str] | None
) -> Iterator[Reading]:
    """All that a closure could be by the shapes and types of its leaves."""
    seen = (*closure.nodes, *closure.others)
    computes = [name for name, dtype in COMPUTE.items() if any(_computes_in(node, dtype) for node in seen)]
    offsets = {0, *(c for node in closure.nodes for c in _integers(node))}
    if output is not None:
        for (part, bits, kind, nibbles), offset in itertools.product(codes, sorted(offsets)):
            if not closure.others and kind != "lut16" and (kind in ("int", "uint") or not offset):
                form = Format(bits, kind, output[0], shape[1], offset, nibbles, "output", output[1])
                yield Reading(form, part, None)
        return
    roles = list(_roles(closure, shape))
    for (scale, rows, group, zero, lut), (part, bits, kind, nibbles) in itertools.product(roles, codes):
        if (lut is not None) != (kind == "lut16"):
            continue
        middle = {1 << bits - 1} if bits in BITS else set()
        for offset in sorted(offsets | middle) if kind in ("int", "uint") else [0]:
            for compute in computes if isinstance(scale, Part) else dict.fromkeys(("float32", *computes)):
                for arithmetic in ("sub_mul",) if zero is None else ("sub_mul", "mul_sub", "mul_add"):
                    form = Format(bits, kind, rows, group, offset, nibbles, arithmetic, compute)
                    yield Reading(form, part, scale, zero, lut)


def _computes_in(node: Node, dtype: torch.dtype) -> bool:
    return any(x.dtype == dtype for x in tensors(value(node)))


def _integers(node: Node) -> list[int]:
    """Numbers that a closure's operator has as arguments, and that may be what is subtracted from its codes."""
    if "dequantize_per_tensor" in str(node.target):
        return [x for x in node.args[2:3] if isinstance(x, int) and abs(x) <= 255]
    found = [abs(x) for x in (*node.args, *node.kwargs.values()) if isinstance(x, (int, float))]
    return [int(x) for x in found if 2 <= x <= 128 and x == int(x)]


def _roles(closure: Closure, shape: tuple[int, int]) -> Iterator[Role]:
    """Which leaf is the scale, the zero point, the table: (scale, rows, group, zero, lut)."""
    leaves = dict(enumerate((tensor(leaf) for leaf in closure.others), start=1))
    n, k = shape
    if not leaves:
        yield from ((Number(number), n, k, None, None) for number in _numbers(closure))
    if not 1 <= len(leaves) <= 3:
        return
    for order in itertools.permutations(leaves):
        first, rest = order[0], order[1:]
        found = leaves[first]
        assert found is not None
        if found.dtype not in COMPUTE.values():
            continue
        spans = list(_spans(found, shape))
        for rows, group, steps in spans:
            scale = Part(first, steps)
            if not rest:
                yield scale, rows, group, None, None
            for lut in rest:
                table = leaves[lut]
                if table is None or table.numel() != 16 or not table.dtype.is_floating_point:
                    continue
                if len(rest) == 1:
                    yield scale, rows, group, None, Part(lut, (("reshape", 16),))
            if len(rest) == 1:
                yield from ((scale, rows, group, zero, None) for zero in _zeros(rest[0], leaves, rows, group, shape))


def _numbers(closure: Closure) -> list[float]:
    """What codes may be multiplied by when no tensor is the scale."""
    args = [x for node in closure.nodes for x in (*node.args, *node.kwargs.values())]
    return [1.0, *dict.fromkeys(float(x) for x in args if isinstance(x, float) and x != 1)]


def _zeros(leaf: int, leaves: dict[int, Any], rows: int, group: int, shape: tuple[int, int]) -> Iterator[Part]:
    found = leaves[leaf]
    grid = (-(-shape[0] // rows), -(-shape[1] // group))
    for other_rows, other_group, steps in _spans(found, shape):
        if (other_rows, other_group) == (rows, group):
            yield Part(leaf, steps)
        elif found.numel() == 1:
            yield Part(leaf, (*steps, ("expand", *grid)))


def _spans(found: Tensor, shape: tuple[int, int]) -> Iterator[tuple[int, int, Steps]]:
    """(rows, group, steps to the canonical shape) that a tensor of scales could mean."""
    n, k = shape
    count = found.numel()
    if count == 1:
        yield n, k, _reshape(found, 1, 1)
        return
    if count == n:
        yield 1, k, _reshape(found, n, 1)
    if count % n == 0 and k % (count // n) == 0 and count > n:
        yield 1, k * n // count, _reshape(found, n, count // n)
    sides = [size for size in found.shape if size != 1]
    if len(sides) != 2:
        return
    for flip in (False, True):
        high, wide = reversed(sides) if flip else sides
        steps = (*_reshape(found, *sides), ("t",)) if flip else _reshape(found, *sides)
        for rows, group in itertools.product(_sizes(n, high), _sizes(k, wide)):
            if flip or rows != 1 or k % group:
                yield rows, group, steps


def _sizes(size: int, parts: int) -> list[int]:
    """How many elements a part may have."""
    if parts > size:
        return []
    whole = [size // parts] if size % parts == 0 else []
    return whole + [part for part in _TAILED if -(-size // part) == parts and part not in whole]


def _reshape(found: Tensor, *shape: int) -> Steps:
    return () if tuple(found.shape) == shape else (("reshape", *shape),)


def codes_of(closure: Closure, shape: tuple[int, int]) -> Iterator[tuple[Part, int, str, str]]:
    """(part, bits, kind, nibbles) that the codes could mean."""
    found = tensor(closure.codes)
    assert found is not None
    n, k = shape
    if closure.planes:
        yield from _plane_codes(tuple(found.shape), list(closure.planes.values()), shape)
        return
    whole = found.numel() * found.dtype.itemsize
    if whole == n * k and found.dtype.itemsize == 1:
        for steps in _laid_out(tuple(found.shape), n):
            for dtype, kind in ((torch.int8, "int"), (torch.uint8, "uint"), *_FP8.items()):
                if found.dtype == dtype or found.dtype == torch.uint8:
                    seen: Steps = () if found.dtype == dtype else (("view", dtype),)
                    yield Part(0, (*seen, *steps)), 8, kind, "low"
    elif 2 * whole == n * k:
        size = tuple(found.shape)
        view: Steps = () if found.dtype == torch.uint8 else (("view", torch.uint8),)
        layouts: list[Steps] = []
        if found.dtype == torch.int32:
            view, size = (*view, ("unflatten", -1, (size[-1], 4))), (*size, 4)
            if size[:1] + size[2:] == (k // 8, 4):
                layouts = [(("permute", 1, 0, 2),)]
        layouts += _laid_out(size, n)
        runs = [(*steps, ("unflatten", -1, (-1, run))) for steps in layouts for run in _RUNS if size[-1] > run]
        places = {
            "low": layouts,
            "half": [*layouts, *runs],
            "rows": list(_laid_out(size, n // 2)) if n % 2 == 0 else [],
        }
        for kind, nibbles in itertools.product(("uint", "lut16", "int"), NIBBLES):
            for steps in places["low" if nibbles == "high" else nibbles.removesuffix("_high")]:
                yield Part(0, (*view, *steps)), 4, kind, nibbles


def _plane_codes(
    blocks: tuple[int, ...], slices: list[tuple[int, int]], shape: tuple[int, int]
) -> Iterator[tuple[Part, int, str, str]]:
    """The same of slices (first byte, bytes) of each block."""
    n, k = shape
    places = sorted(slices)
    first, size = places[0][0], sum(width for _, width in places)
    weights = n * k // blocks[0]
    if blocks[0] % n or n * k % blocks[0]:
        return
    bits = [8 * width // weights for _, width in places]
    part = Part(0, (("unflatten", 0, (n, blocks[0] // n)), ("narrow", -1, first, size)))
    for runs in itertools.product(*([run for run in _PLANE_RUNS if width % run == 0] for _, width in places)):
        layout = "+".join(f"{count}x{run}" for count, run in zip(bits, runs, strict=True))
        yield part, sum(bits), "uint", layout


def _laid_out(size: tuple[int, ...], n: int) -> Iterator[Steps]:
    """How a tensor of codes could have the weight's rows in front."""
    inner = 1
    for dim in size:
        inner *= dim
    inner //= n
    if size[0] == n and len(size) > 1:
        yield ()
    elif size[0] % n == 0:
        yield (("unflatten", 0, (n, size[0] // n)),)
    elif len(size) > 1:
        yield (("view", n, inner),)
    if size[-1] == n and len(size) == 2:
        yield (("t",),)
    elif size[-1] == n and len(size) == 3:
        yield (("permute", 2, 0, 1),)
