"""`x.type_as(y)` as `x.to(dtype)`: the cast reads no value of y, and must not seem to be computed of it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from torch_fuse._compat import is_traceable_wrapper_subclass
from torch_fuse.graph.values import tensor


def free_casts(gm: GraphModule) -> int:
    """Respells the casts of a Dynamo graph in place, where both tensors are plain and on one device.

    Returns:
        The number of casts.
    """
    found = [node for node in gm.graph.nodes if _is_type_as(node)]
    for node in found:
        with gm.graph.inserting_before(node):
            new = gm.graph.call_method("to", (node.args[0], tensor(node).dtype))  # type: ignore[union-attr]
        new.meta = dict(node.meta)  # its value is known: inside of vmap none can be computed
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return len(found)


def _is_type_as(node: Node) -> bool:
    if node.op != "call_method" or node.target != "type_as" or len(node.args) != 2 or node.kwargs:
        return False
    source, other = (tensor(arg) for arg in node.args)
    if source is None or other is None or tensor(node) is None:
        return False
    plain = not is_traceable_wrapper_subclass(source) and not is_traceable_wrapper_subclass(other)
    return plain and source.device == other.device and source.layout == other.layout
