"""Mutations and modes between the nodes of a match: when moving a read across them would change the result."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable

import torch
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import storages

# Higher-order operators whose bodies Dynamo has checked to be free of mutations of their arguments.
_PURE_REGIONS = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}
_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
        "ilshift", "irshift", "setitem", "delitem",
    )
}  # fmt: skip


def mutated(node: Node) -> list[Node]:
    """The nodes whose tensors `node` writes to; for an operator that is not understood, all its arguments."""
    arguments = node.all_input_nodes
    if node.op == "call_method":
        return arguments[:1] if _writes_by_name(str(node.target)) else []
    if node.op == "call_module":
        return arguments
    if node.op != "call_function":
        return []
    target = node.target
    if target in _IN_PLACE_OPERATORS:
        return arguments[:1]
    written = _nodes(node.kwargs.get("out"))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [] if target.name() in _PURE_REGIONS else arguments
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = target.default if hasattr(target, "default") else target
    if isinstance(target, torch._ops.OpOverload):
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.kwargs.get(argument.name, node.args[index] if index < len(node.args) else None)
                written += _nodes(given)
        return written
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") == "_operator":  # and_, or_ and not_ only look like it
        return written
    if _writes_by_name(name):
        return [*written, *arguments[:1]]
    return [*written, *arguments[:1]] if _asks_in_place(node) else written


def _writes_by_name(name: str) -> bool:
    """`add_`, `__iadd__`, `__setitem__`."""
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in {function.__name__ for function in _IN_PLACE_OPERATORS}
    return name.endswith("_")


def _nodes(value: object) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    return [item for item in value if isinstance(item, Node)] if isinstance(value, (list, tuple)) else []


def _asks_in_place(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    if not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and node.args[position] is not False


def switches_mode(node: Node) -> bool:
    """Whether a node turns autocast, grad mode or another global mode on or off."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name in {
        "_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode",
        "_exit_inference_mode", "_set_deterministic_algorithms", "set_deterministic",
    }  # fmt: skip


class Order:
    """Positions of the nodes of a graph, computed once."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.writers = [node for node in self.nodes if mutated(node)]
        self.switches = [node for node in self.nodes if switches_mode(node)]
        self._storages: dict[Node, set[StorageWeakRef]] = {}

    def _aliases(self, nodes: Iterable[Node]) -> set[StorageWeakRef]:
        for node in nodes:
            if node not in self._storages:
                self._storages[node] = storages(node)
        return set().union(*(self._storages[node] for node in nodes))

    def between(self, nodes: Iterable[Node], first: int, last: int) -> list[Node]:
        """Those of `nodes` that stand strictly between two positions."""
        return [node for node in nodes if first < self.index[node] < last]

    def check_movable(self, region: Collection[Node], inputs: Collection[Node], at: int) -> None:
        """Raises Miss unless `region`, reading `inputs`, computes the same just before position `at` as where it is.

        Raises:
            Miss: for a mutation of an input or an intermediate in between, or a change of mode.
        """
        positions = [self.index[node] for node in region]
        first, last = min(positions), max(at, *positions)
        for node in self.between(self.switches, first, last):
            raise Miss(f"autocast or grad mode changes inside the region ({node.name})", node)
        read = self._aliases([*region, *inputs])
        for node in self.between(self.writers, first, last):
            if node in region:
                continue
            if read & self._aliases(mutated(node)):
                raise Miss(f"{node.name} writes in place to a value of the region", node)

    def check_unwritten(self, nodes: Collection[Node], at: int) -> None:
        """Raises Miss when any of `nodes` (or an alias) is written to before position `at`."""
        read = self._aliases(list(nodes))
        for node in self.writers:
            if self.index[node] < at and read & self._aliases(mutated(node)):
                raise Miss(f"{node.name} writes in place to it", node)
