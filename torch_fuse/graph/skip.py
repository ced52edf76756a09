"""Recogniser: a linear layer's result combined with a skip, a * x + b * (y @ W.T + bias), from the sum on.

The coefficients are numbers and tensors that broadcast: of a sample, a token, a channel, or of each element.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from torch_fuse.graph.calls import call_of
from torch_fuse.graph.linear import Linear
from torch_fuse.graph.miss import Kept, Miss
from torch_fuse.graph.modulate import broadcasts, only_cast, sole_user
from torch_fuse.graph.residual import Weighted, factors_of, match_residual
from torch_fuse.graph.skip_sides import Coefficient, Side, lerp_end, scale_of, summand_of
from torch_fuse.graph.values import equal, tensor

Mode = Literal["sum", "lerp", "lerp_back", "step", "step_back"]

# Products and casts between a difference and the sum that it is a step of.
_MOST_BETWEEN = 4


@dataclass(frozen=True)
class Skip:
    """A combination of x and a linear layer's result.

    Attributes:
        node: the result, after scales and casts that follow the sum.
        linear: the layer.
        x: the skip, of the result's shape.
        a: coefficient of x; 1 but for "sum".
        b: coefficient of the layer's result; the weight of a lerp or step.
        mode: "sum", "lerp" from x to the layer's result, "lerp_back" from that to x; "step" and "step_back" are lerps
            written out, x + b * (layer - x).
        nodes: all nodes whose work is taken over, the layer among them.
    """

    node: Node
    linear: Linear
    x: Node
    a: Coefficient
    b: Coefficient
    mode: Mode
    nodes: frozenset[Node]


def match_skip(total: Node, projected: Collection[Node]) -> Skip | None:
    """Recognises the combination whose sum is `total`; None where it is another sum, or a plain one.

    Args:
        total: a sum, or a lerp.
        projected: the values that may be combined with a skip.

    Raises:
        Miss: when it is such a combination, but not one that can be computed as one.
    """
    call = call_of(total)
    if call is None or call.inplace or (shape := tensor(total)) is None:
        return None
    mode: Mode = "sum"
    if call.op == "lerp":
        found = _lerp(total, call["input"], call["end"], call["weight"], projected)
        if found is None:
            return None
        first, second, weight, mode = found
        a, b, nodes = Coefficient(), weight, {total}
    else:
        residual = match_residual(total)
        if residual is None or len(residual.terms) != 2:
            return None
        sides = [summand_of(factors_of(term), total, projected) for term in residual.terms]
        if sides[0] is None or sides[1] is None:
            if not any(reads_projected(term, projected) for term in residual.terms):
                return None
            raise Miss("a coefficient is neither a number nor a tensor that broadcasts", total)
        if sides[1].linear is None:
            sides.reverse()
        first, second = sides[0], sides[1]
        a, b, nodes = first.coefficient, second.coefficient, set(residual.nodes)
    node, scale, behind = _behind(total)
    if mode == "sum" and (stepped := _step(total, first, second)) is not None:
        total, b, mode, between = stepped
        a, nodes = Coefficient(), nodes | between
        node, scale, behind = _behind(total)
    if mode == "sum":
        a, b = a.times(scale), b.times(scale)
        if a.is_one and b.is_one:
            return None
    if second.linear is None:
        value = next((side.node for side in (first, second) if side.node in projected), None)
        if value is None:
            return None
        reason = f"{value.name} is no result of a linear layer that nothing else reads"
        raise Kept(f"{reason}: Inductor fuses the sum into one kernel", value)
    if mode != "sum" and not scale.is_one:
        raise Miss("the interpolation is scaled", total, 1)
    if shape.dim() not in (2, 3):
        raise Miss(f"it has {shape.dim()} dimensions; allowed: 2 and 3", total, 1)
    nodes |= {*behind, *first.nodes, *second.nodes} - {first.node}
    skip = Skip(node, second.linear, first.node, a, b, mode, _closed(nodes, second.linear, node))
    _check(skip, total)
    return skip


def reads_projected(term: Weighted, projected: Collection[Node]) -> bool:
    """Whether a summand is a projected value, times something."""
    factors = factors_of(term)
    leaves = () if factors is None else factors.leaves
    return term.tensor in projected or any(leaf in projected for leaf, _ in leaves)


def _lerp(total: Node, start: Any, end: Any, weight: Any,
          projected: Collection[Node]) -> tuple[Side, Side, Coefficient, Mode] | None:  # fmt: skip
    """The sides of lerp(start, end, weight), the linear layer second."""
    factor = Coefficient(float(weight)) if isinstance(weight, (int, float)) else Coefficient(1.0, ((weight, False),))
    if factor.factors and not broadcasts(weight, total):
        return None
    sides = [lerp_end(node, total, projected) for node in (start, end)]
    if sides[1].linear is not None:
        return sides[0], sides[1], factor, "lerp"
    return sides[1], sides[0], factor, "lerp_back"


def _step(total: Node, first: Side, second: Side) -> tuple[Node, Coefficient, Mode, set[Node]] | None:
    """The sum start + weight * (end - start) around a difference of the two sides, with its weight, mode and nodes."""
    numbers = (first.coefficient.number, second.coefficient.number)
    if first.coefficient.factors or second.coefficient.factors or numbers not in ((-1.0, 1.0), (1.0, -1.0)):
        return None
    node, residual = sole_user(total), None
    for _ in range(_MOST_BETWEEN):
        residual = None if node is None else match_residual(node)
        if node is None or residual is not None:
            break
        node = sole_user(node)
    if node is None or residual is None or len(residual.terms) != 2:
        return None
    for start, step in (residual.terms, residual.terms[::-1]):
        factors = factors_of(step)
        if start.factors or start.sign != 1 or factors is None or (total, False) not in factors.leaves:
            continue
        rest = tuple(leaf for leaf in factors.leaves if leaf != (total, False))
        forward = start.tensor is first.node
        if not (forward or start.tensor is second.node) or not all(broadcasts(leaf, node) for leaf, _ in rest):
            continue
        # the difference is end - start where the start's number is -1
        sign = -numbers[0] if forward else -numbers[1]
        weight = Coefficient(factors.number * sign, rest)
        return node, weight, "step" if forward else "step_back", {*residual.nodes, *factors.nodes, node}
    return None


def _behind(total: Node) -> tuple[Node, Coefficient, set[Node]]:
    """What follows a sum and can go into its coefficients: rounding casts, factors and divisors.

    A factor on both summands is rounded more often than one on the sum: that does not show where the result is rounded
    to 16 bits; in fp32 it does, and only powers of two are taken.
    """
    node, scale, nodes = total, Coefficient(), {total}
    exact = node, scale, nodes.copy()
    while (user := sole_user(node)) is not None:
        call = call_of(user)
        before, after = tensor(node), tensor(user)
        if call is None or call.inplace or before is None or after is None:
            break
        if only_cast(node) is user and after.dtype.itemsize <= before.dtype.itemsize:
            pass
        elif call.op in ("mul", "div") and (factor := scale_of(call, node, user)) is not None:
            scale = scale.times(factor)
        else:
            break
        node = user
        nodes.add(node)
        if after.dtype.itemsize < 4 or (not scale.factors and abs(math.frexp(scale.number)[0]) == 0.5):
            exact = node, scale, nodes.copy()
    return exact


def _closed(nodes: set[Node], linear: Linear, result: Node) -> frozenset[Node]:
    """The nodes that nothing else reads once the result is replaced.

    Raises:
        Miss: when something else reads a step between the linear layer and the result.
    """
    needed = set(linear.nodes)
    for node in sorted(nodes):
        if needed.intersection(node.all_input_nodes):
            needed.add(node)
    region = set(nodes)
    while outside := {n for n in region - {result} if any(user not in region for user in n.users)}:
        region -= outside
        if left := outside & needed:
            node = min(left)
            reader = next((user for user in node.users if user not in nodes), node)
            raise Miss(f"{reader.name} reads {node.name}, a step of the combination", node, 1)
    return frozenset(region)


def _check(skip: Skip, total: Node) -> None:
    """Raises Miss unless the op computes this combination, with its roundings or fewer."""
    result, x = tensor(skip.node), tensor(skip.x)
    product, y, weight = (tensor(n) for n in (skip.linear.node, skip.linear.input, skip.linear.weight))
    assert result is not None and x is not None and product is not None and y is not None and weight is not None
    if y.dim() < 2 or not equal(product.shape[-1], result.shape[-1]):
        raise Miss(f"the projection {list(product.shape)} is viewed as {list(result.shape)}", skip.linear.node, 1)
    bias = None if skip.linear.bias is None else tensor(skip.linear.bias)
    if any(other is not None and other.dtype != product.dtype for other in (y, weight, bias)):
        raise Miss("the projection computes in another type than its operands' (autocast)", skip.linear.node, 1)
    if bias is not None and (bias.dim() != 1 or not equal(bias.shape[0], product.shape[-1])):
        raise Miss(f"the projection's bias has shape {list(bias.shape)}", skip.linear.node, 1)
    for node in skip.nodes:
        step = tensor(node)
        call = call_of(node)
        if call is not None and call.inplace:
            raise Miss(f"{node.name} writes in place", node, 1)
        if step is None or not step.dtype.is_floating_point:
            raise Miss(f"{node.name} is no floating-point tensor", node, 1)
        if step.dtype.itemsize < min(t.dtype.itemsize for t in (result, x, product)):
            raise Miss(f"{node.name} rounds to {step.dtype}", node, 1)
        if step.dtype.itemsize > 4 and result.dtype.itemsize <= 4:
            raise Miss("it is computed in float64 from lower precision", node, 1)
    if any(not t.dtype.is_floating_point or t.dtype.itemsize < 2 for t in (x, y, result)):
        raise Miss(f"{skip.x.name} is {x.dtype}, the projection's input {y.dtype}", total, 1)
    if any(t.device != result.device for t in (x, y, weight)):
        raise Miss("its operands are on several devices", total, 1)
