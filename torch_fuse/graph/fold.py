"""Values of nodes that depend on constants alone, by running them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node, map_arg

from torch_fuse._compat import unset_fake_temporarily
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import tensor, value

_LIMIT = 1 << 24  # elements of the largest intermediate
_RANDOM_OR_EMPTY = {"dropout", "empty_like", "empty", "new_empty"}


def fold_constant(node: Node, order: Order, before: Node) -> torch.Tensor | None:
    """The value of `node` on the CPU, when it depends on no input and all its sizes are static; else None."""
    cone = _cone(node)
    if cone is None:
        return None
    try:
        order.check_unwritten(cone, order.index[before])
    except Miss:
        return None
    values: dict[Node, Any] = {}
    with unset_fake_temporarily(), torch.no_grad():
        for item in cone:
            args, kwargs = map_arg((item.args, _on_cpu(item.kwargs)), values.__getitem__)
            try:
                if item.op == "call_method":
                    values[item] = getattr(args[0], str(item.target))(*_on_cpu(args[1:]), **kwargs)
                else:
                    values[item] = item.target(*_on_cpu(args), **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _cone(node: Node) -> list[Node] | None:
    """All nodes that `node` depends on, in order; None when one is an input or is not a known pure operator."""
    cone: dict[Node, None] = {}
    visiting: set[Node] = set()
    stack = [(node, False)]
    while stack:
        current, expanded = stack.pop()
        if current in cone:
            continue
        if expanded:
            cone[current] = None
            continue
        if current in visiting or not _foldable(current):
            return None
        visiting.add(current)
        stack.append((current, True))
        stack += [(source, False) for source in current.all_input_nodes if source not in cone]
    return list(cone)


def _foldable(node: Node) -> bool:
    found = tensor(node)
    if found is not None and (any(not isinstance(s, int) for s in found.shape) or found.numel() > _LIMIT):
        return False
    if found is None and isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    call = call_of(node)
    if call is not None:
        return not call.inplace and call.op not in _RANDOM_OR_EMPTY
    return node.op == "call_function" and node.target in (torch.arange, torch.tensor, torch.scalar_tensor)


def _on_cpu(arguments: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), arguments)
