"""The fastest exact backend of an attention on this device, from times that are measured once and remembered.

What is measured, and why it is kept that way: docs/notes/attention_choice.md.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_fuse import measurements
from torch_fuse._compat import outside_tracing, sdpa_pick
from torch_fuse.graph_timing import Times, graph_times

from ._attention_candidates import CANDIDATES, Candidate, pytorch
from ._attention_check import Sample, difference, difference_of_gradients
from ._attention_site import Site

KIND = "attention"
MARGIN = 0.98  # of PyTorch's time: less of a gain is noise
BASELINE = "pytorch"


class Unmeasured(Exception):
    """A site cannot be measured; the message says why."""


@dataclass(frozen=True)
class Measured:
    """What is remembered of a site.

    Attributes:
        pick: PyTorch's own pick, such as "cudnn_attention".
        times: microseconds of "pytorch" and of the candidates that are right and can run.
        dropped: why each other candidate is out.
    """

    pick: str
    times: dict[str, Times]
    dropped: dict[str, str]

    @property
    def for_now(self) -> bool:
        """Whether a candidate is out for a reason that another time need not hold."""
        return any("OutOfMemory" in reason or "out of memory" in reason for reason in self.dropped.values())

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        us = {name: [round(x.device_us, 2), round(x.host_us, 1)] for name, x in self.times.items()}
        return {"pick": self.pick, "us": us, "dropped": self.dropped}

    @classmethod
    def read(cls, value: Any) -> Measured:
        """What `plain` made.

        Raises:
            ValueError, KeyError, TypeError: for anything else.
        """
        times = {str(name): Times(float(device), float(host)) for name, (device, host) in dict(value["us"]).items()}
        dropped = {str(name): str(reason) for name, reason in dict(value["dropped"]).items()}
        known = {BASELINE, *(candidate.name for candidate in CANDIDATES)}
        if BASELINE not in times or not times.keys() <= known:
            raise ValueError(f"it has times of {', '.join(times) or 'nothing'}")
        if not all(0 < x.device_us < math.inf and 0 <= x.host_us < math.inf for x in times.values()):
            raise ValueError("it has a time that is none")
        return cls(str(value["pick"]), times, dropped)


@dataclass(frozen=True)
class Choice:
    """The backend for a site: a candidate, or None for PyTorch's own pick; and the times, for the report."""

    candidate: Candidate | None
    reason: str


def choose(site: Site, cuda_graphs: bool) -> Choice:
    """The fastest backend for a site, from what is remembered, or measured now.

    Args:
        site: the attention.
        cuda_graphs: whether CUDA graphs hide what a launch costs the processor.

    Raises:
        Unmeasured: when it is not remembered and cannot be measured.
    """
    measured = _measured(site)
    base = measured.times[BASELINE]

    def cost(candidate: Candidate) -> float:
        times = measured.times[candidate.name]
        launch = max(0.0, times.host_us - base.host_us) if candidate.own_launch and not cuda_graphs else 0.0
        return times.device_us + launch

    able = [x for x in CANDIDATES if x.name in measured.times]
    best = min(able, key=cost, default=None)
    if best is not None and cost(best) > MARGIN * base.device_us:
        best = None
    theirs = f"PyTorch's pick ({measured.pick}) {base.device_us:.1f} us"
    others = [f"{x.name} {_shown(measured.times[x.name].device_us, cost(x))}" for x in able if x is not best]
    out = [f"{name}: {reason}" for name, reason in measured.dropped.items()]
    if best is None:
        first = f"{theirs} is as fast as any" if able else f"{theirs}, and nothing else can run"
        return Choice(None, "; ".join([first, *others, *out]))
    shown = f"{best.name} {_shown(measured.times[best.name].device_us, cost(best))}"
    return Choice(best, "; ".join([f"{shown}, {theirs}", *others, *out]))


def _shown(device_us: float, cost_us: float) -> str:
    extra = cost_us - device_us
    return f"{device_us:.1f} us" + (f" and {extra:.0f} us more to launch" if extra >= 0.5 else "")


_lock = threading.RLock()
_known: dict[str, Measured | str] = {}  # by identity; a string says why it could not be measured


def forget() -> None:
    """Forgets what this process knows; files stay."""
    with _lock:
        _known.clear()


