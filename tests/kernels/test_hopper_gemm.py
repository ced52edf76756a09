"""Hopper's GEMM with an epilogue: what can be known without a GPU, and, on a Hopper GPU, its results."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.kernels import _hopper_gemm, _linear_skip_hopper, _ops
from torch_fuse.kernels._linear_skip_common import MODES, Operands, Spec

module = importlib.import_module("torch_fuse.kernels.linear_skip")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def case(batch: int = 2, length: int = 150, width: int = 192, inner: int = 192, dtype: torch.dtype = torch.bfloat16,
         x_dtype: torch.dtype | None = None, device: str = "cpu") -> Operands:  # fmt: skip
    torch.manual_seed(0)
    y, x = torch.randn(batch, length, inner), torch.randn(batch, length, width)
    weight, bias = torch.randn(width, inner) / inner**0.5, torch.randn(width)
    given = [z.to(device, dtype) for z in (y, weight, bias)]
    return Operands(*given, x.to(device, x_dtype or dtype), None, torch.randn(width, device=device))


def descriptor(rows: int, lanes: int, dtype: str = "bf16") -> str:
    layout = _hopper_gemm.gl.NVMMASharedLayout.get_default_for([rows, lanes], _hopper_gemm.gl.bfloat16)
    return f"tensordesc<{dtype}[{rows}, {lanes}],{layout!r}>"


@pytest.mark.skipif(not _ops.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (_hopper_gemm.Config(64, 256, 3), "sum"),
        (_hopper_gemm.Config(128, 128, 3, True), "gelu"),
        (_hopper_gemm.Config(64, 128, 4, groups=3, early=True), "sum"),
    ],
)
def test_the_kernel_compiles_with_this_triton(how: _hopper_gemm.Config, mode: str) -> None:
    """Without a GPU; neither spilled registers nor more shared memory than there is, and products on tensor cores."""
    if _hopper_gemm.MISSING or _ops.INTERPRETED:
        pytest.skip(_hopper_gemm.MISSING or "interpreted")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    skip = mode == "sum"
    known: dict[str, Any] = {
        "N": 768, "K": 768, "A": "none", "B": "lane" if skip else "none", "MODE": mode, "ONE_A": True, "ONE_B": True,
        "W_ROWS": skip, "SHARED": how.shared, "BLOCK_M": how.block_m, "BLOCK_N": how.block_n, "BLOCK_K": 64,
        "PART": 64, "RING": _hopper_gemm.ring(how.block_n, skip), "STAGES": how.stages, "TOGETHER": 8, "a": None,
        "EARLY": how.early, "A_OF": "x", "B_OF": "div tanh x sqrt add:1.0 square x" if skip else "x",
    }  # fmt: skip
    parts = descriptor(how.block_m, 64)
    weight = descriptor(how.block_n, 64) if skip else descriptor(64, how.block_n)
    kinds = {"y": parts, "w": weight, "out": parts, "bias": "*bf16", "alpha": "fp32", "beta": "fp32"}
    if skip:
        kinds |= {"x": parts, "b": "*fp32"}
        known["linear"] = None
    else:
        kinds["linear"] = parts
        known |= {"x": None, "b": None}
    names = _hopper_gemm.kernel.arg_names
    signature = {name: "constexpr" if name in known else kinds.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    source = GluonASTSource(fn=_hopper_gemm.kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "launch_pdl": how.early}
    compiled = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # Each role waits for the launch before, of which the epilogue's operands may come.
    assert compiled.asm["ptx"].count("griddepcontrol.wait") == (how.groups + 1 if how.early else 0)
    assert compiled.asm["ptx"].count("wgmma.mma_async") > 0
    fixed = (2, skip, not skip, 2 if skip else 1)
    assert _hopper_gemm.stages_that_fit(how, *fixed) == how.stages
    assert compiled.metadata.shared <= _hopper_gemm.SHARED


def test_a_tile_is_chosen_for_every_size_and_fits() -> None:
    for rows in (1, 512, 4096, 32768):
        for columns in (256, 768, 1536):
            for itemsize, keep in ((2, False), (2, True), (4, False), (4, True)):
                how = _hopper_gemm.config(rows, columns, itemsize, True, keep, 3)
                assert how is not None and how.stages >= 3
                assert _hopper_gemm.stages_that_fit(how, itemsize, True, keep, 3) == how.stages
    small, large = (_hopper_gemm.config(rows, 768, 2, True, False, 1) for rows in (256, 32768))
    assert small.block_m * small.block_n < large.block_m * large.block_n


@pytest.mark.parametrize("block_n", sorted({how.block_n for how in _hopper_gemm.CONFIGS}))
@pytest.mark.parametrize("skip", [False, True])
def test_a_part_has_the_place_of_the_part_a_ring_before(block_n: int, skip: bool) -> None:
    """Across tiles, too: the epilogue waits for all stores but the last RING - 1, then writes to `part % RING`."""
    ring = _hopper_gemm.ring(block_n, skip)
    places = [part % ring for _ in range(3) for part in range(block_n // _hopper_gemm.PART)]
    assert all(place not in places[max(0, i - ring + 1) : i] for i, place in enumerate(places))
    assert not skip or ring == block_n // _hopper_gemm.PART


def test_what_the_memory_engine_cannot_read_is_named() -> None:
    x = torch.empty(40, 72, dtype=torch.bfloat16)
    for read in (x, x[:, 8:], x[:1], x.float()[:, 4:]):
        assert _hopper_gemm.cannot_read("x", read) is None
    for refused, words in (
        (x[:, 4:], "x begins at no multiple of 16 bytes"),
        (x.t(), "x.stride(1) is 72; allowed: 1"),
        (torch.empty(40, 30).bfloat16(), "x.stride(0) is 30; allowed: multiples of 8"),
        (x[:1].expand(4, 72), "x.stride(0) is 0; allowed: multiples of 8"),
    ):
        assert _hopper_gemm.cannot_read("x", refused) == words


def test_rows_of_a_view_are_found_without_a_copy_or_not_at_all() -> None:
    x = torch.randn(3, 4, 8)
    for view in (x, x[:1], x[:, :1], torch.cat([x, x], 2)[..., :8], x.transpose(0, 1)[:1]):
        rows = _linear_skip_hopper.rows_of(view)
        assert rows is not None and rows.data_ptr() == view.data_ptr()
        assert torch.equal(rows, view.reshape(-1, 8))
    assert _linear_skip_hopper.rows_of(x.transpose(0, 1)) is None
    assert _linear_skip_hopper.rows_of(x[:, :3]) is None


@pytest.mark.parametrize("takes", [True, False])
def test_the_op_goes_by_hopper_and_by_the_tiled_kernel_where_it_cannot(
    takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eager mode and compiled, with gradients; the kernels are stood in for."""
    seen: list[str] = []

    def by_hopper(t: Operands, spec: Spec, out: Tensor, linear: Tensor | None, how: Any) -> bool:
        seen.append("hopper")
        if takes:
            found = module.reference(*t, *spec)
            out.copy_(found[0])
            if linear is not None:
                linear.copy_(found[1])
        return takes

    def tiled(t: Operands, spec: Spec) -> tuple[Tensor, Tensor]:
        seen.append("tiled")
        return module.reference(*t, *spec)

    monkeypatch.setattr(module, "supports", lambda *_: None)
    monkeypatch.setattr(_linear_skip_hopper, "cannot_take", lambda *_: None)
    monkeypatch.setattr(_linear_skip_hopper, "launch", by_hopper)
    monkeypatch.setattr(module, "_tiled", tiled)

    def forward(*given: Tensor) -> Tensor:
        y, weight, bias, x, b = given
        return module.linear_skip(y, weight, bias, x, None, b, 1.0, 1.0, "sum", True, torch.float32)[0]

    t = case(length=5, dtype=torch.float32)
    leaves = [z.requires_grad_() for z in t if z is not None]
    exact = torch.autograd.grad((t.x + t.b * F.linear(t.y, t.weight, t.bias)).square().sum(), leaves)
    torch._dynamo.reset()
    for call in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        for wanted, ours in zip(exact, torch.autograd.grad(call(*leaves).square().sum(), leaves), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert seen == ["hopper"] * 2 if takes else ["hopper", "tiled"] * 2


def test_what_hopper_takes_is_said() -> None:
    t, spec = case(), Spec(1.0, 1.0, "sum", False, torch.bfloat16)
    if not HOPPER:
        assert _linear_skip_hopper.cannot_take(t, spec) is not None
        return
    t = case(device="cuda")
    assert _linear_skip_hopper.cannot_take(t, spec) is None
    assert "x.dtype" in str(_linear_skip_hopper.cannot_take(t, spec._replace(out_dtype=torch.float32)))
    assert "y.dtype" in str(_linear_skip_hopper.cannot_take(t._replace(y=t.y.float()), spec))


# -- on a Hopper GPU -------------------------------------------------------------------------------------------------


def assert_right(t: Operands, spec: Spec, how: _hopper_gemm.Config | None = None) -> None:
    results = [t.x.new_full(t.x.shape, float("nan")), t.y.new_full(t.x.shape, float("nan"))]
    for _ in range(2):  # the second by the launch that is kept
        assert _linear_skip_hopper.launch(t, spec, results[0], results[1] if spec.save_linear else None, how)
    wide = Operands(*(None if z is None else z.double() for z in t))
    exact, linear = module.reference(*wide, *spec._replace(save_linear=True, out_dtype=torch.float64))
    bound = 2 * torch.finfo(t.y.dtype).eps
    torch.testing.assert_close(results[0].double(), exact, rtol=bound, atol=bound)
    if spec.save_linear:
        torch.testing.assert_close(results[1].double(), linear, rtol=bound, atol=bound)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (64, 128), (64, 256), (128, 128)])
