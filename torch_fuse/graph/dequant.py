"""Recogniser: the product of a linear layer whose weight is computed in the graph, and a scale behind it.

What computes the weight is found by `closure`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.linear import transposed_source
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import static_int, tensor


@dataclass(frozen=True)
class Product:
    """x @ weight.T, of which the weight is computed.

    Attributes:
        node: the product.
        input: x [..., K].
        weight: [N, K], or [K, N] when `transposed`.
        bias: what the product itself adds, or None.
        shape: (N, K).
        nodes: the product and, where there is one, the transposition between it and the weight.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    shape: tuple[int, int]
    nodes: frozenset[Node]


def match_product(node: Node) -> Product | None:
    """Recognises a product with a computed matrix, as `linear`, `matmul`, `addmm`; None for anything else."""
    call = call_of(node)
    if call is None or call.inplace:
        return None
    if call.op == "linear":
        x, weight, bias, transposed = call["input"], call["weight"], call["bias"], False
    elif call.op == "matmul":
        x, weight, bias, transposed = call["input"], call["other"], None, True
    elif call.op == "addmm" and call["beta"] == 1 and call["alpha"] == 1:
        x, weight, bias, transposed = call["mat1"], call["mat2"], call["input"], True
    else:
        return None
    source, nodes = transposed_source(weight) if transposed else None, frozenset({node})
    if source is not None:
        weight, transposed, nodes = source, False, nodes | {weight}
    matrix = tensor(weight)
    if matrix is None or tensor(x) is None or matrix.dim() != 2 or (bias is not None and tensor(bias) is None):
        return None
    n, k = (static_int(size) for size in (reversed(matrix.shape) if transposed else matrix.shape))
    if n is None or k is None or n * k == 0:
        return None
    return Product(node, x, weight, bias, transposed, (n, k), nodes)


@dataclass(frozen=True)
class OutputScale:
    """A multiplication of a product's columns by scales, in place of the weight's rows.

    Attributes:
        node: the scaled product in x's dtype.
        scale: [N], or one number, with any dimensions of one in front.
        nodes: the multiplication and, where there is one, the cast after it.
    """

    node: Node
    scale: Node
    nodes: frozenset[Node]


def match_output_scale(product: Product) -> OutputScale | None:
    """The scales that a product without bias is multiplied by; None when nothing else is done with it.

    Raises:
        Miss: when it is used in any other way.
    """
    users = list(product.node.users)
    call = call_of(users[0]) if len(users) == 1 else None
    result, x = tensor(product.node), tensor(product.input)
    if call is None or call.op != "mul" or call.inplace or result is None or x is None:
        return None
    scale = call["other"] if call["input"] is product.node else call["input"]
    found, scaled, end = tensor(scale), tensor(users[0]), users[0]
    if found is None or scaled is None or scale is product.node:
        return None
    if found.dim() > result.dim() or any(static_int(size) != 1 for size in found.shape[:-1]):
        raise Miss("the product is multiplied by what differs from row to row", users[0])
    if static_int(found.shape[-1] if found.dim() else 1) not in (1, product.shape[0]):
        raise Miss(f"the product's columns are multiplied by {list(found.shape)}", users[0])
    if scaled.dtype != x.dtype:
        cast = list(end.users)
        last = call_of(cast[0]) if len(cast) == 1 else None
        after = tensor(cast[0]) if last is not None and last.op == "cast" else None
        if after is None or after.dtype != x.dtype or after.device != x.device or last["input"] is not end:  # type: ignore[index]
            raise Miss(f"the product is scaled in {scaled.dtype} and stays so", end)
        end = cast[0]
    return OutputScale(end, scale, frozenset({users[0], end}))
