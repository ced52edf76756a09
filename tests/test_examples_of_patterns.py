"""Every pattern's own examples: its spellings fire and agree, its near misses change nothing."""

from __future__ import annotations

import pytest
import torch
from harness import compare

from torch_fuse.rewrite.pattern import Example
from torch_fuse.rewrite.registry import patterns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = {name: pattern for name, pattern in patterns().items() if not pattern.lossy}  # lossy ones have their own tests
SPELLINGS = [(name, example) for name, pattern in EXACT.items() for example in pattern.spellings()]
NEAR_MISSES = [(name, example) for name, pattern in patterns().items() for example in pattern.near_misses()]


def _ids(cases: list[tuple[str, Example]]) -> list[str]:
    return [f"{name}-{example.name}" for name, example in cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "example"), SPELLINGS, ids=_ids(SPELLINGS))
def test_a_spelling_fires_and_agrees(pattern: str, example: Example, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result = compare(*example.make(dtype))
    assert result.fused(pattern) >= 1, result.reasons
    assert not result.problems


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "example"), NEAR_MISSES, ids=_ids(NEAR_MISSES))
def test_a_near_miss_changes_nothing(pattern: str, example: Example, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    result = compare(*example.make(dtype))
    assert not result.problems, result.reasons
    assert all(site.reason for site in result.report.sites)


@pytest.mark.parametrize("pattern", patterns())
def test_a_pattern_has_spellings_and_near_misses_of_different_names(pattern: str) -> None:
    found = patterns()[pattern]
    spellings, near_misses = list(found.spellings()), list(found.near_misses())
    assert spellings and all(example.fuses for example in spellings)
    assert near_misses and not any(example.fuses for example in near_misses)
    names = [example.name for example in (*spellings, *near_misses)]
    assert len(names) == len(set(names))
