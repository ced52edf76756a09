"""dequant_linear's persistent kernel against float64, in the CPU emulator, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from cuda_emulation import EmulatedKernel, guarded, unavailable
from numerics import error_beyond_rule
from torch import Tensor

from torch_fuse.kernels import _cuda
from torch_fuse.kernels import _dequant_ring as ring
from torch_fuse.kernels.dequant_linear import reference
from torch_fuse.kernels.packed_weight import Format, decode

needs_emulator = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SHARED = 100_000


class Case(NamedTuple):
    form: Format
    n: int = 48
    k: int = 512
    m: int = 3
    dtype: torch.dtype = torch.float16
    scale: torch.dtype = torch.float16
    zero: torch.dtype | None = None
    biased: bool = False
    activation: str = "none"
    choices: Mapping[str, int] = MappingProxyType({})
    blocks: int = 2


INT4 = Format(4, "uint", 1, 128, compute="float16")
INT8 = Format(8, "int", 1, 512, compute="float16")
CASES = {
    "int4_zero": Case(INT4, zero=torch.float16, choices={"warps": 2}),
    "int4_signed_bfloat_bias": Case(INT4._replace(kind="int", compute="bfloat16"), m=8, dtype=torch.bfloat16,
                                    scale=torch.bfloat16, biased=True, choices={"warps": 3, "slots": 2}),
    "int4_offset_tail": Case(INT4._replace(offset=8, nibbles="high", group=256), n=40, m=1, zero=torch.uint8,
                             choices={"segments": 2, "slots": 3}),
    "int4_segments_of_unequal_size": Case(INT4._replace(compute="float32"), n=80, k=640, m=5, scale=torch.float32,
                                          zero=torch.int8, choices={"segments": 2, "warps": 2, "slots": 2}),
    "int4_bfloat_zero_twelve_rows": Case(INT4, m=12, dtype=torch.bfloat16, zero=torch.bfloat16, activation="silu",
                                         choices={"warps": 2}),
    "int4_x_in_shared_memory": Case(INT4, k=1152, m=5, zero=torch.float16, choices={"warps": 1, "slots": 2}),
    "int8_one_row_in_shared_memory": Case(INT8._replace(group=1088), k=1088, m=1, biased=True, choices={"warps": 1}),
    "int8": Case(INT8, n=56, m=8, biased=True, choices={"warps": 3, "slots": 2}),
    "int8_unsigned_groups": Case(INT8._replace(kind="uint", offset=128, group=128), m=2, zero=torch.float32,
                                 choices={"segments": 3, "warps": 2}),
    "int8_bfloat": Case(INT8._replace(compute="bfloat16"), m=4, dtype=torch.bfloat16, scale=torch.bfloat16),
    "int8_bfloat_unsigned": Case(INT8._replace(kind="uint", offset=3), m=16, dtype=torch.bfloat16,
                                 choices={"warps": 4}),
}  # fmt: skip


def parts(case: Case) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    form, groups = case.form, (case.n, case.k // min(case.form.group, case.k))
    codes = torch.randint(0, 256, (case.n, case.k * form.bits // 8), dtype=torch.uint8)
    if form.bits == 8 and form.kind == "int":
        codes = codes.view(torch.int8)
    scale = (torch.rand(groups) + 0.5).mul(0.01).to(case.scale)
    zero = None if case.zero is None else torch.randint(0, 16, groups).to(case.zero)
    bias = torch.randn(case.n).to(case.dtype) if case.biased else None
    x = (torch.randn(case.m, case.k) + 0.3).to(case.dtype)
    return x, codes, scale, zero, bias


def kind(case: Case, given: tuple[Any, ...]) -> ring.Kind:
    x, _, scale, zero, bias = given
    return ring.kind_of(x, scale, zero, bias, case.form, case.activation)


def emulated(case: Case, given: tuple[Any, ...], seed: int = 0, races: bool = False) -> Tensor:
    fitting = ring.plan(kind(case, given), ring.Device(case.blocks, SHARED), **case.choices)
    assert isinstance(fitting, ring.Plan), fitting
    kernel = EmulatedKernel(_cuda.SOURCES / "dequant_ring.cu", "dequant_ring", dict(fitting.constants), races)
    held = [None if t is None else guarded(t) for t in given]
    out = guarded(torch.full((case.m, case.n), float("nan"), dtype=case.dtype))
    kernel(case.blocks, fitting.threads, fitting.shared_bytes, [ring.arguments(*held, out)], seed=seed)
    return out


@needs_emulator
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_float64_in_any_order_of_its_threads(name: str) -> None:
    case = CASES[name]
    given = parts(case)
    x, codes, scale, zero, bias = given
    assert ring.no_layout(x, codes, scale, zero, case.form) is None
    wide = [None if t is None else t.double() for t in (x, bias)]
    weight = decode(codes, scale, zero, None, case.form._replace(compute="float32"), torch.float64)
    exact = torch.nn.functional.linear(wide[0], weight, wide[1])
    chain = reference(x, codes, scale, zero, None, bias, *case.form)
    if case.activation == "silu":
        exact, chain = torch.nn.functional.silu(exact), torch.nn.functional.silu(chain)
    results = [emulated(case, given, seed) for seed in (0, 1, 6)]
    assert not error_beyond_rule(exact, chain, results[0])
    assert all(torch.equal(result, results[0]) for result in results)


@needs_emulator
@pytest.mark.parametrize("name", ["int4_offset_tail", "int8"])
def test_every_access_is_ordered_with_those_of_other_threads(name: str) -> None:
    emulated(CASES[name], parts(CASES[name]), 1, races=True)
