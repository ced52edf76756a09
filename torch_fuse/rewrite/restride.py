"""What a replacement with other strides does downstream: who cannot take them, and what becomes a view or a copy."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node, map_arg
from torch.multiprocessing.reductions import StorageWeakRef

from torch_fuse._compat import FakeTensorMode, no_guards
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order, mutated
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import storages, tensors, value
from torch_fuse.rewrite.builder import same_strides


def restride(changed: dict[Node, Node], mode: FakeTensorMode | None, order: Order) -> None:
    """Follows changed strides downstream and updates the fake values, without changing the graph.

    Args:
        changed: old node -> its replacement; users still read the old nodes.
        mode: the graph's fake mode.
        order: the graph's mutations.

    Raises:
        Miss: when an operator cannot take the new strides (a `view`), when a result of the graph would change its
            strides, or when a `reshape` would become a view or a copy of something that is written to in place.
    """
    new_values: dict[Node, Any] = {
        old: value(new) for old, new in changed.items() if not same_strides(value(old), value(new))
    }
    if not new_values:
        return
    realiased: set[StorageWeakRef] = set()
    pending = sorted({user for old in new_values for user in old.users})
    queued = set(pending)
    while pending:
        node = heapq.heappop(pending)
        if node in new_values:
            continue
        if node.op == "output":
            _check_results(node, new_values)
            continue
        if not _reads_by_index(node):
            raise Miss(f"{node.name} takes a value whose strides would change", node)
        new = _evaluate_with(node, new_values, mode)
        sources = [a for a in node.all_input_nodes if a in new_values]
        is_view = _share(tensors(new), tensors([new_values[a] for a in sources]))
        was_view = _share(tensors(value(node)), tensors([value(a) for a in sources]))
        if is_view != was_view:
            realiased |= storages(node).union(*(storages(a) for a in sources))
        elif _settled(new, value(node)) and not is_view:
            continue
        new_values[node] = new
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(pending, user)
    for writer in order.writers if realiased else ():
        if any(storages(target) & realiased for target in mutated(writer)):
            raise Miss(f"{writer.name} writes in place to what would become a view or a copy", writer)
    for node, new in new_values.items():
        if node not in changed:
            node.meta["example_value"] = new


def _reads_by_index(node: Node) -> bool:
    """Whether an operator's result does not depend on how its inputs lie in memory; unknown ones may."""
    if call_of(node) is not None:
        return True
    if node.op == "call_method":
        return str(node.target) not in _LAYOUT_METHODS
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target).startswith("aten.") and "as_strided" not in str(node.target)
    name = getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", None) or ""
    return name not in _LAYOUT_METHODS and (module.split(".")[0] in ("torch", "_operator", ""))


# Methods that read or write memory as it lies; `view` is one when it is given a dtype, and unknown to call_of then.
_LAYOUT_METHODS = {"as_strided", "as_strided_", "view", "set_", "resize_", "resize_as_", "stride", "storage_offset",
                   "data_ptr", "untyped_storage", "is_contiguous"}  # fmt: skip


def _check_results(output: Node, new_values: dict[Node, Any]) -> None:
    """Raises Miss when a result of the graph would change its strides, or two results would come to share memory."""
    results = output.all_input_nodes
    for node in results:
        if node in new_values and not _settled(new_values[node], value(node)):
            raise Miss("a result of the graph would change its strides", node)
    for i, node in enumerate(results):
        for other in results[:i]:
            if node not in new_values and other not in new_values:
                continue
            new = [tensors(new_values.get(n, value(n))) for n in (node, other)]
            if _share(*new) != _share(tensors(value(node)), tensors(value(other))):
                raise Miss("two results of the graph would share memory, or no longer share it", node)


def _settled(new: Any, old: Any) -> bool:
    return isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor) and same_strides(new, old)


def _share(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    refs = {StorageWeakRef(t.untyped_storage()) for t in a}
    return any(StorageWeakRef(t.untyped_storage()) in refs for t in b)


def _evaluate_with(node: Node, new_values: dict[Node, Any], mode: FakeTensorMode | None) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: new_values.get(n, value(n)))
    try:
        with no_guards(mode):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise Miss(f"{node.name} cannot take the new strides: {error}", node) from error
