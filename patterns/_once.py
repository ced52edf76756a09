"""A value that all layers of a model share, computed once."""

from torch.fx import Node

from torch_fuse._compat import op_overload
from torch_fuse.graph import memory
from torch_fuse.graph.values import tensor
from torch_fuse.kernels import in_memory
from torch_fuse.rewrite.builder import Builder


def once(node: Node, builder: Builder) -> Node:
    """`node`, kept in memory for all ops of ours that read it; as it is when it is there anyway or needs a gradient."""
    found = tensor(node)
    if found is None or found.requires_grad or memory.in_memory(node):
        return node
    return builder.shared(op_overload(in_memory.in_memory), node)
