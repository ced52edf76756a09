"""Attention to a paged cache: another order than the block table's is refused; Inductor takes the step as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Rewriter, compare, rewritten

from torch_fuse import Options
from torch_fuse.patterns._paged_examples import NEAR_MISSES, step

REASONS = {
    "no_mask": "there is no mask",
    "keys_of_all_blocks_in_turn": "not batch, heads, keys block by block, lanes",
    "heads_in_between": "mixes the dimensions of blocks",
    "other_table_of_values": "different tables",
    "cache_written_after_the_gather": "writes in place",
    "too_many_tokens": "more than 8 queries",
    "gradients": "gradients are wanted",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_with_its_reason(name: str) -> None:
    result = compare(*step(**NEAR_MISSES[name])(torch.float32), grad=name == "gradients")
    assert result.fused("paged_decode_attention") == 0 and not result.problems
    (site,) = [site for site in result.report.sites if site.pattern == "paged_decode_attention"]
    assert REASONS[name] in site.reason, result.reasons


@pytest.mark.parametrize("how", ["", "index_select", "heads_first"])
def test_tables_and_batches_of_any_length_are_recognised(how: str) -> None:
    """Dynamo makes their sizes symbolic at the second length."""
    rewriter = Rewriter()
    model, given = step(batch=2, how=how)(torch.float32)
    compiled = rewritten(model, rewriter)
    for batch, blocks in ((2, 3), (3, 4), (4, 6)):
        keys, values = given[1:3]
        table = torch.stack([torch.randperm(7)[:blocks] for _ in range(batch)])
        inputs: Any = (torch.randn(batch, 1, 16), table, torch.randperm(28)[:batch], torch.arange(batch) + 5)
        mine, theirs = ((inputs[0], keys.clone(), values.clone(), *inputs[1:]) for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*mine), model(*theirs))
        torch.testing.assert_close(mine[1:3], theirs[1:3])
    assert len(rewriter.report.graphs) == 2
    assert rewriter.report.counts()["paged_decode_attention"] == {"fused": 2}, rewriter.report


def test_inductor_takes_the_step_as_it_is() -> None:
    model, given = step(kv_heads=2)(torch.float32)
    torch._dynamo.reset()
    options = {"kernels": "reference", "on_error": "raise"}
    compiled = torch.compile(model, backend="fuse", fullgraph=True, options=options)
    mine, theirs = ([x.clone() for x in given] for _ in range(2))
    with torch.no_grad():
        for _ in range(2):  # the second step reads what the first has appended
            torch.testing.assert_close(compiled(*mine), model(*theirs))
            for inputs in (mine, theirs):
                inputs[4] = (inputs[4] + 1) % 28
    torch.testing.assert_close(mine[1:3], theirs[1:3])


def test_it_is_kept_unless_asked_for() -> None:
    rewriter = Rewriter(Options(on_error="raise"))
    model, given = step()(torch.float32)
    with torch.no_grad():
        rewritten(model, rewriter)(*given)
    (site,) = [site for site in rewriter.report.sites if site.pattern == "paged_decode_attention"]
    assert site.status == "kept" and "not measured to win yet" in site.reason
