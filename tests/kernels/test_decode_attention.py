"""decode_attention against float64: any cache, mask, number of heads and queries.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from in_interpreter import passes_in_interpreter
from test_gemv import compiled
from torch import Tensor

from torch_fuse.kernels import _calls, _ops

module = importlib.import_module("torch_fuse.kernels.decode_attention")
op, reference, supports = module.decode_attention, module.reference, module.supports
DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"


class Case(NamedTuple):
    dtype: torch.dtype = torch.float32
    batch: int = 1
    queries: int = 1
    kv_heads: int = 2
    group: int = 1
    dim: int = 16
    size: int = 70
    live: int = 5
    rotary: int = 8
    interleaved: bool = False
    counted: bool = True
    mask: str = "causal"
    normed: bool = False


CASES = {
    "one_token": Case(),
    "pythia": Case(torch.float16, kv_heads=2, dim=80, rotary=20, size=200, live=130),
    "last_place": Case(size=64, live=63),
    "first_place": Case(live=0),
    "second_tile": Case(size=200, live=64),
    "across_two_tiles": Case(queries=3, size=200, live=62, counted=False),
    "grouped": Case(torch.float16, group=4, dim=64, rotary=64, live=66),
    "multi_query_eight_tokens": Case(torch.float16, batch=2, queries=8, kv_heads=1, group=3, dim=32, live=40),
    "interleaved": Case(rotary=16, interleaved=True, batch=3),
    "no_rope": Case(rotary=0, dim=128, live=33),
    "wide_head_of_96": Case(torch.bfloat16, dim=96, rotary=96, group=2),
    "padded_left": Case(batch=2, mask="padded", size=300, live=200),
    "window": Case(queries=2, mask="window", size=300, live=200),
    "per_head": Case(mask="per_head", group=2, live=40),
    "every_other": Case(mask="every_other", live=60, size=90),
    "nothing_kept": Case(mask="none", live=60, size=90),
    "normed": Case(torch.float16, batch=2, dim=80, rotary=20, live=66, normed=True),
    "normed_grouped_three_tokens": Case(queries=3, group=2, dim=24, rotary=24, interleaved=True, normed=True),
    "normed_no_rope": Case(rotary=0, normed=True),
}


def mask_of(case: Case) -> Tensor:
    j, i = torch.arange(case.size), torch.arange(case.queries)[:, None] + case.live
    keep = (j <= i).expand(case.batch, 1, case.queries, case.size)
    if case.mask == "padded":
        keep = keep & (j >= torch.tensor([0, 130])[:, None, None, None])
    if case.mask == "window":
        keep = keep & (j > i - 20)
    if case.mask == "every_other":
        keep = keep & (j % 2 == 0)
    if case.mask == "per_head":
        heads = case.kv_heads * case.group
        keep = keep & (j >= torch.arange(heads)[:, None, None])
    return keep & (case.mask != "none")


def arguments(case: Case) -> list[Any]:
    torch.manual_seed(0)
    heads = case.kv_heads * case.group
    qkv = torch.randn(case.batch, case.queries, heads + 2 * case.kv_heads, case.dim).to(DEVICE, case.dtype)
    cos, sin = (torch.randn(1, case.queries, case.rotary).to(DEVICE, case.dtype) for _ in range(2))
    caches = [torch.randn(case.batch, case.kv_heads, case.size, case.dim).to(DEVICE, case.dtype) for _ in range(2)]
    lanes = [2, 0, 1] if case.interleaved else [1, 0, case.rotary // 2]
    length = torch.tensor(case.live, device=DEVICE)
    positions = torch.arange(case.queries, device=DEVICE) + case.live
    return [
        *qkv.split([heads, case.kv_heads, case.kv_heads], 2), *((cos, sin) if case.rotary else (None, None)), *caches,
        length if case.counted else None, None if case.counted else positions, mask_of(case).to(DEVICE), case.rotary,
        case.interleaved, lanes if case.rotary else [], lanes if case.rotary else [], 0.3,
        *((False, *torch.randn(2, case.dim).to(DEVICE, case.dtype), 1e-5, 0.5) if case.normed else ()),
    ]  # fmt: skip


def fresh(given: list[Any], wide: bool = False) -> list[Any]:
    """Copies, in float64 when wide, of what is written to; everything else as it is, but for its dtype."""
    found = []
    for i, x in enumerate(given):
        if isinstance(x, Tensor):
            x = x.double() if wide and x.is_floating_point() else x
            x = x.clone() if i in (5, 6, 7) else x
        found.append(x)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result_and_cache_are_no_worse_than_the_references(case: Case) -> None:
    given = arguments(case)
    mine, theirs, exact = fresh(given), fresh(given), fresh(given, wide=True)
    outputs = [op(*mine), reference(*theirs), reference(*exact)]
    assert outputs[0].shape == outputs[1].shape and outputs[0].dtype == case.dtype and outputs[0].is_contiguous()
    for a, b, c in (outputs, *((mine[i], theirs[i], exact[i]) for i in (5, 6))):
        # the interpreter truncates to bfloat16, a GPU rounds
        slack = 5.0 if case.dtype == torch.bfloat16 and _ops.INTERPRETED else 1.0
        mistakes = [float((x.double() - c).abs().max()) for x in (a, b)]
        assert mistakes[0] <= slack * 2 * mistakes[1] + 1e-6, mistakes
    if case.counted:
        assert mine[7].item() == case.live + case.queries
    untouched = [j for j in range(case.size) if not case.live <= j < case.live + case.queries]
    for i in (5, 6):
        assert torch.equal(mine[i][:, :, untouched], given[i][:, :, untouched])


def test_what_is_not_attended_to_is_not_read() -> None:
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        pytest.skip("the reference reads the whole cache")
    given = arguments(Case(size=300, live=20))
    for cache in given[5:7]:
        cache[:, :, 64:] = float("nan")
    assert op(*given).isfinite().all()


def test_steps_one_after_the_other_fill_the_cache() -> None:
    given = arguments(Case(size=80, live=60))
    together = fresh(given)
    for step in range(6):
        q, k, v = (torch.randn_like(x) for x in given[:3])
        keep = (torch.arange(80, device=DEVICE) <= 60 + step)[None, None, None]
        outputs = [f(q, k, v, *x[3:9], keep, *x[10:]) for f, x in ((op, given), (reference, together))]
        torch.testing.assert_close(*outputs)
    torch.testing.assert_close(given[5:8], together[5:8])
    assert given[7].item() == 66


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("name", ["pythia", "across_two_tiles", "grouped", "window", "nothing_kept"])
def test_any_number_of_parts_gives_the_same(name: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_split", lambda *_: splits)
    given = arguments(CASES[name]._replace(dtype=torch.float32))
    mine, theirs = fresh(given), fresh(given)
    torch.testing.assert_close(op(*mine), reference(*theirs))
    torch.testing.assert_close(mine[5:8], theirs[5:8])


def test_what_the_cache_holds_at_a_new_place_is_not_read() -> None:
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        pytest.skip("the reference overwrites it first")
    given = arguments(Case(size=200, live=100, queries=2))
    for cache in given[5:7]:
        cache[:, :, 100:102] = float("nan")
    assert op(*given).isfinite().all()


def test_the_same_step_gives_the_same_bits() -> None:
    given = arguments(Case(torch.float16, kv_heads=1, size=200, live=150, group=2))
    first, *others = (op(*fresh(given)) for _ in range(3 if DEVICE == "cuda" else 2))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles for a GPU")
@pytest.mark.parametrize("early", [False, True])
def test_one_query_waits_for_the_memory_and_not_for_other_threads(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are all asked for at once, 16 bytes a thread, and sums of different threads are added up once."""
    launches: list[Any] = []
    monkeypatch.setattr(module, "supports", lambda *_: None)
    monkeypatch.setattr(module, "starts_early", lambda _, asked: asked)
    not_kept = SimpleNamespace(arguments=lambda _: [object()])
    monkeypatch.setattr(_calls, "launch", lambda *given: launches.append(given) or not_kept)
    given = arguments(Case(torch.float16, dim=80, rotary=20, size=1024))
    module._forward(*(x.cpu() if isinstance(x, Tensor) else x for x in given), early)
    (kernel, grid, values, constants), (merge, _, merged, others) = launches
    assert grid == 2 * 16 and constants["TILES"] == 1
    found = compiled(kernel, values, constants)
    ptx = found.asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4", ptx)) == 2 * 64 * 128 * 2 // 16 // 128
    assert found.metadata.shared <= 4096 and ptx.count("bar.sync") <= 24
    for code in (ptx, compiled(merge, merged, others).asm["ptx"]):
        assert ("griddepcontrol.wait" in code) == early == ("griddepcontrol.launch_dependents" in code)


