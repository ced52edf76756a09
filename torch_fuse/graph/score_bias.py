"""Recogniser: what is added to attention scores: nothing or a number that excludes (a mask), or moderate numbers.

What a mask keeps is `torch_fuse.graph.mask`; here is what holds of masks and biases that depend on data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.effects import Order
from torch_fuse.graph.fold import fold_constant
from torch_fuse.graph.values import tensor, value

# Numbers up to here are added to float32 scores with an absolute error below 0.01.
MODERATE = 1e5
# From here down, a number takes its key out of the softmax whatever the scores are.
EXCLUDING = -1e30

_VIEWS = {
    "cast", "contiguous", "clone", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "numpy_T",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "repeat_interleave", "getitem", "select", "narrow",
}  # fmt: skip
_LAYERS = {"linear", "layer_norm", "rms_norm", "sigmoid", "tanh", "cos", "sin", "softmax"}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "neg", "where", "masked_fill", "cat", "stack", "relu", "tril", "triu"}


def constant(node: Any) -> float | None:
    """The one number that all elements of a tensor, or a Python number, are known to have; else None."""
    if isinstance(node, (bool, int, float)):
        return float(node)
    if not isinstance(node, Node) or tensor(node) is None:
        return None
    if node.op == "call_function" and node.target in (torch.tensor, torch.scalar_tensor):
        return float(node.args[0]) if isinstance(node.args[0], (bool, int, float)) else None
    call = call_of(node)
    if call is None or call.inplace:
        return None
    if call.op in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if call.op in ("ones", "ones_like", "new_ones"):
        return 1.0
    found: float | None = None
    if call.op in ("full", "full_like", "new_full"):
        found = constant(call["fill_value"])
    elif call.op in _VIEWS:
        found = constant(call["input"])
    return None if found is None else _in_dtype(found, node)


def excluded_value(node: Node) -> float | None:
    """x when every element of the tensor is 0 or x, with x below zero; None when that is not known."""
    if not isinstance(node, Node) or tensor(node) is None:
        return None
    call = call_of(node)
    if call is None or call.inplace:
        return None
    if call.op in _VIEWS:
        found = excluded_value(call["input"])
        return None if found is None else _in_dtype(found, node)
    values: set[float | None] = set()
    if call.op == "where":
        values = _possible(call["input"]) | _possible(call["other"])
    elif call.op == "masked_fill":
        values = _possible(call["input"]) | _possible(call["value"])
    elif call.op == "mul":
        for a, b in ((call["input"], call["other"]), (call["other"], call["input"])):
            factor = constant(b)
            if factor is not None and factor < 0 and abs(factor) != float("inf") and _is_zero_or_one(a):
                values = {0.0, factor}
    if None in values or len(values - {0.0}) != 1:
        return None
    (low,) = values - {0.0}
    assert low is not None
    return _in_dtype(low, node) if low < 0 else None


def _possible(item: Any) -> set[float | None]:
    number = constant(item)
    if number is not None:
        return {number}
    low = excluded_value(item) if isinstance(item, Node) else None
    return {None} if low is None else {0.0, low}


def _is_zero_or_one(node: Any) -> bool:
    found, call = tensor(node), call_of(node)
    if found is None:
        return False
    if found.dtype == torch.bool:
        return True
    if call is None or call.inplace:
        return False
    if call.op in _VIEWS:
        return _is_zero_or_one(call["input"])
    if call.op in ("sub", "rsub") and call["alpha"] == 1:
        return constant(call["input"]) == 1 and _is_zero_or_one(call["other"])
    return False


def _in_dtype(number: float, node: Node) -> float:
    found = tensor(node)
    assert found is not None
    if found.dtype == torch.bool:
        return float(bool(number))
    if not found.dtype.is_floating_point:
        return number
    return float(torch.tensor(number, dtype=torch.float64).to(found.dtype))


def is_moderate(node: Any, order: Order, before: Node, depth: int = 40) -> bool:
    """Whether a bias is made of moderate numbers only, so that no row of it excludes every key.

    Parameters, what layers compute from data, and integers (positions) are taken to be moderate; a floating-point
    input is not: it may hold -inf. Whether something is written in place: see `read_by_proofs`.
    """
    if isinstance(node, (bool, int, float)):
        return abs(node) <= MODERATE
    found = tensor(node)
    if found is None:
        return isinstance(value(node), torch.SymInt)
    number = constant(node)
    if number is not None:
        return abs(number) <= MODERATE
    call = call_of(node)
    if not found.dtype.is_floating_point and (call is None or call.op not in _VIEWS | _ARITHMETIC):
        return call is None or not call.inplace
    if node.op in ("placeholder", "get_attr"):
        return isinstance(found, torch.nn.Parameter) or found.requires_grad
    if call is None:
        looked_up = node.target is F.embedding and len(node.args) > 1
        return looked_up and is_moderate(node.args[1], order, before, depth - 1)
    if call.inplace or depth == 0:
        return False
    if call.op in _LAYERS:
        return True
    if call.op in _VIEWS:
        return is_moderate(call["input"], order, before, depth - 1)
    if call.op == "div" and abs(constant(call["other"]) or 0.0) >= 1e-3:
        return is_moderate(call["input"], order, before, depth - 1)
    if call.op in _ARITHMETIC:
        return all(is_moderate(x, order, before, depth - 1) for x in _numbers(call))
    folded = fold_constant(node, order, before)
    return folded is not None and bool((folded.abs() <= MODERATE).all())


def read_by_proofs(node: Any) -> set[Node]:
    """All tensors that `constant`, `excluded_value` and `is_moderate` look at: nothing may be written to them."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if not isinstance(current, Node) or tensor(current) is None or current in seen:
            continue
        seen.add(current)
        call = call_of(current)
        if call is not None and call.op in _VIEWS | _ARITHMETIC | {"div", "full", "full_like", "new_full"}:
            pending += _numbers(call)
    return seen


def _numbers(call: Call) -> list[Any]:
    found: list[Any] = []
    for name, argument in call.args.items():
        if name in ("mask", "condition", "dim", "diagonal", "inplace"):
            continue
        found += argument if isinstance(argument, (list, tuple)) else [argument]
    return found
