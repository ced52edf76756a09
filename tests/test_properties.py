"""Whatever the spelling and the sizes, a pattern fires and agrees; with one thing changed it may not change results.

`HYPOTHESIS_PROFILE=hunt pytest tests/test_properties.py` draws new examples, and many more.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Comparison, Rewriter, compare, rewritten
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spelled import MUTATIONS, Block, Spelling, make_input
from torch import Tensor

PATTERN = "norm_qkv_rope_attention"
HUNT = os.environ.get("HYPOTHESIS_PROFILE") == "hunt"


def examples(n: int) -> settings:
    """`n` examples, or the profile's number when hunting."""
    return settings(max_examples=1000 if HUNT else n)


@st.composite
def spellings(draw: st.DrawFn, **fixed: Any) -> Spelling:
    """Any way to write the block that a library could choose."""
    projection = draw(st.sampled_from(["separate", "concatenated", "per_head", "stacked"]))
    head_dim = draw(st.sampled_from([4, 8, 12]))
    norm = draw(st.sampled_from(["none", "none", "rms", "rms_call", "gemma", "layer"]))
    whole = norm in ("rms", "rms_call", "gemma") and projection in ("separate", "concatenated")
    chosen = {
        "batch": draw(st.integers(1, 3)),
        "length": draw(st.integers(2, 7)),
        "kv_heads": draw(st.integers(1, 3)),
        "groups": 1 if projection in ("per_head", "stacked") else draw(st.integers(1, 2)),
        "head_dim": head_dim,
        "rotary_dim": draw(st.sampled_from([d for d in (4, 8, head_dim) if d <= head_dim])),
        "interleaved": draw(st.booleans()),
        "table": draw(st.sampled_from(["full", "half"])),
        "rotation": draw(st.sampled_from(["cat", "parts", "stores", "float"])),
        "norm": norm,
        "norm_over": draw(st.sampled_from(["head", "all"])) if whole else "head",
        "projection": projection,
        "bias": draw(st.booleans()),
        "rotate_transposed": draw(st.booleans()),
        "contiguous": draw(st.booleans()),
        "strided_input": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "dynamic": draw(st.booleans()),
    }
    spelling = Spelling(**(chosen | fixed))
    assume(spelling.batch * spelling.heads > 1)  # else a table looks just like what it rotates
    return spelling


def compared(spelling: Spelling) -> Comparison:
    """The block rewritten, next to the block as it is."""
    torch.manual_seed(0)
    block = Block(spelling).to(spelling.dtype)
    differentiable = spelling.mutation != "table_mutated_between"  # the query's backward needs the table as it was
    return compare(block, (make_input(spelling),), dynamic=spelling.dynamic, grad=differentiable)


@examples(50)
@given(spellings())
def test_every_spelling_fires_and_agrees(spelling: Spelling) -> None:
    result = compared(spelling)
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_change_of_meaning_is_never_lost(mutation: str) -> None:
    fixed: dict[str, Any] = {}
    if mutation in ("other_eps_for_key", "mean_over_other_dim", "norm_of_key_only", "cubed"):
        fixed = {"norm": "rms", "norm_over": "head"}
    if mutation in ("alpha_2", "pairs_along_sequence", "mutated_inside", "alias_mutated_inside"):
        fixed = {"rotation": "cat"}
    if mutation == "autocast_inside":  # the CPU's takes no float16
        fixed = {"dtype": torch.float32}

    @examples(3)
    @given(spellings(**fixed))
    def check(spelling: Spelling) -> None:
        twin = compared(spelling)
        assert twin.fused(PATTERN) == 1, f"the twin did not fire: {twin.reasons}"
        assert not twin.problems
        mutated = compared(dataclasses.replace(spelling, mutation=mutation))
        assert not mutated.problems, f"{spelling}\n{mutated.reasons}"
        assert all(site.reason for site in mutated.report.sites)

    check()


@pytest.mark.parametrize("projection", ["separate", "per_head"])
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m not in ("learned_tables", "detached_between")])
def test_one_change_of_meaning_is_never_lost_where_it_is_rotated_in_place(mutation: str, projection: str) -> None:
    """Without gradients, partial embeddings are written where the projection left them."""
    dtype = torch.float32
    norm = "rms" if mutation in ("other_eps_for_key", "mean_over_other_dim", "norm_of_key_only", "cubed") else "none"
    before = projection == "separate"  # transposed before it is rotated
    spelling = Spelling(
        rotary_dim=4, projection=projection, rotate_transposed=before, dtype=dtype, norm=norm, mutation=mutation
    )
    twin = dataclasses.replace(spelling, mutation="", norm="none")
    found, mutated = (
        compare(Block(s).requires_grad_(False), (make_input(s).detach(),), grad=False, draws=2)
        for s in (twin, spelling)
    )
    ops = [site.op for site in found.report.sites if site.pattern == PATTERN]
    assert ops == ["torch_fuse::partial_rope"] and not found.problems
    assert not mutated.problems, mutated.reasons


# -- masks ---------------------------------------------------------------------------------------------------------

Mask = Callable[[int], Tensor]


