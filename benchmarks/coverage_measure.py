"""What benchmarks/coverage.py records of one model: sites and reasons, errors against float64, graphs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import ExactMath, Rewriter, rewritten, to_float64
from numerics import difference_of_kind, largest, rms
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

PATTERN = "norm_qkv_rope_attention"
LENGTHS = (12, 15)
MORE_DRAWS = 6


@dataclass
class Case:
    """A model and how to call it.

    Attributes:
        model: the model.
        inputs: keyword arguments for a length.
        implementation: which attention implementation it uses, as far as it says.
        pads: whether it takes an attention mask of ones and zeros beside token ids.
    """

    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]
    implementation: str = ""
    pads: bool = False

    def run(self, model: Callable[..., Any], length: int = LENGTHS[0], **changes: Any) -> Tensor:
        """The model's main result."""
        return main_output(model(**{**self.inputs(length), **changes}))


def main_output(output: Any) -> Tensor:
    """The first floating-point tensor of what a model returns, preferably its logits."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    leaves = tree_leaves(tuple(output.values()) if hasattr(output, "to_tuple") else output)
    return next(x for x in leaves if isinstance(x, Tensor) and x.dtype.is_floating_point)


def measure(case: Case, quick: bool, padding: bool) -> dict[str, Any]:
    """All figures of one model; `quick` leaves out everything but recognition."""
    rewriter = Rewriter()
    compiled = rewritten(case.model if quick else copy.deepcopy(case.model), rewriter)
    if quick:
        with torch.no_grad():
            case.run(compiled)
        return _sites(rewriter) | {"implementation": case.implementation}
    row: dict[str, Any] = {"implementation": case.implementation, "wrong": []}
    if padding:
        return row | _padded(case, rewriter, compiled)
    row |= _compared(case, case.model, compiled, row["wrong"])
    row |= _sites(rewriter)
    row["graphs"] = len(rewriter.report.graphs)
    row["graphs_of_two_lengths"] = _graphs(case, compiled, rewriter)
    row["graphs_of_two_lengths_unfused"] = _graphs_unfused(case)
    if row["graphs_of_two_lengths"] > row["graphs_of_two_lengths_unfused"]:
        row["wrong"].append("recompiles more often than the model as it is")
    return row | {f"bf16_{key}": value for key, value in _half(case, row["wrong"]).items()}


# -- recognition ---------------------------------------------------------------------------------------------------


def _sites(rewriter: Rewriter) -> dict[str, Any]:
    """Attentions by what became of them: one that several patterns looked at is missed if one of them missed it."""
    by_node: dict[tuple[int, str], list[Any]] = {}
    for site in rewriter.report.sites:
        if site.kind == "attention":
            by_node.setdefault((site.graph, site.node), []).append(site)
    counts: Counter[str] = Counter()
    kept, missed, fused = [], [], Counter[str]()
    for sites in by_node.values():
        statuses = {site.status for site in sites}
        counts["missed" if "missed" in statuses else "fused" if "fused" in statuses else "kept"] += 1
        fused.update(site.pattern for site in sites if site.status == "fused")
        missed += [_plain(site) for site in sites if site.status == "missed"]
        kept += [_plain(site) for site in sites if site.status == "kept"]
    errors = [graph.error for graph in rewriter.report.graphs if graph.error]
    notes = {site.reason for site in rewriter.report.sites if (site.pattern, site.status) == (PATTERN, "fused")}
    return {
        "sites": len(by_node), **{kind: counts[kind] for kind in ("fused", "kept", "missed")},
        "by_pattern": dict(fused), "missed_sites": missed, "kept_sites": kept, "errors": errors,
        "notes": sorted(notes),
    }  # fmt: skip


def _plain(site: Any) -> dict[str, str]:
    location = site.location.rpartition("site-packages/")[2].replace(f"{Path(__file__).parents[1]}/", "")
    return {"pattern": site.pattern, "reason": site.reason, "location": location, "shape": site.shape}


# -- numerics ------------------------------------------------------------------------------------------------------


def _compared(case: Case, plain: nn.Module, compiled: Callable[..., Any], wrong: list[str]) -> dict[str, Any]:
    """Forward and gradients of one length, next to the model as it is and to float64.

    A result with a handful of elements, or one that is zero but for rounding (the gradient of a key's bias), may come
    out right by chance. Where the rule seems broken, the errors of more cotangents are pooled.
    """
    exact_model = in_float64(plain)
    owner = getattr(compiled, "_orig_mod", compiled)
    runs: list[tuple[dict[str, Any], ...]] = []
    ratios: dict[str, float] = {}
    problems: dict[str, list[str]] = {}
    for seed in range(MORE_DRAWS):
        with ExactMath():
            exact = _with_gradients(case, exact_model, exact_model, seed, to_float64)
        found = (
            exact,
            _with_gradients(case, plain, plain, seed),
            _with_gradients(case, compiled, owner, seed),
        )
        if not runs:
            strides = difference_of_kind(found[1]["output"], found[2]["output"])
            wrong += [f"output: {strides}"] if strides else []
        names = list(found[1]) if not runs else list(problems)
        runs.append(tuple({name: results[name] for name in names} for results in found))
        problems = {}
        for name in names:
            pooled = [[run[kind][name] for run in runs] for kind in range(3)]
            tensors = [None if values[0] is None else torch.stack(values) for values in pooled]
            problem: list[str] = []
            ratios[name] = _ratio(name, *tensors, problem, strides=False)
            if problem:
                problems[name] = problem
        if not problems:
            break
        runs = [tuple({name: results[name] for name in problems} for results in run) for run in runs]
    wrong += [line for lines in problems.values() for line in lines]
    forward = ratios.pop("output")
    worst = max(ratios, key=ratios.__getitem__, default="")
    return {"forward": forward, "gradient": ratios.get(worst, 0.0), "gradient_of": worst, "gradients": len(ratios),
            "draws": len(runs)}  # fmt: skip


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; mixtures of experts go expert by expert, as the grouped product has no float64."""
    exact = to_float64(model)
    for module in exact.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"
    return exact


def _with_gradients(
    case: Case, model: Callable[..., Any], owner: nn.Module, seed: int, convert: Callable[[Any], Any] = lambda x: x
) -> dict[str, Any]:
    """The output and the gradients of all parameters from one fixed cotangent."""
    owner.zero_grad()
    torch.manual_seed(0)
    output = main_output(model(**convert(case.inputs(LENGTHS[0]))))
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(100 + seed)).bfloat16()
    found: dict[str, Any] = {"output": output.detach()}
    if output.requires_grad:
        (output * cotangent.to(output.dtype)).sum().backward()
        found |= {name: p.grad for name, p in owner.named_parameters()}
    return found


