"""The ops of a decoding step alone, next to Inductor's code for the models' own lines: `decode.py --ops` runs it.

They run over several sets of weights that do not fit L2 together, in one CUDA graph; `early` is the same with launches
that begin before the one before them has ended.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Log, captured, error, interleaved_ms
from models import PYTHIA
from torch import Tensor

attention = importlib.import_module("torch_fuse.kernels.decode_attention")
norm_linear = importlib.import_module("torch_fuse.kernels.norm_linear_gemv")
residual = importlib.import_module("torch_fuse.kernels.linear_residual_gemv")

L2 = 60 * 2**20
EARLY = [False]  # whether the ops launch early
Case = tuple[list[Callable[[], Any]], list[Callable[[], Any]], int]


def _norm_linear(hidden: int, inner: int, rows: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: QKV and MLP up behind their LayerNorms."""
    sizes = (3 * hidden, inner)
    moved = sum(sizes) * hidden * dtype.itemsize
    x = torch.randn(1, rows, hidden, device=device, dtype=dtype)

    def unfused(weights, biases, scales, shifts):  # type: ignore[no-untyped-def]
        q, h = (
            F.linear(F.layer_norm(x, (hidden,), s, c), w, b)
            for w, b, s, c in zip(weights, biases, scales, shifts, strict=True)
        )
        return q, F.gelu(h)

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        weights = [torch.randn(n, hidden, device=device, dtype=dtype) * 0.02 for n in sizes]
        biases = [torch.randn(n, device=device, dtype=dtype) for n in sizes]
        scales, shifts = ([torch.randn(hidden, device=device, dtype=dtype) for _ in sizes] for _ in range(2))
        given = (weights, biases, scales, shifts)
        ours.append(
            lambda g=given: norm_linear.norm_linear_gemv(x, *g, "layer", 1e-5, 0.0, "none,gelu", False, EARLY[0])
        )
        theirs.append(lambda g=given: compiled(*g))
    return ours, theirs, moved


