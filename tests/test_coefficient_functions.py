"""Coefficients that are functions of one tensor: what is recognised, what is not and why, and what they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from test_attention_skip import OPTIONS, PATTERN
from torch import Tensor, nn

from torch_fuse.graph import pointwise
from torch_fuse.kernels import _hopper_gemm, _hopper_pointwise, _pointwise

EDM = ("rdiv:0.25 add:0.25 square x", "div mul:0.5 x sqrt add:0.25 square x")


class Block(nn.Module):
    """An attention and its projection, combined as `coefficients(t)` says."""

    def __init__(self, coefficients: Callable[[Tensor], tuple[Any, Any]], width: int = 16) -> None:
        super().__init__()
        self.qkv, self.proj, self.coefficients = nn.Linear(width, 3 * width), nn.Linear(width, width), coefficients

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        a, b = self.coefficients(t)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return (a * x + b * y).to(x.dtype)


def per_sample(t: Tensor) -> Tensor:
    return t[:, None, None]


def edm(t: Tensor) -> tuple[Tensor, Tensor]:
    return per_sample(0.5**2 / (t**2 + 0.5**2)), per_sample(0.5 * t / (t**2 + 0.5**2) ** 0.5)


def edm_of_viewed(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.float().view(-1, 1).unsqueeze(-1)
    return 0.25 / (t.pow(2) + 0.25), t.mul(0.5) / torch.sqrt(0.25 + t.square())


def trigflow(t: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cos(t) + torch.sin(t)
    return per_sample(1 / both), per_sample(-torch.sin(t) / both)


def gates(t: Tensor) -> tuple[Tensor, Tensor]:
    return per_sample(1 - torch.sigmoid(t)), per_sample(torch.tanh(t)) * torch.exp(-t).reshape(-1, 1, 1)


def written(t: Tensor) -> tuple[Tensor, Tensor]:
    found = edm(t)
    t.mul_(2)
    return found


def detached(t: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return edm(t)


def rounded(t: Tensor) -> tuple[Tensor, Tensor]:
    a, b = edm(t)
    return a.bfloat16(), b.bfloat16()


def of_other_samples(t: Tensor) -> tuple[Tensor, Tensor]:
    a, b = edm(t)
    return a.flip(0), b[torch.arange(t.shape[0] - 1, -1, -1)]


def of_two(t: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples and of tokens, of which there are as many."""
    return per_sample(t.exp()) * t.exp()[None, :, None], per_sample(t.exp() + t.exp().flip(0))


def computed(t: Tensor) -> tuple[Tensor, Tensor]:
    return edm(torch.erf(t))


def functions_of(model: nn.Module, *inputs: Tensor) -> tuple[str, str]:
    """Those of the only call of the op."""
    rewriter = Rewriter(OPTIONS)
    rewritten(model, rewriter)(*inputs)
    calls = [node for graph in rewriter.graphs for node in graph.graph.nodes if node.op == "call_function"]
    (op,) = [node for node in calls if "linear_skip" in getattr(node.target, "__module__", "")]
    return op.args[11:13]


