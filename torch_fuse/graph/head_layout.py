"""The layout between attention and the rotary embedding: transposes, casts and copies, and what acts on lanes alike."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.norm import match_norm, strip_casts
from torch_fuse.graph.values import equal, same_shape, tensor, value

Axes = tuple[int, int, int, int]


def ends_trace(node: Node) -> bool:
    """Whether a node is a norm; a cast of one is not, for both may be read."""
    return strip_casts(node) is node and match_norm(node) is not None


def undone(node: Node, axes: Axes) -> list[Node]:
    """What `node` makes of rotated values without touching single lanes: the operands that may be such values.

    Scaling, repeating heads, joining and cutting the sequence, and a norm, whose order matters.
    """
    norm = match_norm(node)
    if norm is not None:
        return [norm.input] if _is_4d(norm.input) else []
    call = call_of(node)
    found = tensor(node)
    if call is None or call.inplace or found is None:
        return []
    if call.op in ("mul", "div"):
        sides = [call["input"], call["other"]] if call.op == "mul" else [call["input"]]
        for side in sides:
            other = call["other"] if side is call["input"] else call["input"]
            scale = tensor(other)
            per_lane = scale is not None and scale.dim() > 0 and not equal(scale.shape[-1], 1)
            if axes[3] == 3 and not per_lane and _is_4d(side) and same_shape(tensor(side).shape, found.shape):  # type: ignore[union-attr]
                return [side]
    if call.op == "repeat" and isinstance(call["repeats"], (list, tuple)) and len(call["repeats"]) == 4:
        repeated = [axis for axis, n in enumerate(call["repeats"]) if n != 1]
        return [call["input"]] if repeated == [axes[1]] and _is_4d(call["input"]) else []
    if call.op == "getitem" and isinstance(call["index"], tuple) and len(call["index"]) == 4:
        sliced = [axis for axis, part in enumerate(call["index"]) if part != slice(None)]
        return [call["input"]] if sliced == [axes[2]] and _is_4d(call["input"]) and _is_4d(node) else []
    if call.op == "cat" and isinstance(call["tensors"], (list, tuple)) and isinstance(call["dim"], int):
        return [part for part in call["tensors"] if call["dim"] % 4 == axes[2] and _is_4d(part)]
    return []


def _is_4d(node: object) -> bool:
    found = tensor(node)
    return found is not None and found.dim() == 4


def walk_layout(node: Node, axes: Axes) -> tuple[list[tuple[Node, Axes]], Axes]:
    """The nodes from `node` back over transposes, casts and copies, each with its axes of (b, h, s, d)."""
    chain = [(node, axes)]
    while not ends_trace(node):
        call = call_of(node)
        step = None if call is None or call.inplace else _layout_step(call, node, axes)
        if step is None:
            break
        node, axes = step
        chain.append((node, axes))
    return chain, axes


def _layout_step(call: Call, node: Node, axes: Axes) -> tuple[Node, Axes] | None:
    source = call.args.get("input")
    found = tensor(source)
    if found is None or found.dim() != 4 or not isinstance(source, Node):
        return None
    if call.op == "transpose":
        swap = {call["dim0"] % 4: call["dim1"] % 4, call["dim1"] % 4: call["dim0"] % 4}
        return source, _axes(swap.get(a, a) for a in axes)
    if call.op == "permute":
        return source, _axes(call["dims"][a] % 4 for a in axes)
    if call.op in ("contiguous", "clone"):
        return source, axes
    if call.op == "cast":
        return (source, axes) if strip_casts(node) is not node else None
    if call.op in ("view", "reshape", "expand") and same_shape(value(source).shape, value(node).shape):
        return source, axes
    return None


def _axes(values: Iterable[int]) -> Axes:
    a, b, c, d = values
    return a, b, c, d


def replaceable(chain: list[tuple[Node, Axes]], inside: set[Node]) -> int:
    """Where in the chain to replace: the node nearest to attention below which nobody else reads.

    The stores that fill a value are among `inside` and do not count as readers.
    """
    at = len(chain) - 1
    while at > 0 and len(set(chain[at][0].users) - inside) <= 1:
        at -= 1
    return at
