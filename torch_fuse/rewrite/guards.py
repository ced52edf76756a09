"""Spellings that Inductor itself compiles wrongly, respelled before it sees them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from torch_fuse._compat import fake_mode_of
from torch_fuse.graph.calls import call_of
from torch_fuse.graph.values import same_shape, value
from torch_fuse.rewrite.builder import Builder

# pytorch/pytorch#195320: Inductor took permute(0, 2, 3, 1) of a key for permute(0, 2, 1, 3) in written-out attention.
PERMUTED_KEY_FIXED_IN = (2, 15)


def respell(gm: GraphModule, version: tuple[int, ...] | None = None) -> int:
    """Rewrites what this version of Inductor miscompiles; returns the number of changes.

    Args:
        gm: a Dynamo graph, changed in place.
        version: of torch, to decide what applies; None for the installed one.
    """
    if version is None:
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if version >= PERMUTED_KEY_FIXED_IN:
        return 0
    found = [node for node in gm.graph.nodes if _is_permuted_key(node)]
    mode = fake_mode_of(gm) if found else None
    for node in found:
        builder = Builder(gm, node, mode, node)
        new = builder.call("transpose", builder.call("permute", node.args[0], (0, 2, 1, 3)), -1, -2)
        assert same_shape(value(node).shape, value(new).shape)
        new.meta["example_value"] = value(node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return len(found)


def _is_permuted_key(node: Node) -> bool:
    call = call_of(node)
    if call is None or call.op != "permute" or [d % 4 for d in call["dims"]] != [0, 2, 3, 1]:
        return False
    users = [call_of(user) for user in node.users]
    return any(user is not None and user.op == "matmul" and user["other"] is node for user in users)
