"""`torch_fuse.explain`: what would be fused in a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from torch_fuse.measurements import only_remembered
from torch_fuse.options import parse_options
from torch_fuse.report import GraphReport, Report


def explain(
    model: Callable[..., Any], *args: Any, fuse_options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Traces a model and reports every candidate: fused, kept or missed, and why.

    Nothing but the trace runs: each graph's results are replaced by zeros of their shape, so that tracing can go on
    after a graph break, and no parameter, buffer or cache changes. Dynamo's caches are reset before and after, as
    `torch._dynamo.explain` does.

    Args:
        model: module or function.
        args, kwargs: its inputs.
        fuse_options: the backend's options, such as {"kernels": "reference"}.

    Returns:
        The report; `Report.graphs` is in the order of the trace. A trace that stops with an exception (a model that
        cannot go on with zeros after a graph break) leaves it in the last graph's `error`.

    Example:
        >>> report = torch_fuse.explain(model, input_ids=ids)
        >>> print(report)
    """
    from torch_fuse.rewrite.engine import rewrite
    from torch_fuse.rewrite.registry import patterns

    known = patterns()
    options = parse_options(fuse_options, known)
    graphs: list[GraphReport] = []

    def analyse(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with only_remembered():
            graphs.append(rewrite(gm, options, known).report)
        return _zeros(gm)

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=analyse)(*args, **kwargs)
    except Exception as error:
        if not graphs:
            raise
        graphs.append(GraphReport(error=f"the trace stopped: {type(error).__name__}: {error}"))
    finally:
        torch._dynamo.reset()
    return Report(graphs)


def _zeros(gm: GraphModule) -> Callable[..., Any]:
    """A stand-in for a compiled graph: inputs pass through, everything else is zeros."""
    outputs = gm.graph.output_node().args[0]
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert isinstance(outputs, (tuple, list))

    def run(*given: Any) -> tuple[Any, ...]:
        by_node = dict(zip(inputs, given, strict=True))
        sizes = _sizes(by_node)
        return tuple(by_node[node] if node in by_node else _zero(node, sizes) for node in outputs)

    return run


def _sizes(by_node: Mapping[Any, Any]) -> dict[Any, int]:
    """The values of the symbolic sizes, from the inputs."""
    found: dict[Any, int] = {}
    for node, given in by_node.items():
        seen = node.meta.get("example_value")
        if isinstance(seen, torch.SymInt) and isinstance(given, int):
            found[seen.node.expr] = given
        elif isinstance(seen, torch.Tensor) and isinstance(given, torch.Tensor):
            for symbolic, size in zip(seen.shape, given.shape, strict=True):
                if isinstance(symbolic, torch.SymInt):
                    found[symbolic.node.expr] = size
    return found


def _zero(node: Any, sizes: Mapping[Any, int]) -> Any:
    seen = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node
    if isinstance(seen, torch.SymInt):
        return int(seen.node.expr.subs(sizes))
    if not isinstance(seen, torch.Tensor):
        return seen
    shape = [int(s.node.expr.subs(sizes)) if isinstance(s, torch.SymInt) else s for s in seen.shape]
    return torch.zeros(shape, dtype=seen.dtype, device=seen.device, requires_grad=seen.requires_grad)