def _measured(site: Site) -> Measured:
    reason = unmeasurable(site)
    if reason is not None:
        raise Unmeasured(reason)
    identity = site.identity()
    name = json.dumps(identity, sort_keys=True)
    with _lock:  # one measurement at a time: two would disturb each other
        known = _known.get(name)
        if known is None:
            known = measurements.recall(KIND, identity, Measured.read)
            if known is None and not measurements.may_measure():
                raise Unmeasured("it was not measured yet; compiling measures it")
            if known is None:
                known = _measure_now(site)
                if isinstance(known, Measured) and not known.for_now:
                    measurements.store(KIND, identity, known.plain())
            _known[name] = known
    if isinstance(known, str):
        raise Unmeasured(known)
    return known


def unmeasurable(site: Site) -> str | None:
    """Why nothing can be timed for a site, or None."""
    if site.device.type != "cuda" or torch.version.hip is not None:
        return f"backends are measured on CUDA devices only, not on {site.device}"
    if site.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {site.dtype}; measured are bfloat16 and float16"
    if 0 in site.query.shape or 0 in site.key.shape:
        return "it is empty"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def _measure_now(site: Site) -> Measured | str:
    devices = [site.device] if site.device.type == "cuda" else []
    try:
        with outside_tracing(site.gradients), torch.random.fork_rng(devices=devices):
            return measure(site)
    except Exception as error:  # out of memory, most of all: it must not keep the model from compiling
        return f"measuring {_failed(error)}"
    finally:
        if devices:
            torch.cuda.empty_cache()  # graphs have memory of their own


def measure(site: Site, candidates: Sequence[Candidate] | None = None) -> Measured:
    """Times PyTorch's pick and all candidates that are right, on random tensors of the site's layout."""
    tensors = site.tensors()
    baseline = pytorch(tensors, site)
    cotangent = torch.randn_like(baseline(tensors)) if site.gradients else None
    run = functools.partial(_run, tensors=tensors, cotangent=cotangent)
    q, k, v = tensors
    k, v = (x.repeat_interleave(site.repetition, 1) if site.repetition > 1 else x for x in (k, v))
    pick = sdpa_pick(q, k, v, site.is_causal, site.scale, site.gqa)
    wanted, sample = run(baseline), Sample(tensors, site)
    if not bool(wanted[0].isfinite().all()):
        raise RuntimeError("PyTorch's own result is not finite")
    calls: dict[str, Callable[[], Any]] = {BASELINE: functools.partial(run, baseline)}
    dropped: dict[str, str] = {}
    for candidate in CANDIDATES if candidates is None else candidates:
        reason = _unable(candidate, tensors, site, pick)
        if reason is None:
            call = functools.partial(run, functools.partial(candidate.call, site=site))
            reason = _problem(call, wanted, sample)
            calls[candidate.name] = call
        if reason:
            dropped[candidate.name] = reason
            calls.pop(candidate.name, None)
    times, failed = graph_times(calls, site.device)
    if BASELINE not in times:
        raise RuntimeError(f"PyTorch's own call {failed.get(BASELINE, 'was not timed')}")
    return Measured(pick, times, {**dropped, **failed})


def _run(
    call: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor], tensors: tuple[Tensor, Tensor, Tensor],
    cotangent: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The attention, and its gradients where they are wanted.

    Those are of leaves made here: autograd waits for the stream that made a leaf, which a capture on another forbids.
    """
    if cotangent is None:
        return (call(tensors),)
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out = call((q, k, v))
    return (out, *torch.autograd.grad(out, (q, k, v), cotangent))


def _unable(candidate: Candidate, tensors: tuple[Tensor, Tensor, Tensor], site: Site, pick: str) -> str | None:
    if site.gradients and not candidate.gradients:
        return "it has no gradient"
    if candidate.pick and candidate.pick == pick and site.repetition == 1:
        return "it is PyTorch's pick"
    try:
        return candidate.refusal(tensors, site)
    except Exception as error:
        return _failed(error)


def _problem(call: Callable[[], tuple[Tensor, ...]], wanted: Sequence[Tensor], sample: Sample) -> str:
    """Why a candidate that should be able to is not usable, or ""."""
    try:
        found = call()
        if found[0].is_cuda:
            torch.cuda.synchronize(found[0].device)
    except Exception as error:
        return _failed(error)
    found, wanted = tuple(x.detach() for x in found), [x.detach() for x in wanted]
    reason = difference(wanted[0], found[0]) or sample.error_beyond_rule(wanted[0], found[0])
    return reason or difference_of_gradients(wanted[1:], found[1:]) if len(found) > 1 else reason


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
