"""Which kernel a call of `decode_stack` needs: to check hundreds of tensors takes longer than their token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_fuse._compat import same_metadata

from . import _cuda
from ._decode_stack_launch import Ready, misplaced, ready

if TYPE_CHECKING:
    from .decode_stack import Stack

MOST, MOST_ALIKE = 64, 4  # kinds: in all, and of those that are compared one after the other
_log = logging.getLogger(__name__)
_known: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Ready | None]]] = {}


def found(s: Stack, check: Callable[[Stack], None]) -> Ready | None:
    """The kernel for a call, or None, with the reason in the log; `check` is called once for calls that are alike.

    Calls are alike if their options are equal, their tensors have the same shapes, strides, dtypes and devices, and are
    the same ones at the same places.
    """
    given: list[Tensor | None] = []
    for argument in s.tensors:
        if isinstance(argument, (list, tuple)):
            given += argument
        else:
            given.append(argument)  # type: ignore[arg-type]
    at: dict[int, int] = {}
    places = tuple([at.setdefault(id(t), i) if t is not None else -1 for i, t in enumerate(given)])
    tensors = [given[i] for i in at.values()]
    counts = tuple([len(a) for a in s.tensors if isinstance(a, (list, tuple))])
    options = tuple([tuple(a) if isinstance(a, (list, tuple)) else a for a in s.options])
    alike = _known.get((counts, options, places), [])
    for same, kernel in alike:
        if same(*tensors):
            return kernel if kernel is None or misplaced(s) is None else None
    check(s)
    reason = _cuda.unavailable(s.x.device) or ready(s)
    if isinstance(reason, str):
        _log.log(logging.DEBUG if s.x.device.type == "cpu" else logging.WARNING, "decode_stack: %s", reason)
    result = None if isinstance(reason, str) else reason
    if result is None and s.x.device.type != "cpu" and misplaced(s) is not None:
        return None  # others that are alike may have a kernel
    if len(_known) == MOST:
        _known.clear()
    alike = _known.setdefault((counts, options, places), [])
    if len(alike) == MOST_ALIKE:
        alike.clear()
    alike.append((same_metadata(tensors), result))  # type: ignore[arg-type]
    return result