def _ratio(name: str, exact: Any, unfused: Any, fused: Any, wrong: list[str], strides: bool = True) -> float:
    """Error over what the numerics rule allows: at most 1 is right.

    Few elements may come out right by chance, so that the rule is given a floor: four roundings of the largest value.
    """
    problem = difference_of_kind(unfused, fused, strides=strides) if unfused is not None else ""
    if problem or (unfused is None) != (fused is None):
        wrong.append(f"{name}: {problem or 'no gradient, or one too many'}")
        return 0.0
    if unfused is None or not bool((finite := unfused.isfinite() & exact.isfinite()).any()):
        return 0.0
    noise = (((unfused + 0.3) - 0.3) - unfused)[finite].double()
    a, b = (x[finite].double() - exact[finite].double() for x in (unfused, fused))
    floor = 4 * torch.finfo(unfused.dtype).eps
    size_of = {"largest": largest, "rms": rms}
    ratio = max(
        size(b) / max(2 * size(a) + size(noise) + floor * size(exact[finite]), 1e-300) for size in size_of.values()
    )  # all of them are zero where the result is
    if not ratio <= 1:
        wrong.append(f"{name}: {ratio:.3g} times the error that the rule allows")
    return round(ratio, 3)


def _half(case: Case, wrong: list[str]) -> dict[str, Any]:
    """The forward in bfloat16, if the model takes it as it is."""
    model = copy.deepcopy(case.model).bfloat16()
    own, found = Rewriter(), []
    compiled = rewritten(copy.deepcopy(model), own)

    def halved(given: Any) -> Any:
        return {k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}

    given = halved(case.inputs(LENGTHS[0]))
    with torch.no_grad():
        with ExactMath():
            exact = main_output(in_float64(model)(**to_float64(given)))
        try:
            unfused = main_output(model(**given))
        except RuntimeError as error:
            return {"problem": f"as it is: {error}"[:200]}
        fused = main_output(compiled(**given))
    forward = _ratio("output", exact, unfused, fused, found)
    wrong += [f"bf16 {problem}" for problem in found]
    return {"forward": forward, "fused": _sites(own)["fused"]}


# -- graphs --------------------------------------------------------------------------------------------------------


def _graphs(case: Case, compiled: Callable[..., Any], rewriter: Rewriter) -> int:
    for length in LENGTHS[1:]:
        case.run(compiled, length)
    return len(rewriter.report.graphs)


def _graphs_unfused(case: Case) -> int:
    seen = []

    def count(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend=count)
    for length in LENGTHS:
        case.run(compiled, length)
    return len(seen)


# -- padding -------------------------------------------------------------------------------------------------------


def _padded(case: Case, rewriter: Rewriter, compiled: Callable[..., Any]) -> dict[str, Any]:
    """Left and right padding, compared where there is a token."""
    wrong: list[str] = []
    row: dict[str, Any] = {}
    if not case.pads:
        return {"error": "takes no attention mask", "stage": "padding"}
    length = LENGTHS[0]
    for side in ("left", "right"):
        keep = torch.ones(2, length, dtype=torch.long)
        keep[0, : 4 if side == "left" else None] = 0 if side == "left" else 1
        if side == "right":
            keep[0, -4:] = 0
        with torch.no_grad():
            with ExactMath():
                exact = case.run(in_float64(case.model), attention_mask=keep)
            results = [case.run(model, attention_mask=keep) for model in (case.model, compiled)]
        exact, unfused, fused = (x[keep.bool()] for x in (exact, *results))
        row[f"{side}_forward"] = _ratio(f"{side}-padded output", exact, unfused, fused, wrong)
    return row | _sites(rewriter) | {"wrong": wrong}
