"""The final norm and the lm_head behind the last layer of a decoding step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from torch_fuse.graph.linear import Linear, match_linear
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.norm import norms_of
from torch_fuse.graph.values import equal, tensor
from torch_fuse.kernels import norm_linear_gemv
from torch_fuse.patterns._decode_layers import Layer, check_unread, is_call, linear_of
from torch_fuse.patterns._decode_views import straight
from torch_fuse.patterns.decode_norm_linear import check_bias

_MOST_VIEWS = 8


@dataclass(frozen=True)
class Head:
    """The final norm and the lm_head.

    Attributes:
        logits: the result, with V elements.
        nodes: all nodes.
        arguments: the norm's weight and bias, the weight [V, K] and the bias of the lm_head.
    """

    logits: Node
    nodes: frozenset[Node]
    arguments: tuple[Node | None, Node | None, Node, Node | None]


def match_head(last: Layer) -> Head:
    """The head behind a layer.

    Raises:
        Miss: with the reason why there is none that the stack computes, or why something needs a value in between.
    """
    calls = [user for user in last.out.users if is_call(user, norm_linear_gemv)]
    head = _replaced(calls[0]) if len(calls) == 1 else _written(last)
    if head[0] != last.geometry[1:4]:
        raise Miss("the final norm differs from the layers' in kind or epsilon", last.out)
    nodes = {last.out, *head[1].nodes}
    check_unread(nodes, head[1].logits)
    return replace(head[1], nodes=frozenset(nodes))


def _replaced(call: Node) -> tuple[tuple[object, ...], Head]:
    """The head as one op, with its norm's constants."""
    if len(call.users) != 1:
        raise Miss(f"{len(call.users)} linear layers are behind the final norm", call)
    (logits,) = call.users
    a, linear = linear_of(logits)
    if len(linear.weights) != 1 or linear.activation != "none":
        raise Miss("the linear layer behind the final norm has a gate or an activation", call)
    head = Head(logits, frozenset({call, logits}), (*linear.norm, linear.weights[0], linear.biases[0]))
    return (a.norm, a.eps, a.weight_offset), head


def _written(last: Layer) -> tuple[tuple[object, ...], Head]:
    """The head in PyTorch's own operators, with views between norm and linear layer that keep the order."""
    norms = norms_of(last.out)
    if len(norms) != 1:
        raise Miss(f"{len(norms)} norms are behind the last layer", last.out)
    norm, node = norms[0], norms[0].node
    for _ in range(_MOST_VIEWS):
        if len(node.users) != 1:
            raise Miss(f"the final norm is read {len(node.users)} times", node)
        (user,) = node.users
        if (linear := match_linear(user)) is not None:
            break
        node = user
    else:
        raise Miss("no linear layer is behind the final norm", norm.node)
    between = straight(node, norm.node)
    if between is None or linear.input is not node:
        raise Miss(f"{linear.node.name} reads other elements than those of the final norm", linear.node)
    vectors = [tensor(x) for x in (norm.weight, norm.bias)]
    if any(x is not None and x.dim() != 1 for x in vectors):
        raise Miss("the final norm's weight has more than one dimension", norm.node)
    _check(linear, last)
    nodes = frozenset({*norm.nodes, *between, *linear.nodes})
    head = Head(linear.node, nodes, (norm.weight, norm.bias, linear.weight, linear.bias))
    return (norm.kind, norm.eps, norm.weight_offset), head


def _check(linear: Linear, last: Layer) -> None:
    """Raises Miss unless the op computes this linear layer."""
    stream, logits, weight = (tensor(x) for x in (last.out, linear.node, linear.weight))
    assert stream is not None and logits is not None and weight is not None
    if logits.requires_grad:
        raise Miss("gradients are wanted of the logits", linear.node)
    if linear.transposed:
        raise Miss("the lm_head's weight is stored with its input dimension first", linear.node)
    if logits.dtype != stream.dtype or weight.dtype != stream.dtype:
        raise Miss("the lm_head and the residual stream differ in dtype", linear.node)
    if not equal(logits.numel(), weight.shape[0]):
        raise Miss("the logits are those of several rows", linear.node)
    check_bias(linear)
