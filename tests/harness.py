"""Runs a model rewritten but not compiled by Inductor, and compares it with the model as it is and with float64.

Inductor takes seconds for the smallest model; Dynamo and the rewriter take a fraction of one. What Inductor does with
the rewritten graph is tested where a test says `backend="fuse"`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numerics import difference_of_kind, error_beyond_rule
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_fuse import Options, Report
from torch_fuse.report import GraphReport
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

Model = Callable[..., Any]
Executor = Literal["eager", "aot_eager"]

REFERENCE = Options(kernels="reference", on_error="raise")


class Rewriter:
    """A Dynamo backend that rewrites each graph and runs it without Inductor.

    Attributes:
        report: what became of every candidate of the graphs seen so far.
        graphs: the rewritten graphs.
    """

    def __init__(self, options: Options = REFERENCE, executor: Executor = "eager") -> None:
        self.options = options
        self.executor = executor
        self.report = Report()
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        outcome = rewrite(gm, self.options, patterns())
        self.report.graphs.append(outcome.report)
        self.graphs.append(outcome.gm)
        if self.executor == "aot_eager":
            return aot_eager(outcome.gm, example_inputs)
        return outcome.gm.forward

    @property
    def statuses(self) -> set[tuple[str, str]]:
        """All (pattern, status) that occur."""
        return {(site.pattern, site.status) for site in self.report.sites}


def rewritten(model: Model, rewriter: Rewriter, **compile_options: Any) -> Model:
    """`model`, compiled with a `Rewriter` from a fresh start."""
    torch._dynamo.reset()
    return torch.compile(model, backend=rewriter, **compile_options)


class ExactMath(TorchDispatchMode):
    """Computes in float64 whatever a model asks for: floating-point casts and `dtype=` change nothing.

    A cast to one byte stays: it quantises on purpose.
    """

    def __enter__(self) -> ExactMath:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@dataclass
class Results:
    """What a call of a model leaves behind: outputs, inputs as they are then, gradients."""

    names: list[str] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        self.names.append(name)
        self.tensors.append(value.detach() if isinstance(value, Tensor) else value)


def to_float64(value: Any) -> Any:
    """Floating-point tensors in a value as float64, as leaves that need gradients where they did."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().double() if x.dtype.is_floating_point else x

    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    converted = tree_map(convert, value)
    for old, new in zip(tree_leaves(value), tree_leaves(converted), strict=True):
        if isinstance(old, Tensor) and old.requires_grad:
            new.requires_grad_()
    return converted


def fresh_inputs(inputs: Any) -> Any:
    """Copies of inputs, with their strides, that need gradients where these do."""

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.detach().untyped_storage().clone()
        new = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())
        return new.requires_grad_(x.requires_grad)

    return tree_map(fresh, inputs)


def call(
    model: Model, inputs: Sequence[Any], kwargs: dict[str, Any] | None = None, *, owner: Model | None = None,
    grad: bool = True, seed: int = 0,
) -> Results:  # fmt: skip
    """Runs a model forward and, unless `grad` is off, backward.

    Args:
        model: what to call.
        inputs: its inputs; copied first.
        kwargs: its keyword arguments.
        owner: the module whose parameters' gradients are wanted, when `model` is compiled from it.
        grad: run backward from a fixed random cotangent.
        seed: of the random numbers that the model may draw.
    """
    results = Results()
    inputs, kwargs = fresh_inputs(tuple(inputs)), fresh_inputs(dict(kwargs or {}))
    module = owner if isinstance(owner, nn.Module) else model if isinstance(model, nn.Module) else None
    if module is not None:
        module.zero_grad()
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        # Leaves must not be written in place by the model, so it gets views of them that it may write to.
        given = tree_map(lambda x: x.view_as(x) if isinstance(x, Tensor) and x.requires_grad and grad else x, inputs)
        outputs = tree_leaves(model(*given, **kwargs))
    for i, output in enumerate(outputs):
        results.add(f"output {i}", output)
    for i, x in enumerate(tree_leaves(given)):
        results.add(f"input {i} afterwards", x)
    if grad:
        _backward(outputs)
        leaves = [(f"input {i}", x) for i, x in enumerate(tree_leaves((inputs, kwargs))) if isinstance(x, Tensor)]
        leaves += list(module.named_parameters()) if module is not None else []
        for name, leaf in leaves:
            if leaf.requires_grad:
                results.add(f"gradient of {name}", leaf.grad)
    return results