def test_every_tile(block_m: int, block_n: int, ping_pong: bool) -> None:
    assert_every_size(_hopper_gemm.Config(block_m, block_n, 3, ping_pong, together=2))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("block_n", [64, 128])
def test_three_groups_on_a_tile_and_early_launches(block_n: int) -> None:
    assert_every_size(_hopper_gemm.Config(64, block_n, 3, together=2, groups=3, early=True))
    assert_every_size(_hopper_gemm.Config(64, block_n, 3, True, together=2, early=True))


def assert_every_size(how: _hopper_gemm.Config) -> None:
    """Several tiles for each program, and some that end outside; the ring is longer than the product and shorter."""
    for rows, inner in ((64, 64), (5000, 192), (9001, 768)):
        t = case(1, rows, 336, inner, device="cuda")
        assert_right(t, Spec(1.0, 1.0, "sum", False, torch.bfloat16), how)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", [False, True])
def test_every_mode_coefficient_and_layout(mode: str, save: bool) -> None:
    for x_dtype in (torch.bfloat16, torch.float32):
        t = case(3, 333, 336, 192, x_dtype=x_dtype, device="cuda")
        spec = Spec(1.0, 0.5, mode, save, x_dtype)
        for b in (None, torch.rand(3, 1, 1), torch.rand(3, 333, 1), torch.rand(336), torch.rand(3, 1, 336)):
            given = t._replace(b=None if b is None else b.cuda())
            if mode == "sum":
                given, spec = given._replace(a=given.b), spec._replace(alpha=-1.5)
            assert_right(given, spec)
        assert_right(t._replace(weight=t.weight.t().contiguous().t(), bias=None), spec)
        assert_right(t._replace(x=torch.cat([t.x, t.x], 2)[..., 336:]), spec)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kind", ["row", "lane", "full"])
def test_functions_of_coefficients(kind: str) -> None:
    t = case(3, 333, 336, 192, device="cuda")
    size = {"row": (3, 1, 1), "lane": (336,), "full": (3, 1, 336)}[kind]
    t = t._replace(a=torch.rand(size, device="cuda") + 0.1, b=torch.rand(size, device="cuda") + 0.1)
    for a_of, b_of in (
        ("rdiv:0.25 add:0.25 square x", "div mul:0.5 x sqrt add:0.25 square x"),
        ("rdiv:1.0 add cos x sin x", "div neg sin x add cos x sin x"),
        ("rsub:1.0 sigmoid x", "mul tanh x exp neg x"), ("rsqrt x", "sub reciprocal x mul x x"),
    ):  # fmt: skip
        assert_right(t, Spec(1.0, 1.0, "sum", False, torch.bfloat16, a_of, b_of))