CASES: dict[str, tuple[Any, tuple[str, str]]] = {
    "edm": (edm, EDM),
    "edm of viewed": (edm_of_viewed, ("rdiv:0.25 add:0.25 square x", EDM[1])),
    "trigflow": (trigflow, ("rdiv:1.0 add cos x sin x", "div neg sin x add cos x sin x")),
    "gates": (gates, ("rsub:1.0 sigmoid x", "mul tanh x exp neg x")),
    "written": (written, ("x", "x")),
    "detached": (detached, ("x", "x")),
    "rounded": (rounded, ("x", "x")),
    "of other samples": (of_other_samples, ("x", "x")),
    "of two": (of_two, ("x", "x")),
    "computed": (computed, ("x", "x")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_coefficient_becomes_a_function_of_what_lies_in_memory(name: str) -> None:
    """And gives the unfused graph's result and gradients, in the same places."""
    coefficients, functions = CASES[name]
    torch.manual_seed(0)
    model = Block(coefficients)
    x, t = torch.randn(3, 3, 16), torch.rand(3) + 0.5
    assert functions_of(model, x, t.clone().requires_grad_(name != "written")) == functions
    given = [x.requires_grad_(), t] if name != "written" else [x, t]
    for dynamic in (False, True):
        result = compare(model, given, grad=name != "written", options=OPTIONS, dynamic=dynamic, draws=2)
        assert result.fused(PATTERN) == 1 and not result.problems, result.problems


def test_a_time_of_zero_still_gives_x_bit_for_bit() -> None:
    t = torch.tensor([0.0, 3.0])
    assert _pointwise.evaluate(EDM[0], t)[0] == 1 and _pointwise.evaluate(EDM[1], t)[0] == 0


@pytest.mark.parametrize("bound", ["one leaf", "tokens", "in memory"])
def test_what_bounds_a_function(bound: str) -> None:
    def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
        if bound == "one leaf":
            return per_sample(t[:1] + t.flip(0)), per_sample(t)
        if bound == "tokens":
            for _ in range(6):
                t = t * t + t
            return per_sample(t), per_sample(t)
        return per_sample(torch.erf(t).exp()), per_sample(t)

    assert functions_of(Block(coefficients), torch.randn(3, 5, 16), torch.rand(3)) == ("x", "x")


@pytest.mark.parametrize("name", [*_pointwise.UNARY, "add:0.5", "mul:-2.0", "rsub:1.0", "rdiv:0.25"])
def test_one_operand_and_its_slope(name: str) -> None:
    x = (torch.rand(7, dtype=torch.float64) + 0.5).requires_grad_()
    op, _, number = name.partition(":")
    c = float(number or 0)
    plain: dict[str, Callable[[Tensor], Tensor]] = {
        "add": lambda y: y + c, "mul": lambda y: y * c, "rsub": lambda y: c - y, "rdiv": lambda y: c / y,
    }  # fmt: skip
    function = plain.get(op) or getattr(torch, op)
    assert_function(f"{name} x", x, function(x))
    assert_function(f"{name} square x", x, function(x * x))


@pytest.mark.parametrize("name", _pointwise.BINARY)
def test_two_operands_and_their_slope(name: str) -> None:
    x = (torch.rand(7, dtype=torch.float64) + 0.5).requires_grad_()
    assert_function(f"{name} square x exp x", x, getattr(torch, name)(x * x, x.exp()))
    assert_function(f"{name} exp x {name} x square x", x, getattr(torch, name)(x.exp(), getattr(torch, name)(x, x * x)))


def assert_function(program: str, x: Tensor, wanted: Tensor) -> None:
    assert _pointwise.problem(program) is None
    torch.testing.assert_close(_pointwise.evaluate(program, x), wanted)
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(_pointwise.slope(program, x.detach()), slope)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("", "''; allowed"), ("y", "'y'; allowed"), ("neg", "1 operands fewer"), ("add x", "1 operands fewer"),
        ("x x", "'x' after its end"), ("add:inf x", "a finite number"), ("neg:1 x", "a finite number"),
        ("add:c x", "a finite number"), (" ".join(["neg"] * 48 + ["x"]), "49 tokens; allowed: 48"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_function_is_refused_with_the_reason(program: str, words: str) -> None:
    assert words in str(_pointwise.problem(program))


def test_engine_and_kernels_read_the_same_language() -> None:
    assert pointwise.MOST_TOKENS == _pointwise.MOST_TOKENS and pointwise.IDENTITY == _pointwise.IDENTITY
    assert set(pointwise._UNARY) | set(pointwise._POWERS.values()) == set(_pointwise.UNARY)
    assert set(pointwise._BINARY.values()) == set(_pointwise.BINARY)


@pytest.mark.skipif(bool(_hopper_gemm.MISSING), reason="needs Gluon")
@pytest.mark.parametrize("program", [*EDM, "div neg sin x add cos x sin x", "sub add:-1e-05 x mul x rdiv:2.0 x", "x"])
def test_the_kernel_takes_a_text_apart_where_its_operands_end(program: str) -> None:
    root, number = _hopper_pointwise._root(program), _hopper_pointwise._number(program)
    operands = [_hopper_pointwise._operand(program, i) for i in (0, 1)]
    first = root if number is None else f"{root}:{number!r}"
    assert " ".join([first, *filter(None, operands)]) == program
    assert all(_pointwise.problem(operand) is None for operand in operands if operand)
    assert bool(operands[1]) == (root in _pointwise.BINARY and number is None)
