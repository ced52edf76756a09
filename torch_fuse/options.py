"""The `mode` and `options` of `torch.compile(model, backend="fuse")`, checked before anything compiles."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

Kernels = Literal["auto", "reference"]
Attention = Literal["table", "measure"]
Verify = Literal["off", "first_call"]
OnMiss = Literal["ignore", "warn", "error"]
OnError = Literal["fallback", "raise"]


class OptionError(ValueError):
    """A `mode` or `options` entry that the backend does not know; the message names what is allowed."""


@dataclass(frozen=True)
class Options:
    """What a user can set in `torch.compile(..., backend="fuse", options={...})`.

    Attributes:
        disable: names of patterns that are not tried.
        only: names of the only patterns that are tried; empty for all.
        kernels: "auto" replaces a subgraph where the fused op wins on its device; "reference" replaces every
            match by the op's plain torch implementation (for tests, demos and debugging).
        attention: how attention without a mask finds its backend: "table" from measurements that are part of this
            package; "measure" times the exact backends on each new shape while it compiles, and remembers the times.
        unmeasured: also replace where the fused op is right, but not measured to win: to measure it.
        early_launch: launches of a decoding step begin before the one before them has ended, to ask for their
            weights (programmatic dependent launch; NVIDIA GPUs from sm_90 on).
        verify: "first_call" runs the fused and the unfused graph on the real inputs of the first call,
            logs the difference, and goes on with the unfused graph when they disagree.
        on_miss: what to do when an attention was not recognised: nothing, warn, or raise.
        on_error: "fallback" compiles the graph as it was when the rewriter itself fails, and warns once;
            "raise" lets the exception out.
        lossy: families of lossy rewrites that are allowed; nothing by default. "attention": scores in INT8, weights
            and values in FP8 where no mask is read; error about 4 % of the result's norm.
        fuel: stop after this many rewrites of a graph, to bisect a wrong result; None for no limit.
        inductor: options passed on to Inductor, as `torch.compile(options=...)` takes them.
    """

    disable: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    kernels: Kernels = "auto"
    attention: Attention = "table"
    unmeasured: bool = False
    early_launch: bool = False
    verify: Verify = "off"
    on_miss: OnMiss = "ignore"
    on_error: OnError = "fallback"
    lossy: tuple[str, ...] = ()
    fuel: int | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)


_CHOICES: dict[str, tuple[str, ...]] = {
    "kernels": ("auto", "reference"),
    "attention": ("table", "measure"),
    "verify": ("off", "first_call"),
    "on_miss": ("ignore", "warn", "error"),
    "on_error": ("fallback", "raise"),
}
LOSSY_FAMILIES: tuple[str, ...] = ("attention",)


def _nearest(value: object, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(str(value), sorted(allowed), n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(sorted(allowed)) if len(allowed) <= 20 else f"one of {len(allowed)} known names"
    return f"allowed: {listed or 'nothing'}{hint}"


def _names(key: str, value: Any, allowed: Collection[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise OptionError(f"options[{key!r}] is {value!r}; allowed: a name or a list of names")
    for name in value:
        if name not in allowed:
            raise OptionError(f"options[{key!r}] has {name!r}; {_nearest(name, allowed)}")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _inductor(value: Any) -> dict[str, Any]:
    import torch._inductor

    if not isinstance(value, Mapping):
        raise OptionError(f"options['inductor'] is {value!r}; allowed: a dict of Inductor options")
    known = {name.replace("-", "_"): name for name in torch._inductor.list_options()}
    for name in value:
        if str(name).replace("-", "_") not in known:
            raise OptionError(f"options['inductor'] has {name!r}; {_nearest(name, known)}")
    return {str(name).replace("-", "_"): item for name, item in value.items()}


def parse_options(options: Mapping[str, Any] | None, pattern_names: Collection[str]) -> Options:
    """Checks `options` and returns them typed.

    Args:
        options: as given to `torch.compile`; None for the defaults.
        pattern_names: the names of all registered patterns.

    Raises:
        OptionError: for an unknown key or value; the message names it, what is allowed and the nearest name.
    """
    if options is None:
        return Options()
    if not isinstance(options, Mapping):
        raise OptionError(f"options is {options!r}; allowed: a dict")
    allowed = [f.name for f in fields(Options)]
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in allowed:
            raise OptionError(f"options has {key!r}; {_nearest(key, allowed)}")
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise OptionError(f"options[{key!r}] is {value!r}; {_nearest(value, _CHOICES[key])}")
        elif key in ("disable", "only"):
            value = _names(key, value, pattern_names)
        elif key == "lossy":
            value = _names(key, value, LOSSY_FAMILIES)
        elif key == "fuel":
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise OptionError(f"options['fuel'] is {value!r}; allowed: None or an int >= 0")
        elif key in ("unmeasured", "early_launch"):
            if not isinstance(value, bool):
                raise OptionError(f"options[{key!r}] is {value!r}; allowed: False, True")
        elif key == "inductor":
            value = _inductor(value)
        checked[key] = value
    return Options(**checked)


def mode_options(mode: str | None) -> dict[str, Any]:
    """The Inductor options that `mode` stands for, as in `torch.compile(mode=...)`.

    Raises:
        OptionError: when Inductor has no such mode.
    """
    import torch._inductor

    if mode is None:
        return {}
    modes = cast(dict[str, dict[str, Any]], torch._inductor.list_mode_options())
    if mode not in modes:
        raise OptionError(f"mode is {mode!r}; {_nearest(mode, modes)}")
    return dict(modes[mode])
