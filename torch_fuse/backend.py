"""The `fuse` backend of `torch.compile`: rewrites the Dynamo graph, then hands it to Inductor."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from torch_fuse import report as reporting
from torch_fuse._compat import cache_tag, compile_with_inductor, trace_artifact
from torch_fuse._version import __version__
from torch_fuse.options import Options, mode_options, parse_options
from torch_fuse.report import GraphReport, Report
from torch_fuse.rewrite.engine import Outcome, rewrite
from torch_fuse.rewrite.registry import fingerprint, patterns
from torch_fuse.verify import verified

_log = logging.getLogger(__name__)
_warned: set[str] = set()


class MissError(RuntimeError):
    """An attention was not recognised and `options["on_miss"]` is "error"."""


def fuse(
    gm: GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compiles a graph: `torch.compile(model, backend="fuse", mode=..., options=...)` calls this for each graph.

    Args:
        gm: the Dynamo graph; rewritten in place.
        example_inputs: its (fake) inputs.
        mode: as Inductor's: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: see `torch_fuse.Options`.
        kwargs: `name`, which newer versions of torch pass on; anything else is an error.

    Returns:
        The compiled function.

    Raises:
        OptionError: for an unknown mode or option, before anything compiles.
        MissError: when an attention was not recognised and `on_miss` is "error".
    """
    unknown = sorted(set(kwargs) - {"name"})
    if unknown:
        raise TypeError(f"fuse() got {unknown[0]!r}; allowed: mode, options")
    known = patterns()
    checked = parse_options(options, known)
    patches = {**mode_options(mode), **checked.inductor}
    checked = replace(checked, inductor=patches)  # what a pattern may ask: whether CUDA graphs hide launches
    outcome = _rewritten(gm, checked)
    reporting.record(outcome.report)
    _announce(outcome.report)
    _complain(outcome.report, checked)

    def compiled(module: GraphModule) -> Callable[..., Any]:
        with cache_tag(f"torch_fuse-{__version__}-{fingerprint()}"):
            return compile_with_inductor(module, example_inputs, dict(patches))

    if checked.verify == "first_call" and outcome.original is not None:
        unfused = compiled(outcome.original)
        return verified(outcome.gm, outcome.original, compiled(outcome.gm), unfused)
    try:
        return compiled(outcome.gm)
    except Exception as error:
        if checked.on_error == "raise" or outcome.original is None:
            raise
        outcome.report.error = f"{type(error).__name__}: {error}"
        _warn_once(f"torch_fuse compiled a graph unfused, because compiling it fused failed: {outcome.report.error}")
        return compiled(outcome.original)


def _rewritten(gm: GraphModule, options: Options) -> Outcome:
    try:
        outcome = rewrite(gm, options, patterns())
        if outcome.report.error:
            _warn_once(f"torch_fuse left a part of a graph as it was: {outcome.report.error}")
        return outcome
    except Exception as error:
        if options.on_error == "raise":
            raise
        reason = f"{type(error).__name__}: {error}"
        _warn_once(f"torch_fuse left a graph as it was, because rewriting it failed: {reason}")
        _log.debug("rewriting failed", exc_info=True)
        return Outcome(gm, None, GraphReport(error=reason))


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def _announce(graph: GraphReport) -> None:
    report = Report([graph])
    _log.info("%s", report)
    trace_artifact("torch_fuse_report", json.dumps(report.to_dict()))


def _complain(graph: GraphReport, options: Options) -> None:
    """Warns or raises about attentions that were not recognised."""
    missed = [site for site in graph.sites if site.status == "missed" and site.kind == "attention"]
    if not missed or options.on_miss == "ignore":
        return
    shown = "\n".join(f"  {site.location}: {site.pattern}: {site.reason}" for site in missed)
    message = f"torch_fuse did not recognise {len(missed)} attention site(s):\n{shown}"
    if options.on_miss == "error":
        raise MissError(message)
    warnings.warn(message, stacklevel=2)
