"""A graph module and its child graphs: which of them may be rewritten, and copies to go back to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from torch_fuse.graph.effects import transforms

# Child graphs whose bodies are differentiated and compiled like the outer graph.
_OPEN_REGIONS = {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "cond", "invoke_subgraph"}


def copy_of(module: GraphModule) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, copies, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta = dict(output[1].meta)
    for node, copied in copies.items():
        for name in node.__dict__.keys() - copied.__dict__.keys():  # Dynamo keeps inputs' sources on the nodes
            setattr(copied, name, getattr(node, name))
    backup = GraphModule(module, graph)
    backup.meta = module.meta
    return backup


def assembled(backups: list[tuple[GraphModule, GraphModule]]) -> GraphModule:
    """The copy of the outer module, with the copies of its child graphs in their places."""
    copies = dict(backups)
    for _, backup in backups:
        for name, child in list(backup.named_modules()):
            if name and child in copies:
                backup.set_submodule(name, copies[child])
    return backups[0][1]


def with_children(gm: GraphModule, refusal: str = "") -> Iterator[tuple[GraphModule, str]]:
    """A graph module and its child graphs, each with the reason why it may not be rewritten, or ""."""
    yield gm, refusal
    transformed = transforms(gm.graph.nodes)
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        child = getattr(gm, str(node.target), None)
        if not isinstance(child, GraphModule):
            continue
        names = {
            user.target.name() if isinstance(user.target, torch._ops.HigherOrderOperator) else "?"
            for user in node.users
        }
        closed = sorted(names - _OPEN_REGIONS)
        own = f"inside {closed[0]}, whose body is fixed" if closed else ""
        inside = next((transformed[user] for user in node.users if user in transformed), "")
        yield from with_children(child, refusal or own or (inside_transform(inside) if inside else ""))


def inside_transform(name: str) -> str:
    return f"inside {name}, for which fused ops have no rule"
