"""Small elementwise functions of one tensor, as text: what becomes of a coefficient before it is multiplied with.

Prefix notation, tokens apart by spaces: `rdiv:1.0 add:1.0 square x` is 1 / (x^2 + 1). `x` is the tensor, the identity.

- One operand: neg, square, sqrt, rsqrt, reciprocal, exp, sigmoid, tanh, cos, sin.
- One operand and a number: add:c (y + c), mul:c (y * c), rsub:c (c - y), rdiv:c (c / y).
- Two operands: add, sub, mul, div.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

IDENTITY = "x"
UNARY = ("neg", "square", "sqrt", "rsqrt", "reciprocal", "exp", "sigmoid", "tanh", "cos", "sin")
WITH_NUMBER = ("add", "mul", "rsub", "rdiv")
BINARY = ("add", "sub", "mul", "div")
MOST_TOKENS = 48


@functools.lru_cache(maxsize=256)
def problem(program: str) -> str | None:
    """Why a text is no function, or None."""
    tokens = program.split(" ")
    if len(tokens) > MOST_TOKENS:
        return f"{len(tokens)} tokens; allowed: {MOST_TOKENS}"
    missing = 1  # operands that are still to come
    for token in tokens:
        name, colon, number = token.partition(":")
        if missing == 0:
            return f"{token!r} after its end"
        if token == IDENTITY:
            missing -= 1
        elif colon:
            if name not in WITH_NUMBER or not _is_number(number):
                return f"{token!r}; allowed: {', '.join(WITH_NUMBER)} with a finite number"
        elif name in BINARY:
            missing += 1
        elif name not in UNARY:
            return f"{token!r}; allowed: {', '.join((IDENTITY, *UNARY, *BINARY))}"
    return f"{missing} operands fewer than it needs" if missing else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def evaluate(program: str, x: Tensor) -> Tensor:
    """The function of a tensor, in its dtype."""
    return _run(program, x, slope=False)[0]


def slope(program: str, x: Tensor) -> Tensor | None:
    """The function's derivative, in the tensor's dtype; None for 1."""
    return None if program == IDENTITY else _run(program, x, slope=True)[1]


def _run(program: str, x: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
    """The value and its derivative (x itself where that is not asked for), token by token from the last one."""
    stack: list[tuple[Tensor, Tensor]] = []
    for token in reversed(program.split(" ")):
        name, colon, number = token.partition(":")
        if token == IDENTITY:
            stack.append((x, torch.ones_like(x) if slope else x))
            continue
        y, dy = stack.pop()
        if colon:
            stack.append(_with_number(name, float(number), y, dy))
        elif name in BINARY:
            stack.append(_binary(name, y, dy, *stack.pop()))
        else:
            stack.append(_unary(name, y, dy))
    return stack[-1]


def _with_number(name: str, c: float, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    if name == "add":
        return y + c, dy
    if name == "mul":
        return y * c, dy * c
    if name == "rsub":
        return c - y, -dy
    return c / y, -c * dy / (y * y)


def _binary(name: str, y: Tensor, dy: Tensor, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    if name == "add":
        return y + z, dy + dz
    if name == "sub":
        return y - z, dy - dz
    if name == "mul":
        return y * z, dy * z + y * dz
    return y / z, (dy - y / z * dz) / z


def _unary(name: str, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    if name == "neg":
        return -y, -dy
    if name == "square":
        return y * y, 2 * y * dy
    if name == "cos":
        return torch.cos(y), -torch.sin(y) * dy
    if name == "sin":
        return torch.sin(y), torch.cos(y) * dy
    found: Tensor = getattr(torch, name)(y)
    derivative = {
        "sqrt": lambda: 0.5 / found, "rsqrt": lambda: -0.5 * found / y, "reciprocal": lambda: -found * found,
        "exp": lambda: found, "sigmoid": lambda: found * (1 - found), "tanh": lambda: 1 - found * found,
    }[name]()  # fmt: skip
    return found, derivative * dy