def _linear_residual(hidden: int, inner: int, rows: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: output projection, MLP down and both residuals."""
    moved = (hidden + inner) * hidden * dtype.itemsize
    x, a, h = (torch.randn(1, rows, n, device=device, dtype=dtype) for n in (hidden, hidden, inner))

    def unfused(w1, b1, w2, b2):  # type: ignore[no-untyped-def]
        return F.linear(h, w2, b2) + F.linear(a, w1, b1) + x

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        w1, w2 = (torch.randn(hidden, n, device=device, dtype=dtype) * 0.02 for n in (hidden, inner))
        given = (
            w1,
            torch.randn(hidden, device=device, dtype=dtype),
            w2,
            torch.randn(hidden, device=device, dtype=dtype),
        )
        ours.append(lambda g=given: residual.linear_residual_gemv(x, a, g[0], g[1], h, g[2], g[3], EARLY[0]))
        theirs.append(lambda g=given: compiled(*g))
    return ours, theirs, moved


def _attention(heads: int, dim: int, live: int, size: int, device: str, dtype: torch.dtype) -> Case:
    """GPT-NeoX: partial RoPE, append and attention to `live` tokens of a cache of `size`."""
    rotary, moved = dim // 4, 2 * heads * (live + 1) * dim * dtype.itemsize
    q, k, v = (t.transpose(1, 2) for t in torch.randn(1, heads, 1, 3 * dim, device=device, dtype=dtype).chunk(3, -1))
    cos, sin = (torch.randn(1, 1, rotary, device=device, dtype=dtype) for _ in range(2))
    position = torch.tensor([live], device=device)
    mask = (torch.arange(size, device=device) <= live)[None, None, None]
    lanes = [1, 0, rotary // 2]

    def turn(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        y, rest = x[..., :rotary], x[..., rotary:]
        half = torch.cat((-y[..., rotary // 2 :], y[..., : rotary // 2]), -1)
        return torch.cat((y * cos[:, None] + half * sin[:, None], rest), -1)

    def unfused(keys: Tensor, values: Tensor) -> Tensor:
        keys.index_copy_(2, position, turn(k))
        values.index_copy_(2, position, v.transpose(1, 2))
        return F.scaled_dot_product_attention(turn(q), keys, values, mask, scale=dim**-0.5)

    compiled = torch.compile(unfused, dynamic=False)
    ours, theirs = [], []
    for _ in range(L2 * 3 // moved + 1 if device == "cuda" else 1):
        keys, values = (torch.randn(1, heads, size, dim, device=device, dtype=dtype) for _ in range(2))
        ours.append(
            lambda a=keys, b=values: attention.decode_attention(
                q, k, v, cos, sin, a, b, None, position, mask, rotary, False, lanes, lanes, dim**-0.5, EARLY[0]
            )
        )
        theirs.append(lambda a=keys, b=values: compiled(a, b))
    return ours, theirs, moved


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """All of several calls, whose weights do not fit L2 together, as a CUDA graph."""
    return captured(lambda: [call() for call in _many(calls)]) if torch.cuda.is_available() else calls[0]


def _many(calls: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
    """Enough calls that a graph's own launch does not count."""
    return calls * -(-24 // len(calls))


def ops(log: Log, only: str | None, dry: bool, sweep: bool, alone: bool) -> None:
    """Times each op next to Inductor's code for the same lines, or alone, for one row."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
    models = ["tiny"] if dry else ["pythia-2.8b", "pythia-160m"]
    for model, what in itertools.product(models, ("attention", "norm_linear", "linear_residual")):
        hidden, _, heads, inner = PYTHIA[model]
        if only not in (None, what):
            continue
        if what == "attention":
            for live, size in [(20, 32)] if dry else [(512, 1024), (1900, 2048)]:
                make = lambda live=live, size=size: _attention(heads, hidden // heads, live, size, device, dtype)  # noqa: E731, B023
                _measure(log, make(), sweep, alone, what, name=model, live=live, size=size)
            continue
        kind = _norm_linear if what == "norm_linear" else _linear_residual
        for rows in (1,) if alone else (1, 2, 4, 8):
            _measure(log, kind(hidden, inner, rows, device, dtype), sweep and rows == 1, alone, what, name=model,
                     rows=rows)  # fmt: skip


def _measure(log: Log, case: Case, sweep: bool, alone: bool, what: str, **fields: Any) -> None:
    ours, theirs, moved = case
    others = {} if alone else {"inductor": theirs}
    count = len(_many(ours)) if torch.cuda.is_available() else 1

    def row(**chosen: Any) -> None:
        try:
            with torch.no_grad():
                log.write(what=what, **fields, **chosen, **_speeds(_times(ours, theirs[0], others), count, moved))
        except Exception as problem:  # a tile that is too large
            log.write(what=what, **fields, **chosen, problem=repr(problem)[:300])

    row()
    others = {}
    for chosen in _configurations(what) if sweep else ():
        row(**chosen)


def _times(
    ours: list[Callable[[], Any]], exact: Callable[[], Any], others: dict[str, list[Callable[[], Any]]]
) -> dict[str, float]:
    """The op's milliseconds, plain and with launches that begin early, and those of others."""
    ways = {}
    wanted = exact()
    try:
        for EARLY[0], name in ((True, "early"), (False, "op")):
            _agree(ours[0](), wanted)
            ways[name] = _in_turn(ours)
    finally:
        EARLY[0] = False
    ways |= {name: _in_turn(calls) for name, calls in others.items()}
    return interleaved_ms(ways, 10, rounds=3 if others else 2)


def _agree(found: Any, wanted: Any) -> None:
    for a, b in zip(_flat(found), _flat(wanted), strict=True):
        b = _like(b, a).reshape(-1)
        assert error(a.reshape(-1), b)["rms"] <= 0.02 * float(b.double().square().mean().sqrt())


def _speeds(times: dict[str, float], count: int, moved: int) -> dict[str, float]:
    found = {f"{name}_us": round(ms * 1e3 / count, 2) for name, ms in times.items()}
    return found | {"op_gb_s": round(moved * count / times["op"] / 1e6)}


def _flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _like(b: Tensor, a: Tensor) -> Tensor:
    return b if b.shape == a.shape else b.transpose(1, 2)


def _configurations(what: str) -> Iterator[dict[str, int]]:
    """Sets each configuration in turn, and the chosen one again at the end."""
    if what == "norm_linear":
        before = norm_linear.config
        tried: list[Any] = [
            norm_linear.Config(4, 4, 264, 3), norm_linear.Config(8, 4, maxnreg=168), norm_linear.Config(4, 4, 396, 3),
            norm_linear.Config(4, 4),
            norm_linear.Config(2, 4), norm_linear.Config(8, 8), norm_linear.Config(4, 4, 264, 4),
            norm_linear.Config(2, 2), norm_linear.Config(8, 8, 264, 2), norm_linear.Config(2, 4, maxnreg=64),
            norm_linear.Config(2, 4, 528, 4), norm_linear.Config(8, 8, maxnreg=80),
        ]  # fmt: skip
        for chosen in tried:
            norm_linear.config = lambda *_, c=chosen: c
            yield chosen._asdict()
        norm_linear.config = before
    elif what == "linear_residual":
        before = residual.config
        tried = [
            residual.Config(2, 0, 8, 0), residual.Config(1, 0, 4, 0), residual.Config(1, 0, 16, 0),
            residual.Config(2, 0, 16, 0), residual.Config(2, 512, 4, 5), residual.Config(2, 1024, 4, 4),
            residual.Config(1, 2048, 4, 3), residual.Config(2, 2048, 8, 3), residual.Config(4, 0, 16, 0),
        ]  # fmt: skip
        for chosen in tried:
            residual.config = lambda *_, c=chosen: c
            yield chosen._asdict()
        residual.config = before
    else:
        names = ("BLOCK_N", "NUM_WARPS", "PROGRAMS")
        before = [getattr(attention, name) for name in names]
        for chosen in ((64, 4, 528), (32, 4, 1056), (128, 8, 528), (128, 4, 528), (32, 2, 2112), (64, 8, 1056), before):
            for name, value in zip(names, chosen, strict=True):
                setattr(attention, name, value)
            yield dict(zip(names, chosen, strict=True))
