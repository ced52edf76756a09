"""decode_stack against float64: its reference, its kernel in the CPU emulator, what it refuses.

A Triton interpreter cannot run CUDA C++: tests/cuda_emulation runs the kernel's source with one fiber a thread.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation import unavailable
from decode_stack_cases import Case, copied, emulated, stack
from numerics import error_beyond_rule
from torch import Tensor

from torch_fuse.kernels import _cuda
from torch_fuse.kernels import _decode_stack_launch as launching
from torch_fuse.kernels._decode_stack_plan import Device, Plan, Sizes, plan

module = importlib.import_module("torch_fuse.kernels.decode_stack")
op, reference, check = module.decode_stack, module.reference, module.check
needs_emulator = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
H200 = Device(132, 232448)
LLAMA: dict[str, Any] = {
    "parallel": False, "norm": "rms", "activation": "silu", "gated": True, "fused": False, "kv_heads": 2,
}  # fmt: skip
PYTHIA_28B = Sizes(32, 2560, 32, 32, 80, (7680,), 10240, 50304, True, False, 20)

CASES = {
    "neox": Case(),
    "rows_in_the_last_slice_only": Case(
        width=264, heads=5, kv_heads=5, head_dim=24, inner=600, matrix_warps=3, max_chunk=1100, multiprocessors=6,
        mask="hole",
    ),
    "one_key_bfloat16": Case(mask="one", dtype=torch.bfloat16, splits=1, rotary=0, vocabulary=0),
    "keys_behind_the_token": Case(mask="beyond", counted=False, interleaved=True, rotary=16, biased=False,
                                  table_dtype=torch.float32),
    "parallel_and_gated": Case(**LLAMA | {"parallel": True}),
    "llama": Case(**LLAMA, layers=3),
    "norms_of_heads": Case(**LLAMA | {"head_dim": 24, "rotary": 20, "head_norm": True, "kv_heads": 1}),
    "norms_of_turned_heads": Case(head_dim=40, heads=2, kv_heads=2, rotary=32, head_norm=True, dtype=torch.bfloat16),
    "norms_of_heads_in_pairs": Case(head_norm=True, rotary=12, interleaved=True),
    "norms_of_heads_alone": Case(head_norm=True, rotary=0),
    "without_a_ring_of_keys": Case(keys=0, mask="hole", live=39),
    "keys_of_many_slots": Case(head_dim=128, heads=2, kv_heads=2, size=200, live=190, mask="beyond", own_masks=True),
    "llama_long_rows_bfloat16": Case(**LLAMA | {
        "width": 520, "inner": 1304, "matrix_warps": 4, "max_chunk": 1536, "multiprocessors": 4, "heads": 6,
        "head_dim": 40, "rotary": 40, "live": 30, "dtype": torch.bfloat16, "slots": 4,
    }),
}  # fmt: skip
# These share a compiled kernel with "neox".
SAME = {
    "nothing_kept": Case(mask="none"),
    "without_the_token": Case(mask="without_the_token"),
    "first_place": Case(live=0),
    "last_place": Case(live=39),
    "rows_of_the_cache_apart": Case(apart=True),
}


def known(s: Any) -> Any:
    """Copies with numbers in the places of the cache that nobody may look at."""
    for cache in (*s.key_caches, *s.value_caches):
        cache.nan_to_num_(0.0)
    return s


@needs_emulator
@pytest.mark.parametrize("name", [*CASES, *SAME])
def test_the_kernel_agrees_with_float64_in_any_order_of_its_threads(name: str) -> None:
    case = (CASES | SAME)[name]
    s = stack(case)
    check(s)
    exact, chain = known(copied(s, torch.float64)), known(copied(s))
    right, wanted = reference(*exact), reference(*chain)
    results = []
    for seed in (0, 1, 6):
        mine = copied(s)
        results.append(emulated(mine, case, seed))
        assert not error_beyond_rule(right, wanted, results[-1])
        assert torch.equal(results[-1], results[0])
        assert all(map(torch.equal, mine.lengths, chain.lengths))
        for kind in ("key_caches", "value_caches"):
            for cache, before, other in zip(getattr(mine, kind), getattr(s, kind), getattr(chain, kind), strict=True):
                assert torch.allclose(cache[:, :, case.live], other[:, :, case.live], rtol=0.02, atol=0.02)
                cache[:, :, case.live] = before[:, :, case.live]
                assert torch.equal(cache.nan_to_num(7.0), before.nan_to_num(7.0)), "only the token's place is written"


@needs_emulator
def test_what_a_launch_finds_in_its_workspace_does_not_matter() -> None:
    case = CASES["neox"]
    s = stack(case)
    workspace = torch.full((200_000,), 0xFF, dtype=torch.uint8)
    first = emulated(copied(s), case, 0, workspace=workspace)
    assert torch.equal(emulated(copied(s), case, 5, workspace=workspace), first)
    words = workspace.view(torch.int32)
    arrivals = case.layers * case.multiprocessors
    assert [int(words[i * 32]) for i in range(5)] == [arrivals] * 3 + [case.layers * case.heads, 0]
    assert words[160 : 160 + case.heads].tolist() == [case.layers * case.splits] * case.heads


@needs_emulator
def test_a_token_outside_of_the_cache_is_not_written() -> None:
    case = CASES["keys_behind_the_token"]
    s = stack(case)._replace(positions=torch.tensor([case.size]))
    mine = copied(s)
    emulated(mine, case)
    for before, after in zip((*s.key_caches, *s.value_caches), (*mine.key_caches, *mine.value_caches), strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


@needs_emulator
@pytest.mark.parametrize(
    "case",
    [Case(own_masks=True, multiprocessors=9), Case(**LLAMA),
     Case(head_dim=128, heads=2, kv_heads=2, size=200, live=190, mask="beyond", inner=64, layers=3)],
    ids=["neox", "llama", "many_slots"],
)  # fmt: skip
def test_every_access_is_ordered_with_those_of_other_threads(case: Case) -> None:
    emulated(stack(case), case, 1, races=True)


def plain(s: Any) -> Tensor:
    """A decoder of the GPT-NeoX or Llama kind written down directly, in float64, without its side effects."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if s.norm == "layer":
            return F.layer_norm(x, x.shape, weight, bias, s.eps)
        return F.rms_norm(x, x.shape, weight, s.eps) + (0 if bias is None else bias)

    def turn(x: Tensor) -> Tensor:
        if s.rotary_dim == 0:
            return x
        half, rotary = s.rotary_dim // 2, x[:, : s.rotary_dim]
        first, second = (rotary[:, ::2], rotary[:, 1::2]) if s.interleaved else (rotary[:, :half], rotary[:, half:])
        (c1, c2), (s1, s2) = (
            [table[0, 0, at : at + lanes[0] * (half - 1) + 1 : lanes[0]] for at in lanes[1:]]
            for table, lanes in ((s.cos, s.cos_lanes), (s.sin, s.sin_lanes))
        )
        turned = [first * c1 - second * s1, second * c2 + first * s2]
        joined = torch.stack(turned, -1).flatten(1) if s.interleaved else torch.cat(turned, 1)
        return torch.cat((joined, x[:, s.rotary_dim :]), 1)

    def of_head(x: Tensor, weights: list[Tensor], i: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[i] + s.qk_weight_offset, s.qk_eps) if weights else x

    x, count, ups = s.x[0, 0], len(s.in_weights) // s.layers, len(s.up_weights) // s.layers
    act = {"gelu": F.gelu, "silu": F.silu}[s.activation]
    for i in range(s.layers):
        y = norm(x, s.norm_weights[2 * i], s.norm_biases[2 * i])
        rows = [F.linear(y, s.in_weights[j], s.in_biases[j]) for j in range(i * count, i * count + count)]
        if count == 1:
            q, k, v = rows[0].view(s.heads, 3, s.head_dim).unbind(1)
        else:
            q, k, v = (r.view(-1, s.head_dim) for r in rows)
        q, k = of_head(q, s.q_norm_weights, i), of_head(k, s.k_norm_weights, i)
        mask = s.masks[i if len(s.masks) > 1 else 0][0, 0]
        place = int(s.positions[0]) if s.lengths == [] else int(s.lengths[i])
        keys, values = s.key_caches[i][0].clone(), s.value_caches[i][0].clone()
        keys[:, place], values[:, place] = turn(k), v
        keys, values = (t.repeat_interleave(s.heads // s.kv_heads, 0) for t in (keys, values))
        scores = (torch.einsum("hd,hsd->hs", turn(q), keys) * s.scale).masked_fill(~mask, -math.inf)
        attended = torch.einsum("hs,hsd->hd", scores.softmax(-1), values).flatten()
        attended = F.linear(attended, s.out_weights[i], s.out_biases[i])
        z = norm(x if s.parallel else x + attended, s.norm_weights[2 * i + 1], s.norm_biases[2 * i + 1])
        h = act(F.linear(z, s.up_weights[i * ups], s.up_biases[i * ups]))
        if s.gated:
            h = h * F.linear(z, s.up_weights[i * ups + 1], s.up_biases[i * ups + 1])
        x = x + attended + F.linear(h, s.down_weights[i], s.down_biases[i])
    if s.head_weight is None:
        return x[None, None]
    return F.linear(norm(x, s.head_norm_weight, s.head_norm_bias), s.head_weight, s.head_bias)[None, None]


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_decoder(name: str) -> None:
    s = known(copied(stack(CASES[name]), torch.float64))
    assert torch.allclose(plain(s), reference(*s))


def test_the_op_counts_the_lengths_and_the_versions_of_what_it_writes() -> None:
    s = known(stack(Case()))
    versions = [t._version for t in (*s.key_caches, *s.lengths)]
    with torch.no_grad():
        op(*s)
    assert [int(n) for n in s.lengths] == [21, 21]
    assert all(t._version > v for t, v in zip((*s.key_caches, *s.lengths), versions, strict=True))


def test_calls_that_are_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(module, "check", lambda s: checked.append(s) or check(s))
    calls = importlib.import_module("torch_fuse.kernels._decode_stack_calls")
    monkeypatch.setattr(calls, "_known", {})
    s = known(stack(Case(layers=1)))
    with torch.no_grad():
        op(*copied(s))
        op(*copied(s))
        assert len(checked) == 1
        shared = s.norm_weights[0]
        for other in (
            s._replace(x=torch.zeros(1, 1, 128).half()[:, :, ::2]), s._replace(eps=1e-3),
            s._replace(norm_weights=[shared, shared]), s._replace(up_biases=[None]),
            s._replace(head_bias=s.x[0, 0, :50]),
        ):  # fmt: skip
            op(*other)
        assert len(checked) == 6
        with pytest.raises(ValueError, match="down_weights"):
            op(*s._replace(down_weights=[s.down_weights[0][:, :8]]))


def test_the_op_compiles_without_a_copy_of_the_caches() -> None:
    s, graphs = known(stack(Case())), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    wanted = reference(*copied(s))
    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        found = torch.compile(lambda *given: op(*given), backend=aot_autograd(fw_compiler=backend))(*s)
    assert torch.equal(found, wanted)
    assert [int(n) for n in s.lengths] == [21, 21]
    assert not [node for node in graphs[0].graph.nodes if "clone" in str(node.target)]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(1, 2, 64)}, "x.shape"),
    "norm": ({"norm": "batch"}, "norm"),
    "activation": ({"activation": "relu"}, "activation"),
    "kv_heads": ({"kv_heads": 3}, "kv_heads"),
    "weights": ({"out_weights": []}, "out_weights"),
    "projections": ({"in_weights": [torch.zeros(192, 64)] * 3}, "in_weights"),
    "layout": ({"layout": [0, 0, 48, 0, 16, 48, 0, 32, 64]}, "layout"),
    "lengths": ({"positions": torch.tensor([3])}, "lengths"),
    "masks": ({"masks": [torch.ones(1, 1, 1, 39, dtype=torch.bool)]}, "masks"),
    "head": ({"head_weight": None}, "head_norm"),
    "rotary_dim": ({"rotary_dim": 7}, "rotary_dim"),
    "q_norm_weights": ({"q_norm_weights": [torch.zeros(16)]}, "q_norm_weights"),
    "k_norm_weights": ({"q_norm_weights": [torch.zeros(16)] * 2}, "k_norm_weights"),
    "k_norm": ({"q_norm_weights": [torch.zeros(16)] * 2, "k_norm_weights": [torch.zeros(8)] * 2}, "k_norm_weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    changed, argument = WRONG[name]
    with pytest.raises(ValueError, match=rf"decode_stack: (len\()?{argument}"):
        op(*stack(Case())._replace(**changed))


def test_what_the_kernel_cannot_take_has_a_reason() -> None:
    s = stack(Case())
    assert launching.supports(s, H200) is None
    assert "cpu" in str(module.supports(*s))
    assert "meta" in str(launching.supports(s._replace(lengths=[n.to("meta") for n in s.lengths]), H200))
    strided = torch.zeros(64, 512, dtype=torch.float16)[:, ::2]
    for changed, reason in [
        ({"x": s.x.float()}, "dtype"),
        ({"down_weights": [strided, strided]}, "strides"),
        ({"up_weights": [s.up_weights[0], s.up_weights[1][:128]]}, "MLPs"),
        ({"layout": [0, 4, 48, 0, 16, 48, 0, 32, 48]}, "multiples of 8"),
        ({"cos": s.cos.double()}, "cos"),
        ({"positions": torch.tensor([3.0]), "lengths": []}, "positions"),
    ]:
        assert reason in str(launching.supports(s._replace(**changed), H200))
    assert "share" in str(launching.misplaced(s._replace(lengths=[s.lengths[0]] * 2)))
    assert "16 bytes" in str(
        launching.misplaced(s._replace(head_weight=torch.zeros(51 * 64 + 1).half()[1:].view(51, 64)))
    )


def test_all_of_the_shared_memory_is_rings_and_no_warp_idles() -> None:
    fitting = plan(PYTHIA_28B, H200)
    assert isinstance(fitting, Plan)
    constants = fitting.constants
    assert constants["MATRIX_WARPS"] == 10 and fitting.threads == 512
    assert constants["SLOTS"] * constants["SLOT_BYTES"] >= 140_000
    assert constants["KEY_SLOTS"] * constants["KEY_SLOT_BYTES"] >= 60_000
    alone = plan(PYTHIA_28B, H200, keys=0)
    assert isinstance(alone, Plan) and alone.threads == 480
    assert alone.constants["SLOTS"] * alone.constants["SLOT_BYTES"] >= 200_000
    assert fitting.shared_bytes <= H200.shared_bytes
    assert "columns" in str(plan(PYTHIA_28B._replace(width=16384), H200))
    assert "registers" in str(plan(PYTHIA_28B._replace(inner=65536), H200))
    assert "shared memory" in str(plan(PYTHIA_28B, Device(132, 65536)))
    assert "multiprocessors" in str(plan(PYTHIA_28B, Device(16, 232448)))
    assert "a chunk has" in str(plan(PYTHIA_28B._replace(width=64), H200, round_rows=16))


def no_compiler() -> bool:
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) != 0
    except (ImportError, RuntimeError):
        return True


@pytest.mark.skipif(no_compiler(), reason="NVRTC is not there")
def test_the_kernel_compiles_for_hopper() -> None:
    case = Case()
    fitting = plan(launching.sizes_of(stack(case)), H200)
    assert isinstance(fitting, Plan)
    binary = _cuda.compiled("decode_stack", tuple(launching.constants(stack(case), fitting).items()))
    assert binary[:4] == b"\x7fELF"
