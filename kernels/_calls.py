"""Calls of an opaque op that are made again: checks and arithmetic on sizes happen once for all calls of a kind.

Two calls are of a kind if their options are equal, and their tensors have the same shapes, strides, dtypes, devices and
alignments (to 16 bytes) and are the same ones at the same places. All that an op decides has to follow from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from torch_fuse._compat import allocator, same_metadata

from ._ops import INTERPRETED, Launch, hooked, launch

Given = Sequence[Tensor | None]
Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
_MOST, _MOST_ALIKE = 1024, 16  # kinds: in all, and of those that are compared one after the other


class Call:
    """A call of an op while it is made for the first time: it allocates and launches here.

    It is made again only if its kernels are launched on tensors of the call or on what it allocated, and its results
    were allocated, too: a copy of an argument would have the values of the first call forever.
    """

    def __init__(self, given: Given) -> None:
        self._given, self._new, self._parts = given, list[Tensor](), list[tuple[int, int, Tensor]]()
        self._launches: list[tuple[Launch, Sequence[Any]]] = []
        self._device = next(x.device for x in given if x is not None)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
        """Memory on the arguments' device, contiguous by default."""
        size = tuple(map(int, shape))
        new = torch.empty(size, dtype=dtype, device=self._device)
        self._new.append(new if stride is None else new.as_strided(size, tuple(map(int, stride))))
        return self._new[-1]

    def rows(self, x: Tensor) -> list[Tensor]:
        """Those along the first dimension of what `empty` returned."""
        at = next(i for i, new in enumerate(self._new) if new is x)
        rows = list(x)
        self._parts += [(at, i, row) for i, row in enumerate(rows)]
        return rows

    def launch(self, kernel: Any, grid: int, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        """Launches a kernel on the arguments' device, the current one or not; as `_ops.launch`."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            self._launches.append((launch(kernel, grid, arguments, constants), arguments))

    def again(self, result: Any) -> Again | None:
        """How to make the call again, where that is possible."""
        tensors = [*self._given, *self._new, *(row for _, _, row in self._parts)]
        at = {id(x): i for i, x in enumerate(tensors) if x is not None}
        many = isinstance(result, (list, tuple))
        results = [at.get(id(x), -1) - len(self._given) for x in (result if many else (result,))]
        if not self._launches or not all(0 <= i < len(self._new) for i in results):
            return None
        constants: list[Any] = []
        launches: list[tuple[Launch, Pick]] = []
        for made, arguments in self._launches:
            places = []
            for x in made.arguments(arguments):
                if isinstance(x, (int, float, str)) or x is None:
                    places.append(len(tensors) + len(constants))
                    constants.append(x)
                elif id(x) in at:
                    places.append(at[id(x)])
                else:
                    return None
            launches.append((made, itemgetter(*places)))
        empty = [(tuple(x.shape), x.stride(), x.dtype) for x in self._new]
        parts = [(i, row, self._new[i].stride(0) * self._new[i].element_size()) for i, row, _ in self._parts]
        found = type(result)(results) if many else results[0]
        return Again(self._device, empty, parts, constants, launches, found)


class Again:
    """A call without its tensors: what it allocates, and its launches with the places of their arguments.

    Arguments are the call's tensors, then what it allocates, then `parts` of that (which one, row, bytes of a row),
    then `constants`.
    """

    def __init__(self, device: torch.device, empty: list[tuple[Any, ...]], parts: list[tuple[int, int, int]],
                 constants: list[Any], launches: list[tuple[Launch, Pick]],
                 results: list[int] | tuple[int, ...] | int) -> None:  # fmt: skip
        self._device, self._index = device, -1 if device.index is None else device.index
        self._allocate, self._empty, self._parts, self._constants = allocator(device), empty, parts, constants
        self._launches, self._results = launches, results

    def __call__(self, given: Given, addresses: list[int | None]) -> Any:
        """The results; `addresses` are those of `given`."""
        if not INTERPRETED and self._launches[0][0].current_device() != self._index:
            with torch.cuda.device(self._device):
                return self._make(given, addresses)
        return self._make(given, addresses)

    def _make(self, given: Given, addresses: list[int | None]) -> Any:
        allocate = self._allocate
        new = [allocate(*empty) for empty in self._empty]
        if INTERPRETED:
            parts = [new[i][row] for i, row, _ in self._parts]
            for kernel, pick in self._launches:
                kernel.slow(*pick((*given, *new, *parts, *self._constants)))
        else:
            places = [x.data_ptr() for x in new]
            rows = [places[i] + row * size for i, row, size in self._parts]
            self._launch((*addresses, *places, *rows, *self._constants))
        at = self._results
        if isinstance(at, int):
            return new[at]
        return [new[i] for i in at] if isinstance(at, list) else tuple([new[i] for i in at])

    def _launch(self, found: tuple[Any, ...]) -> None:
        if hooked():
            for kernel, pick in self._launches:
                kernel.slow(*pick(found))
        else:
            stream = self._launches[0][0].stream(self._index)
            for kernel, pick in self._launches:
                kernel.start(pick(found), stream)


class Calls:
    """The calls of one op, by their kinds."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Again]]] = {}

    def make(self, given: Given, options: tuple[Any, ...], first: Callable[..., Any], *arguments: Any) -> Any:
        """What first(call, *arguments) returns, with what it launches launched.

        Args:
            given: all tensors of the call, in an order that the options tell; the first is not None.
            options: all else that it depends on, with the configuration of the kernels.
            first: makes it the first time, with a `Call`.
        """
        addresses = [None if x is None else x.data_ptr() for x in given]
        alignments = tuple([None if address is None else address & 15 for address in addresses])
        ids, same = [*map(id, given)], None
        if len(set(ids)) != len(ids):
            same = tuple(map(ids.index, ids))
        key = (given[0].shape, options, alignments, same)  # type: ignore[union-attr]
        tensors = [x for x in given if x is not None]
        if same is not None:
            tensors = list({id(x): x for x in tensors}.values())
        known = self._known.get(key)
        if known is not None:
            for alike, again in known:
                if alike(*tensors):
                    return again(given, addresses)
        call = Call(given)
        result = first(call, *arguments)
        made = call.again(result)
        if made is not None:
            self._remember(key, tensors, made)
        return result

    def _remember(self, key: tuple[Any, ...], tensors: list[Tensor], made: Again) -> None:
        if len(self._known) == _MOST:
            self._known.clear()
        known = self._known.setdefault(key, [])
        if len(known) == _MOST_ALIKE:
            known.clear()
        known.append((same_metadata(tensors), made))
