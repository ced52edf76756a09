"""Mutations and modes between the nodes of a match: when moving a read across them would change the result."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import storages

# Higher-order operators that do nothing but run their body.
_REGIONS = {"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"}
_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
        "ilshift", "irshift", "setitem", "delitem",
    )
}  # fmt: skip

# Functions whose names do not tell that they write: the argument that asks for it, and what is written to.
_QUIET: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.embedding: ("max_norm", ("weight",)),
    F.embedding_bag: ("max_norm", ("weight",)),
    F.batch_norm: ("training", ("running_mean", "running_var")),
    F.instance_norm: ("use_input_stats", ("running_mean", "running_var")),
}
# Others, whose arguments have no names: taken to write to all.
_QUIET_BUILTINS = {
    getattr(torch, name, None)
    for name in (
        "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
        "fused_moving_avg_obs_fake_quant",
    )
}  # fmt: skip


def mutated(node: Node) -> list[Node]:
    """The nodes whose tensors `node` writes to; for an operator that is not understood, all its arguments."""
    arguments = node.all_input_nodes
    if node.op == "call_method":
        return _first(node) if _writes_by_name(str(node.target)) else []
    if node.op == "call_module":
        return arguments
    if node.op != "call_function":
        return []
    target = node.target
    if target in _IN_PLACE_OPERATORS:
        return _first(node)
    if _listed(target, _QUIET):
        return _quietly(node)
    if _listed(target, _QUIET_BUILTINS):
        return arguments
    written = _nodes(node.kwargs.get("out"))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [] if target.name() in _REGIONS and not _body_writes(node) else arguments
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
        return [*written, *_first(node)]
    return [*written, *_first(node)] if _asks_in_place(node) else written


def _listed(target: object, functions: Collection[Any]) -> bool:
    try:
        return target in functions
    except TypeError:  # unhashable callable
        return False


def _quietly(node: Node) -> list[Node]:
    asks, written = _QUIET[node.target]
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    given = bound.arguments
    return [] if given[asks] in (None, False) else _nodes([given[name] for name in written])


def _first(node: Node) -> list[Node]:
    """The tensors of the first argument, which may be a list (`torch._foreach_mul_`)."""
    return _nodes(node.args[0] if node.args else next(iter(node.kwargs.values()), None))


def _body_writes(node: Node) -> bool:
    owner = node.graph.owning_module
    bodies = [getattr(owner, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr"]
    return any(mutated(inner) for body in bodies if isinstance(body, GraphModule) for inner in body.graph.nodes)


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


# What opens a function transform in a graph, and its name for users; "decrement" or "exit" closes it.
_TRANSFORMS = {
    "_jvp_increment_nesting": "torch.func.jvp", "_enter_dual_level": "forward-mode differentiation",
    "_grad_increment_nesting": "torch.func.grad", "_vmap_increment_nesting": "torch.vmap",
}  # fmt: skip
_ENDS = {name.replace("increment", "decrement").replace("enter", "exit") for name in _TRANSFORMS}


def transforms(nodes: Iterable[Node]) -> dict[Node, str]:
    """The innermost function transform around each node that is computed in one.

    Custom ops have no rules for them: torch gives a forward-mode derivative of zero, without a word.
    """
    around: list[str] = []
    found: dict[Node, str] = {}
    for node in nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _TRANSFORMS:
            around.append(_TRANSFORMS[name])
        elif name in _ENDS and around:
            around.pop()
        elif around:
            found[node] = around[-1]
    return found


# Views that may be computed earlier than the graph does.
_HOISTABLE = {"getitem", "select", "narrow", "chunk", "split", "unbind", "view", "unflatten", "transpose", "permute",
              "unsqueeze"}  # fmt: skip


def is_hoistable(node: Node) -> bool:
    """Whether a node is a view that costs nothing wherever it is computed."""
    call = call_of(node)
    return call is not None and not call.inplace and call.op in _HOISTABLE


def _idle_autocasts(nodes: Iterable[Node]) -> set[Node]:
    """Where autocast is turned off and back although it is off; Dynamo guards on its state around the graph."""
    idle: set[Node] = set()
    active: list[Node] = []
    for node in nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "_enter_autocast":
            device, _, enabled = (*node.args, None, None, None)[:3]
            if enabled is False and not active and isinstance(device, str) and not torch.is_autocast_enabled(device):
                idle.add(node)
            else:
                active.append(node)
        elif name == "_exit_autocast":
            entered = node.args[0] if node.args else None
            if entered in idle:
                idle.add(node)
            elif entered in active:
                active.remove(entered)  # type: ignore[arg-type]
    return idle


class Order:
    """Positions of the nodes of a graph, computed once.

    Args:
        graph: the graph.
        inner: another graph calls it, which may have turned autocast on.
        writes: whether nodes write to something, as earlier orders of the same graph have found; added to.
    """

    def __init__(self, graph: Graph, inner: bool = False, writes: dict[Node, bool] | None = None) -> None:
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        known = {} if writes is None else writes
        for node in self.nodes:
            if node not in known:
                known[node] = bool(mutated(node))
        self.writers = [node for node in self.nodes if known[node]]
        idle = set[Node]() if inner else _idle_autocasts(self.nodes)
        self.switches = [node for node in self.nodes if switches_mode(node) and node not in idle]
        self._storages: dict[Node, set[StorageWeakRef]] = {}

    def _aliases(self, nodes: Iterable[Node]) -> set[StorageWeakRef]:
        for node in nodes:
            if node not in self._storages:
                self._storages[node] = storages(node)
        return set().union(*(self._storages[node] for node in nodes))

    def same_value(self, a: object, b: object) -> bool:
        """Whether two nodes have the same value: the same node, or the same operators on the same values.

        Random operators never have, nor what reads something that is written to.
        """
        read: list[Node] = []
        if a is b:
            return True
        if not (isinstance(a, Node) and isinstance(b, Node) and _same(a, b, 8, read)):
            return False
        try:
            self.check_unwritten(read, max(self.index[a], self.index[b]))
        except Miss:
            return False
        return True

    def between(self, nodes: Iterable[Node], first: int, last: int) -> list[Node]:
        """Those of `nodes` that stand strictly between two positions."""
        return [node for node in nodes if first < self.index[node] < last]

    def check_movable(
        self, region: Collection[Node], inputs: Collection[Node], at: int, across_autocast: bool = False
    ) -> None:
        """Raises Miss unless `region`, reading `inputs`, computes the same just before position `at` as where it is.

        With `across_autocast`, autocast may change in between: what replaces the region computes in types of its own.

        Raises:
            Miss: for a mutation of an input or an intermediate in between, or a change of mode.
        """
        positions = [self.index[node] for node in region]
        first, last = min(positions), max(at, *positions)
        for node in self.between(self.switches, first, last):
            if across_autocast and node.target.__name__.endswith("_autocast"):  # type: ignore[union-attr]
                continue
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


def _same(a: object, b: object, depth: int, read: list[Node]) -> bool:
    """Whether two arguments are structurally equal; the nodes compared are added to `read`."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, depth, read) for x, y in zip(a, b, strict=True))
    if not (isinstance(a, Node) and isinstance(b, Node)):
        return type(a) is type(b) and a == b
    read += [a, b]
    if a is b:
        return True
    call = call_of(a)
    if depth == 0 or call is None or call.inplace or call.op in ("dropout", "empty_like"):
        return False
    first, second = ((n.args, tuple(sorted(n.kwargs.items()))) for n in (a, b))
    return a.op == b.op and a.target == b.target and _same(first, second, depth - 1, read)
