"""Emits nodes into a graph, with their fake values, and takes them back when the rewrite does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from torch_fuse._compat import FakeTensorMode, no_guards, op_overload
from torch_fuse.graph.effects import mutated
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import equal, same_shape, storages, tensor, value


class Builder:
    """Inserts calls before one node of a graph.

    Args:
        gm: the graph module.
        before: the node.
        mode: the graph's fake mode.
        source: the node whose place in the user's source the calls get.
        writers: the graph's nodes that write to something in place.
    """

    def __init__(
        self, gm: GraphModule, before: Node, mode: FakeTensorMode | None, source: Node, writers: Sequence[Node] = ()
    ) -> None:
        self.gm = gm
        self.nodes: list[Node] = []
        self._before = before
        self._mode = mode
        self._writers = writers
        self._stack_trace = source.stack_trace

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
        """Emits a call of a function or, for a string, of a tensor method, and returns its node.

        Raises:
            Miss: when the call does not accept the (fake) values it is given.
        """
        graph = self.gm.graph
        with graph.inserting_before(self._before):
            if isinstance(target, str):
                node = graph.call_method(target, args, kwargs)
            else:
                node = graph.call_function(op_overload(target), args, kwargs)
        node.stack_trace = self._stack_trace
        self.nodes.append(node)
        try:
            node.meta["example_value"] = evaluate(node, self._mode)
        except Exception as error:
            raise Miss(f"{target} does not accept its inputs: {error}", node) from error
        return node

    def shared(self, target: Callable[..., Any] | str, *args: Any) -> Node:
        """Like `call`, for pure functions: takes the node that an earlier rewrite emitted, if one did.

        Layers share masks and tables; given one for each layer, Inductor would compute each.
        """
        wanted = target if isinstance(target, str) else op_overload(target)
        flat = (item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,)))
        source = next(item for item in flat if isinstance(item, Node))
        for node in source.users:
            same = node.meta.get("torch_fuse_shared") and (node.target, node.args) == (wanted, args)
            if same and node < self._before and not self._written_since(source, node):
                return node
        node = self.call(target, *args)
        node.meta["torch_fuse_shared"] = True
        return node

    def _written_since(self, source: Node, node: Node) -> bool:
        """Whether `source` is written to between `node` and here, which no copy would show."""
        read = storages(source)
        since = (writer for writer in self._writers if node < writer < self._before)
        return any(read & storages(target) for writer in since for target in mutated(writer))

    def discard(self) -> None:
        """Takes all emitted nodes back."""
        for node in reversed(self.nodes):
            self.gm.graph.erase_node(node)
        self.nodes.clear()


def evaluate(node: Node, mode: FakeTensorMode | None) -> Any:
    """The fake value of a call, from the fake values of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    with no_guards(mode):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def check_same_meta(old: Node, new: Node) -> None:
    """Raises Miss unless two nodes agree in shape, dtype and device."""
    before, after = tensor(old), tensor(new)
    if before is None or after is None:
        raise Miss(f"{old.name} or its replacement is not a tensor", old)
    if not same_shape(before.shape, after.shape):
        raise Miss(f"the replacement of {old.name} has shape {list(after.shape)}, not {list(before.shape)}", old)
    if before.dtype != after.dtype or before.device != after.device:
        raise Miss(
            f"the replacement of {old.name} is {after.dtype} on {after.device}, not {before.dtype} on {before.device}",
            old,
        )


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of the same shape lie alike in memory, as far as is known."""
    return all(equal(size, 1) or equal(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))