def _backward(outputs: Sequence[Any]) -> None:
    roots = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    cotangents = []
    for i, root in enumerate(roots):
        generator = torch.Generator().manual_seed(100 + i)
        # One bfloat16 value in every dtype, so that the float64 run starts from the same numbers.
        values = torch.randn(root.shape, generator=generator).bfloat16()
        cotangents.append(values.to(root.dtype).to(root.device))
    if roots:
        torch.autograd.backward(roots, cotangents)


@dataclass
class Comparison:
    """A rewritten model next to the model as it is.

    Attributes:
        problems: breaches of the numerics rule, one a line; empty when the two agree.
        report: what became of every candidate.
        graphs: the rewritten graphs.
    """

    problems: list[str]
    report: Report
    graphs: list[GraphModule]

    def fused(self, pattern: str) -> int:
        """Number of sites that `pattern` fused."""
        return self.report.counts().get(pattern, {}).get("fused", 0)

    @property
    def reasons(self) -> str:
        """The report as a table, for messages of failed assertions."""
        return str(self.report)


def compare(
    model: Model,
    inputs: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    grad: bool = True,
    options: Options = REFERENCE,
    executor: Executor = "eager",
    strides: bool = True,
    draws: int = 3,
    **compile_options: Any,
) -> Comparison:
    """Runs a model in float64, as it is, and rewritten, and applies the numerics rule to all that it leaves behind.

    The errors of several draws of the inputs are pooled: of a result with a handful of elements, one draw may come
    out right by chance. Gradients are compared without their strides: autograd promises none.
    """
    kwargs = kwargs or {}
    rewriter = Rewriter(options, executor)
    exact_model, plain, own = (_copy(model) for _ in range(3))
    if isinstance(exact_model, nn.Module):
        exact_model.double()
    compiled = rewritten(own, rewriter, **compile_options)
    runs: list[tuple[Results, Results, Results]] = []
    for draw in range(draws):
        given, named = redraw((tuple(inputs), kwargs), draw)
        with ExactMath():
            exact = call(exact_model, to_float64(given), to_float64(named), grad=grad)
        unfused = call(plain, given, named, grad=grad)
        fused = call(compiled, given, named, owner=own, grad=grad)
        runs.append((exact, unfused, fused))
    return Comparison(_problems(runs, strides), rewriter.report, rewriter.graphs)


def _copy(model: Model) -> Model:
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model


def redraw(inputs: Any, draw: int) -> Any:
    """Other random numbers in the inputs that need gradients; draw 0 leaves them as they are."""
    generator = torch.Generator().manual_seed(draw)

    def other(x: Any) -> Any:
        if draw == 0 or not (isinstance(x, Tensor) and x.requires_grad):
            return x
        new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        return new.copy_(torch.randn(x.shape, generator=generator)).requires_grad_()

    return tree_map(other, inputs)


def _problems(runs: Sequence[tuple[Results, Results, Results]], strides: bool) -> list[str]:
    names = runs[0][1].names
    problems = []
    for exact, unfused, fused in runs:
        if not exact.names == unfused.names == fused.names == names:
            return [f"results are {fused.names} instead of {unfused.names}"]
        for name, a, b in zip(names, unfused.tensors, fused.tensors, strict=True):
            problem = difference_of_kind(a, b, strides=strides and not name.startswith("gradient"))
            problems += [f"{name}: {problem}"] if problem else []
    if problems:
        return problems
    for i, name in enumerate(names):
        pooled = [_pooled([run[kind].tensors[i] for run in runs]) for kind in range(3)]
        problem = error_beyond_rule(*pooled)
        problems += [f"{name}: {problem}"] if problem else []
    return problems


def _pooled(values: Sequence[Any]) -> Any:
    floating = all(isinstance(x, Tensor) and x.dtype.is_floating_point for x in values)
    return torch.stack([x.contiguous() for x in values]) if floating else None


def one_graph(report: Report) -> GraphReport:
    """The only graph of a report."""
    (graph,) = report.graphs
    return graph
