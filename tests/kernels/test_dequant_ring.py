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
from torch_fuse.kernels import _dequant_dispatch as dispatch
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
    "int4_signed": Case(INT4._replace(kind="int"), m=2, choices={"warps": 4}),
    "int8_signed_many_tiles": Case(INT8, n=96, m=2, choices={"warps": 4, "slots": 4}, blocks=1),
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
@pytest.mark.parametrize("name", ["int4_offset_tail", "int8_one_row_in_shared_memory", "int8_signed_many_tiles"])
def test_every_access_is_ordered_with_those_of_other_threads(name: str) -> None:
    emulated(CASES[name], parts(CASES[name]), 1, races=True)


@needs_emulator
def test_rows_of_x_that_are_not_there_do_not_matter() -> None:
    case = CASES["int4_x_in_shared_memory"]
    given = parts(case)
    for m in (1, 2):
        few = (given[0][:m], *given[1:])
        assert torch.equal(emulated(case._replace(m=m), few), emulated(case, given)[:m])


def test_large_codes_and_zero_points_lose_nothing_by_being_subtracted_from_sums() -> None:
    """The subtraction is of numbers of fp32 that are at most 16 (int4) or 255 times the terms of the result."""
    if unavailable() is not None:
        pytest.skip(str(unavailable()))
    case = CASES["int4_zero"]
    x, codes, scale, zero, bias = parts(case)
    x = x + 100.0  # sums of x are far from 0, and sums of the products as well
    weight = decode(codes, scale, zero, None, case.form._replace(compute="float32"), torch.float64)
    found = emulated(case, (x, codes, scale, zero, bias))
    assert not error_beyond_rule(
        x.double() @ weight.t(), reference(x, codes, scale, zero, None, bias, *case.form), found
    )


H200 = ring.Device(132, 232448)


def of_size(k: int, rows: int = 8, form: Format = INT4, **choices: int) -> dict[str, int] | str:
    zero = torch.float16 if form.bits == 4 else None
    kind = ring.Kind(form._replace(group=min(form.group, k) if form.bits == 4 else k), k, torch.float16, torch.float16,
                     zero, False, rows=rows)  # fmt: skip
    fitting = ring.plan(kind, H200, **choices)
    return fitting if isinstance(fitting, str) else dict(fitting.constants) | {"bytes": fitting.shared_bytes}


def test_the_ring_takes_the_shared_memory_and_x_the_registers() -> None:
    for k, form in ((4096, INT4), (2560, INT4), (4096, INT8), (2560, INT8)):
        found = of_size(k, 8, form)
        assert isinstance(found, dict) and found["X_ROWS"] == 0
        assert 190_000 < found["SLOTS"] * found["SLOT_BYTES"] < found["bytes"] <= H200.shared_bytes
    long = of_size(8192)
    assert isinstance(long, dict) and long["X_ROWS"] == 8 and long["SLOTS"] >= 4
    assert "rows of x" in str(of_size(14336, 8))
    assert isinstance(of_size(14336, 4), dict)
    assert of_size(4096, slots=2)["PRODUCERS"] == 2  # type: ignore[index]
    assert "2" in str(of_size(4096, slots=7))


def test_what_the_kernel_cannot_take_has_a_reason() -> None:
    x, codes, scale, zero, _ = parts(CASES["int4_zero"])
    assert ring.no_layout(x, codes, scale, zero, INT4) is None
    assert "cpu" in str(ring.kernel_for(x, codes, scale, zero, None, INT4))
    for changed, reason in [
        ({"x": x.float()}, "dtype"),
        ({"x": x.repeat(6, 1)}, "18 rows"),
        ({"x": x[:, :448], "codes": codes[:, :224]}, "K = 448"),
        ({"codes": codes[:, ::1].t().contiguous().t()}, "contiguous"),
        ({"codes": codes[:8], "scale": scale[:8], "zero": zero[:8]}, "8 rows of the weight"),
        ({"scale": scale[:35], "codes": codes[:35], "zero": zero[:35].to(torch.uint8)}, "multiple of 16 bytes"),
        ({"zero": zero.double()}, "zero points"),
        ({"form": INT4._replace(group=64)}, "groups of 64"),
        ({"form": INT4._replace(arithmetic="mul_add")}, "mul_add"),
        ({"form": INT4._replace(kind="lut16")}, "lut16"),
        ({"form": INT4._replace(nibbles="half")}, "half"),
    ]:  # fmt: skip
        given = {"x": x, "codes": codes, "scale": scale, "zero": zero, "form": INT4} | changed
        assert reason in str(ring.no_layout(**given)), reason


def no_compiler() -> bool:
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) != 0
    except (ImportError, RuntimeError):
        return True


@pytest.mark.skipif(no_compiler(), reason="NVRTC is not there")
@pytest.mark.parametrize("early", [False, True])
def test_the_kernel_compiles_for_hopper(early: bool) -> None:
    kind = ring.Kind(INT4, 4096, torch.float16, torch.float16, torch.float16, True, "gelu_tanh", 8, early)
    fitting = ring.plan(kind, H200)
    assert isinstance(fitting, ring.Plan)
    assert _cuda.compiled("dequant_ring", fitting.constants)[:4] == b"\x7fELF"


@pytest.mark.parametrize(("allowed", "least"), [(2, 0), (3, 0), (3, 48 * 512), (3, 48 * 512 + 1)])
def test_the_op_takes_it_for_few_rows_of_a_large_weight(monkeypatch: Any, allowed: int, least: int) -> None:
    rows = 3
    x, codes, scale, zero, _ = parts(CASES["int4_zero"])
    marker = torch.zeros(rows, 48, dtype=torch.float16)
    monkeypatch.setattr(dispatch, "RING_ROWS", allowed)
    monkeypatch.setattr(dispatch, "RING_SIZE", least)
    monkeypatch.setattr(ring, "kernel_for", lambda *_: object())
    monkeypatch.setattr(ring, "ring_linear", lambda *_: marker)
    for other in (dispatch.few, dispatch.tiled):
        monkeypatch.setattr(other, "supports", lambda *_: "not here")
    monkeypatch.setattr(dispatch.written, "decode_on_device", lambda *_: torch.zeros(48, 512, dtype=torch.float16))
    taken = dispatch.run(x, codes, scale, zero, None, None, INT4) is marker
    assert taken == (rows <= allowed and least <= 48 * 512)


class Recorder:
    """A driver that launches nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("CU_", "CUlaunch")):
            return getattr(pytest.importorskip("cuda.bindings.driver"), name)
        return lambda *given: self.calls.append((name, given)) or (0,)


@pytest.mark.parametrize("early", [False, True])
def test_a_launch_begins_early_only_where_asked(monkeypatch: Any, early: bool) -> None:
    kernel = object.__new__(_cuda.Kernel)
    kernel._driver, kernel._grid, kernel._threads, kernel._shared_bytes = Recorder(), 132, 640, 1000
    kernel._index, kernel._function, kernel._early = 0, 7, {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernel, "_need_context", lambda: None)
    kernel.start(b"arguments", 99, early)
    ((name, given),) = kernel._driver.calls
    if early:
        assert name == "cuLaunchKernelEx" and (given[0].gridDimX, given[0].blockDimX, int(given[0].hStream)) == (
            132,
            640,
            99,
        )
        assert given[0].attrs[0].value.programmaticStreamSerializationAllowed == 1
    else:
        assert name == "cuLaunchKernel" and given[:9] == (7, 132, 1, 1, 640, 1, 1, 1000, 99)
