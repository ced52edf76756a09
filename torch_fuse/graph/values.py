"""What Dynamo knows of a node's value: shape, dtype, strides, storage. Nothing here installs a guard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.multiprocessing.reductions import StorageWeakRef


def value(node: Any) -> Any:
    """The fake value of a node (tensor, tuple, SymInt, ...), or None; a constant is its own value."""
    if not isinstance(node, Node):
        return node
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None when its value is something else."""
    found = value(node) if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def equal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal without a guard."""
    return statically_known_true(a == b)


def less(a: Any, b: Any) -> bool:
    """Whether a size is known to be less than another without a guard."""
    return statically_known_true(a < b)


def unequal(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ; for sizes that the graph as it was needs to be equal, too."""
    return statically_known_true(a != b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal without a guard."""
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def static_int(size: Any) -> int | None:
    """A size as an int, or None when it is symbolic."""
    if isinstance(size, int):
        return size
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else None
    return None


def size_hint(size: Any, fallback: int) -> int:
    """A size for heuristics: the size seen when the graph was traced, or `fallback`; installs no guard."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else fallback


def tensors(obj: Any) -> Iterator[torch.Tensor]:
    """All tensors in a value."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, (tuple, list)):
        for item in obj:
            yield from tensors(item)
    elif isinstance(obj, dict):
        yield from tensors(tuple(obj.values()))


def storages(node: Node) -> set[StorageWeakRef]:
    """The storages that a node's value lives in; nodes that share one are aliases."""
    found = set()
    for item in tensors(value(node)):
        try:
            found.add(StorageWeakRef(item.untyped_storage()))
        except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage
            continue
    return found


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def location(node: Node) -> str:
    """The user's source line of a node as "file:line": the innermost frame outside torch; "" if unknown."""
    frames = _FRAME.findall(node.stack_trace or "")
    root = torch.__path__[0]
    for file, line in reversed(frames):
        if not file.startswith(root):
            return f"{file}:{line}"
    return ""


def describe_shape(node: Node) -> str:
    """A node's shape for the report, such as "[1, s0, 2560]"."""
    found = tensor(node)
    return "" if found is None else "[" + ", ".join(str(size) for size in found.shape) + "]"


def keeps_reals(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a cast is between real types of two bytes or more on one device: one that fused ops may leave out."""
    types = (before.dtype, after.dtype)
    return before.device == after.device and all(t.is_floating_point and t.itemsize > 1 for t in types)
