"""paged_decode_attention against float64: any table, block, mask, number of heads and queries.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from in_interpreter import passes_in_interpreter
from test_gemv import compiled
from torch import Tensor

from torch_fuse.kernels import _calls, _ops

module = importlib.import_module("torch_fuse.kernels.paged_decode_attention")
op, reference, supports = module.paged_decode_attention, module.reference, module.supports
DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"


class Case(NamedTuple):
    dtype: torch.dtype = torch.float32
    batch: int = 1
    queries: int = 1
    kv_heads: int = 2
    group: int = 1
    dim: int = 16
    blocks: int = 12
    page: int = 16
    table: int = 5
    live: int = 37
    mask: str = "bool"
    heads_first: bool = False
    index: torch.dtype = torch.int64


CASES = {
    "one_token": Case(),
    "grouped_two_rows": Case(torch.float16, batch=2, group=4, dim=64, index=torch.int32),
    "eight_queries": Case(torch.bfloat16, queries=8, kv_heads=1, group=2, dim=32),
    "one_key_a_block": Case(page=1, blocks=90, table=70, live=66),
    "block_of_odd_size": Case(page=24, table=7, blocks=9, live=150, dim=80),
    "heads_before_tokens": Case(heads_first=True, batch=2, queries=2),
    "added": Case(mask="added", batch=2, group=2),
    "lowest_number": Case(torch.float16, mask="lowest", live=70),
    "a_row_of_the_lowest_number": Case(mask="only_lowest"),
    "nothing_kept": Case(mask="nothing"),
}


def arguments(case: Case) -> list[Any]:
    torch.manual_seed(0)
    heads, size = case.kv_heads * case.group, case.page * case.table
    q = torch.randn(case.batch, case.queries, heads, case.dim).to(case.dtype)
    shape = (case.blocks, case.kv_heads, case.page, case.dim) if case.heads_first else (
        case.blocks, case.page, case.kv_heads, case.dim
    )  # fmt: skip
    caches = [torch.randn(shape).to(case.dtype) for _ in range(2)]
    caches = [cache.transpose(1, 2) if case.heads_first else cache for cache in caches]
    table = torch.stack([torch.randperm(case.blocks)[: case.table] for _ in range(case.batch)]).to(case.index)
    table[:, -1] -= case.blocks  # counts from the end
    keep = torch.arange(size) <= torch.arange(case.queries)[:, None] + case.live
    keep = keep[None, None] & (torch.arange(size) >= torch.arange(case.batch)[:, None, None, None])
    if case.mask == "nothing":
        keep = keep & False
    lowest = torch.finfo(case.dtype).min
    mask = {
        "bool": keep, "nothing": keep, "added": torch.randn(keep.shape).masked_fill(~keep, float("-inf")),
        "lowest": torch.zeros(keep.shape).masked_fill(~keep, lowest), "only_lowest": torch.full(keep.shape, lowest),
    }[case.mask]  # fmt: skip
    mask = mask if mask.dtype == torch.bool else mask.to(case.dtype)
    return [x.to(DEVICE) for x in (q, *caches, table, mask)] + [0.3]


def wide(given: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_result_is_no_worse_than_the_references(case: Case) -> None:
    given = arguments(case)
    found, unfused, exact = op(*given), reference(*given), reference(*wide(given))
    assert found.shape == given[0].shape and found.dtype == case.dtype and found.is_contiguous()
    slack = 5.0 if case.dtype == torch.bfloat16 and _ops.INTERPRETED else 1.0  # it truncates
    mistakes = [float((x.double() - exact).abs().max()) for x in (found, unfused)]
    assert mistakes[0] <= slack * 2 * mistakes[1] + 1e-6, mistakes


def test_blocks_that_no_key_of_is_kept_are_not_read() -> None:
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        pytest.skip("the reference reads all of them")
    given = arguments(Case(live=10))
    named = set(given[3][0, :1].tolist())
    for cache in given[1:3]:
        cache[[i for i in range(12) if i not in named]] = float("nan")
    assert op(*given).isfinite().all()


@pytest.mark.parametrize("splits", [1, 4])
def test_any_number_of_parts_gives_the_same(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_split", lambda *_: splits)
    given = arguments(Case(page=24, table=7, blocks=9, live=150, group=2, mask="added"))
    torch.testing.assert_close(op(*given), reference(*given))


@pytest.mark.parametrize("name", ["one_token", "heads_before_tokens"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op, tuple(arguments(CASES[name])))


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles for a GPU")
@pytest.mark.parametrize("name", ["grouped_two_rows", "added"])
def test_kernels_compile_for_hopper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    not_kept = type("NotKept", (), {"arguments": lambda self, _: [object()]})()
    monkeypatch.setattr(module, "supports", lambda *_: None)
    monkeypatch.setattr(_calls, "launch", lambda *given: launches.append(given) or not_kept)
    module._forward(*(x.cpu() if isinstance(x, Tensor) else x for x in arguments(CASES[name])))
    for kernel, _, values, constants in launches:
        assert compiled(kernel, values, constants).metadata.shared <= 64 * 1024


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    def fails(index: int, value: Any, match: str) -> None:
        given = arguments(Case())
        given[index] = value(given[index])
        with pytest.raises(ValueError, match=match):
            op(*given)

    fails(1, lambda cache: cache[..., :8], r"key_cache.shape is .*; allowed: \[N, block, a divisor of 2, 16\]")
    fails(2, lambda cache: cache[:5], r"value_cache.shape is .*; allowed: key_cache's")
    fails(3, lambda table: table.bool(), r"block_table.dtype is torch.bool; allowed: int32, int64")
    fails(3, lambda table: table[0], r"block_table.shape is \(5,\); allowed: \[1, T\]")
    fails(4, lambda mask: mask.int(), r"mask.dtype is torch.int32; allowed: bool, q's torch.float32")
    fails(4, lambda mask: mask[..., :-1], r"mask.shape is \(1, 1, 1, 79\); allowed")


def test_supports_says_why_not() -> None:
    q, cache = arguments(Case())[:2]
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(q, cache) == "Triton has no backend for device 'cpu'"
        return
    assert supports(q, cache) is None
    assert "9 queries" in supports(q.expand(1, 9, 2, 16), cache)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not opcheck")