@pytest.mark.parametrize("name", ["one_token", "across_two_tiles", "no_rope"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op, tuple(arguments(CASES[name])))


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    def fails(index: int, value: Any, match: str) -> None:
        given = arguments(Case())
        given[index] = value(given[index])
        with pytest.raises(ValueError, match=match):
            op(*given)

    fails(9, lambda mask: mask.int(), r"mask.dtype is torch.int32; allowed: bool")
    fails(9, lambda mask: mask[..., :-1], r"mask.shape is \(1, 1, 1, 69\); allowed")
    fails(6, lambda cache: cache[:, :, 1:], r"value_cache.shape is .*; allowed: key_cache's")
    fails(7, lambda length: None, r"length is None; allowed: given, or else positions")
    fails(7, lambda length: length.int(), r"length is torch.int32; allowed: int64")
    fails(10, lambda rotary: 7, r"rotary_dim is 7; allowed: an even number")


def test_supports_says_why_not() -> None:
    given = arguments(Case())
    q, k, cache = given[0], given[1], given[5]
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(q, k, cache) == "Triton has no backend for device 'cpu'"
        return
    assert supports(q, k, cache) is None
    assert "9 queries" in supports(q.expand(1, 9, 2, 16), k, cache)
    assert "float64" in supports(q.double(), k, cache)
    assert "head_dim is 12" in supports(q[..., :12], k, cache)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not opcheck")