def _atom(kind: str, n: int) -> Mask:
    def mask(length: int) -> Tensor:
        q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
        return {
            "causal": lambda: k <= q + n,
            "strict": lambda: k < q + n,
            "reversed": lambda: k >= q - n,
            "window": lambda: k > q - n,
            "early": lambda: (k < n).expand(length, length),
            "late_queries": lambda: (q >= n).expand(length, length),
            "same_block": lambda: k // (n + 2) == q // (n + 2),
            "tril": lambda: torch.ones(length, length, dtype=torch.bool).tril(n),
            "not_triu": lambda: ~torch.ones(length, length).triu(n).bool(),
            "triu": lambda: torch.full((length, length), 1.0).triu(n) != 0,
            "all": lambda: torch.ones(length, length, dtype=torch.bool),
            "scaled": lambda: 2 * k <= 2 * q + n,
        }[kind]()

    return mask


ATOMS = st.builds(
    _atom,
    st.sampled_from(
        ["causal", "strict", "reversed", "window", "early", "late_queries", "same_block", "tril", "not_triu", "triu",
         "all", "scaled"]
    ),
    st.integers(-2, 9),
)  # fmt: skip


def _combined(how: str, a: Mask, b: Mask) -> Mask:
    return lambda length: {
        "and": lambda: a(length) & b(length),
        "or": lambda: a(length) | b(length),
        "xor": lambda: a(length) ^ b(length),
        "not": lambda: ~a(length),
        "transpose": lambda: a(length).transpose(0, 1),
        "where": lambda: torch.where(b(length), a(length), torch.zeros_like(a(length))),
        "slice": lambda: a(length + 1)[1:, 1:],
        "first_rows": lambda: a(length + 2)[:length, :length],
        "product": lambda: a(length) * b(length),
        "masked_fill": lambda: a(length).masked_fill(b(length), False),
    }[how]()


MASKS = st.recursive(
    ATOMS,
    lambda inner: st.builds(
        _combined,
        st.sampled_from(
            ["and", "and", "or", "xor", "not", "transpose", "where", "slice", "first_rows", "product", "masked_fill"]
        ),
        inner,
        inner,
    ),
    max_leaves=4,
)  # fmt: skip


def _as_given(mask: Tensor, form: str) -> Tensor:
    """A boolean mask as it is, or added to scores."""
    if form == "boolean":
        return mask
    low = torch.finfo(torch.float32).min if form == "lowest" else float("-inf")
    if form == "where":
        return torch.where(mask, 0.0, low)
    if form == "times":
        return (1.0 - mask.float()) * torch.finfo(torch.float32).min
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def _decides(mask: Mask, form: str, length: int, keys: int, dynamic: bool) -> Rewriter:
    def model(q: Tensor, k: Tensor) -> Tensor:
        given_mask = _as_given(mask(q.shape[-2]), form)
        if keys != length:
            given_mask = given_mask[:, : k.shape[-2]]
        return F.scaled_dot_product_attention(q, k, k, attn_mask=given_mask)

    rewriter = Rewriter()
    q, k = torch.randn(1, 2, length, 4), torch.randn(1, 2, keys, 4)
    if dynamic:
        torch._dynamo.mark_dynamic(q, 2)
        torch._dynamo.mark_dynamic(k, 2)
    with torch.no_grad():
        fused = rewritten(model, rewriter)(q, k)
        expected = model(q, k)
    torch.testing.assert_close(fused, expected, equal_nan=True)
    return rewriter


@examples(120)
@given(
    MASKS, st.sampled_from(["boolean", "boolean", "inf", "lowest", "where", "times"]), st.integers(2, 9),
    st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_a_mask_is_only_dropped_when_it_is_causal_or_keeps_everything(
    mask: Mask, form: str, length: int, fewer_keys: int, dynamic: bool
) -> None:
    assume(length - fewer_keys > 1)
    rewriter = _decides(mask, form, length, length - fewer_keys, dynamic)
    if ("causal_mask", "fused") in rewriter.statuses:
        kept = mask(length)[:, : length - fewer_keys]
        causal = torch.ones(kept.shape, dtype=torch.bool).tril()
        assert bool(kept.all()) or torch.equal(kept, causal)
    else:
        assert all(site.reason for site in rewriter.report.sites)


CAUSAL = st.sampled_from(
    [_atom("causal", 0), _atom("strict", 1), _atom("tril", 0), _atom("not_triu", 1), _atom("scaled", 1),
     _combined("transpose", _atom("reversed", 0), _atom("all", 0)),
     _combined("not", _atom("reversed", -1), _atom("all", 0))]
)  # fmt: skip
TRUE = st.sampled_from([_atom("all", 0), _atom("late_queries", 0), _atom("late_queries", -1)])


@examples(40)
@given(
    CAUSAL, TRUE, st.sampled_from(["and", "product", "slice", "first_rows", "where"]),
    st.sampled_from(["boolean", "inf", "lowest", "where", "times"]), st.integers(2, 9), st.booleans(),
)  # fmt: skip
def test_a_causal_mask_is_recognised_in_every_spelling(
    causal: Mask, true: Mask, how: str, form: str, length: int, dynamic: bool
) -> None:
    rewriter = _decides(_combined(how, causal, true), form, length, length, dynamic)
    assert ("causal_mask", "fused") in rewriter.statuses, str(rewriter.report)
