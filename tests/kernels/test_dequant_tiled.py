"""Some rows times a weight of codes on Hopper: the order of the columns, the kernel compiled, and its results."""

from __future__ import annotations

import contextlib

import pytest
import torch
from test_dequant_kernels import DEVICE, FORMATS, RUNS, Parts, parts

from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import _dequant_tiled as tiled
from torch_fuse.kernels import _ops
from torch_fuse.kernels._dequant_codes import order
from torch_fuse.kernels._dequant_tiled_kernel import MISSING
from torch_fuse.kernels.packed_weight import COMPUTE, Format, decode, unpacked, weight_shape

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def operands(codes: torch.Tensor, form: Format, tile: int) -> torch.Tensor:
    """The codes [N, K] in the order in which the kernel multiplies them: `_operand` in torch."""
    read = codes.flatten(1)
    n = read.shape[0]
    words = read.view(n, -1, 4)[..., list(order(form))]  # four bytes a step of the conversion, as its results come
    sides = [words] if form.bits == 8 else [words & 15, words >> 4]
    lanes = [side.reshape(n, -1, 4, 2, tile // 32, 2, 2).permute(0, 1, 3, 4, 5, 2, 6) for side in sides]
    return torch.stack([lane.reshape(n, -1, tile // 2) for lane in lanes], 2).flatten(1)


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("name", ["uint8_groups", "uint4_high_zero", "uint4_half", "uint4_half_high_zero", "nf4"])
def test_activations_have_the_order_of_the_weight(name: str, tile: int) -> None:
    form, _, run = FORMATS[name]
    codes = parts(form, 12, 256, run=run)[0]
    x = torch.randint(-8, 9, (3, 256), device=DEVICE).half()
    found = tiled.arranged(x, codes, form, tile).double() @ operands(codes, form, tile).double().t()
    assert torch.equal(found, x.double() @ unpacked(codes, form).double().t())


def compiled(form: Format, found: Parts, dtype: torch.dtype, chosen: tiled.Config) -> tuple[str, int]:
    """The kernel for sm_90, without a GPU, and its shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    codes, scale, zero, lut = found
    _, k = weight_shape(codes, form)
    x = torch.empty(64, k, dtype=dtype)
    assert tiled.no_layout(x, codes, scale, zero, lut, form) is None
    known = tiled.constants(x, codes, zero, None, form, chosen)
    hash(tuple(known.values()))  # a launch's key
    gl, tile = tiled.gl, known["TILE"]
    width = tile * 4 // form.bits
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    x_layout = gl.NVMMASharedLayout.get_default_for([chosen.block_m, width], gl.float16)
    w_layout = gl.NVMMASharedLayout.get_default_for([64, tile], gl.uint8)
    kinds = {
        "x": f"tensordesc<{short[dtype]}[{chosen.block_m}, {width}],{x_layout!r}>",
        "codes": f"tensordesc<u8[64, {tile}],{w_layout!r}>", "M": "i32", "N": "i32",
        "out": "*fp32" if chosen.parts > 1 else f"*{short[dtype]}",
        **{name: f"*{short[(scale if part is None else part).dtype]}"
           for name, part in (("scale", scale), ("zero", zero), ("lut", lut), ("bias", None))},
    }  # fmt: skip
    names = tiled.kernel.arg_names
    signature = {name: "constexpr" if name in known else kinds[name] for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("scale", "zero", "lut", "out", "N")}
    source = GluonASTSource(fn=tiled.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "maxnreg": tiled.registers(chosen)[0]}
    done = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return done.asm["ptx"], done.metadata.shared


COMPILED = {
    "int8_per_row": (torch.float16, tiled.Config(64, 2, 1, 1, 128)),
    "uint4_high_zero": (torch.float16, tiled.Config(64, 4, 1, 3, 64)),
    "uint4_half_high_zero": (torch.float16, tiled.Config(128, 1, 2, 1, 64)),
    "fp8_blocks": (torch.bfloat16, tiled.Config(256, 2, 1, 1, 64)),
    "int4_low": (torch.float16, tiled.Config(128, 3, 1, 1, 64)),
    "nf4": (torch.float16, tiled.Config(64, 2, 1, 1, 64, early=True)),
}


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED or bool(MISSING), reason="compiles Gluon")
@pytest.mark.parametrize("name", COMPILED)
def test_the_weight_is_multiplied_from_registers(name: str) -> None:
    """No tile goes back to shared memory, and no more of that is taken than there is."""
    form, zero, run = FORMATS[name]
    dtype, chosen = COMPILED[name]
    found = parts(form, 128, 1024, zero, run=run)
    found = tuple(None if part is None else part.cpu() for part in found)  # type: ignore[assignment]
    form = form._replace(group=1024) if form.group == 256 else form
    ptx, shared = compiled(form, found, dtype, chosen)
    assert shared <= tiled.SHARED // chosen.programs
    steps = [step.split("wgmma.wait_group.sync.aligned 0")[0] for step in ptx.split("mbarrier.try_wait")[1:]]
    steps = [step for step in steps if "wgmma.mma_async" in step]
    assert ("griddepcontrol.wait" in ptx) is chosen.early
    assert len(steps) == chosen.teams, "products are under way between two turns of the loop"
    for step in steps:
        assert "st.shared" not in step and "shfl" not in step, "a layout is converted in the loop"
        assert "wgmma.mma_async.sync.aligned.m64n" in step


@pytest.mark.skipif(_ops.INTERPRETED or bool(MISSING), reason="needs Gluon's layouts")
@pytest.mark.parametrize("name", ["fp8_blocks", "uint4_high_zero"])
@pytest.mark.parametrize("chosen", [tiled.Config(64, 2, 1, 1, 64, early=True), tiled.Config(32, 4, 1, 3, 64)])
def test_launches_have_what_the_kernels_ask_for(
    name: str, chosen: tiled.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = []
    monkeypatch.setattr(tiled, "launch", lambda *given: launches.append(given))
    monkeypatch.setattr(tiled, "on_device_of", lambda x: contextlib.nullcontext())
    form, zero, _ = FORMATS[name]
    found = parts(form, 300, 1024, zero)
    x = torch.empty(2, 40, 1024, dtype=torch.float16, device=DEVICE)
    assert tiled.tiled_linear(x, *found, None, form, chosen).shape == (2, 40, 300)
    for kernel, _, arguments, constants in launches:
        options = {"num_warps", "maxnreg", "launch_pdl"} & set(constants)
        assert list(kernel.arg_names[len(arguments) :]) == [name for name in constants if name not in options]
        hash((*map(_ops._kind, arguments), *constants.values()))
    grids = [grid for _, grid, *_ in launches]
    tiles = 2 * 3 if chosen.parts == 1 else 3 * 2 * 3
    assert grids == [80 * 2, tiles] if chosen.parts == 1 else [80 * 2, tiles, 24]


@pytest.mark.skipif(_ops.INTERPRETED or bool(MISSING), reason="needs Gluon's layouts")
def test_configurations_fit() -> None:
    for rows in (17, 64, 128, 256, 512):
        for form in (Format(8, "int", 1, 2560), Format(4, "uint", 1, 128)):
            chosen = tiled.config(rows, 10240, 2560, form)
            assert tiled.stages_that_fit(chosen, chosen.tile, form.bits) >= 3
            assert chosen.parts == 1
            launched, each = tiled.registers(chosen)
            assert launched * 128 * (chosen.teams + 1) * chosen.programs <= 65536
            assert each >= chosen.block_m // 2 + 64, "sums and operands need registers"
    assert tiled.config(512, 10240, 2560, form)[:2] == (128, 3) and tiled.config(512, 14336, 4096, form)[:2] == (256, 2)
    assert tiled.config(64, 4096, 4096, Format(8, "int", 1, 4096)).parts == 4


def test_what_cannot_be_read_is_named() -> None:
    x = torch.empty(40, 256, dtype=torch.float16)
    for form, rows, words in (
        (Format(4, "uint", 1, 32), 40, "do not fill the tiles"),
        (Format(4, "uint", 1, 128, arithmetic="mul_add"), 40, "arithmetic is 'mul_add'"),
        (Format(8, "uint", 1, 256), 2000, "there are 2000 rows"),
    ):
        found = parts(form, 16, 256, torch.float16 if form.arithmetic == "mul_add" else None)
        reason = tiled.no_layout(x[:1].expand(rows, 256), *found, form)
        assert reason is not None and words in reason


@pytest.mark.parametrize(
    "rows, tiles, ways",
    [(16, True, "rows"), (17, True, "tiled"), (512, True, "tiled"), (513, True, "decode"),
     (32, False, "rows"), (33, False, "decode")],
)  # fmt: skip
def test_rows_decide_which_kernel_runs(rows: int, tiles: bool, ways: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    form = Format(8, "uint", 1, 256)
    found = parts(form, 16, 256)
    x = torch.randn(rows, 256, device=DEVICE).half()
    exact = (x.float() @ decode(*found, form, torch.float32).t()).half()

    def stand_in(name: str) -> object:
        return lambda *given, **how: seen.append(name) or exact

    monkeypatch.setattr(dispatch.few, "supports", lambda *given: None)
    monkeypatch.setattr(dispatch.tiled, "supports", lambda *given: None if tiles else "not for these")
    monkeypatch.setattr(dispatch.few, "rows_linear", stand_in("rows"))
    monkeypatch.setattr(dispatch.tiled, "tiled_linear", stand_in("tiled"))
    monkeypatch.setattr(dispatch.written, "decode_on_device",
                        lambda *given: seen.append("decode") or decode(*given))  # fmt: skip
    dispatch.run(x, *found, None, form)
    assert seen == [ways]


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name, dtype, rows, k, chosen", [
    *((name, torch.float16, 17, 256, None) for name in FORMATS),
    *((name, torch.bfloat16, 100, 1664, None) for name in FORMATS),
    *((name, *rest) for name in ("int8_per_row", "uint4_high_zero") for rest in (
        (torch.float16, 64, 384, tiled.Config()), (torch.float16, 300, 1664, tiled.Config(256, 2, 1, 1, 64)),
        (torch.bfloat16, 64, 1664, tiled.Config(64, 4, 1, 3, 64)),
        (torch.float16, 130, 1664, tiled.Config(128, 1, 2, 2, 64)),
        (torch.float16, 200, 1664, tiled.Config(128, 3, 1, 1, 64)),
        (torch.float16, 64, 1664, tiled.Config(early=True)),
    )),
])  # fmt: skip
def test_some_rows_times_codes(name: str, dtype: torch.dtype, rows: int, k: int, chosen: tiled.Config | None) -> None:
    """More steps than stages, rows of neither that fill no tile, uneven parts."""
    form, zero, run = FORMATS[name]
    form = form._replace(group=k) if form.group == 256 else form
    n = 20 if form.rows == 20 else 328
    found = parts(form, n, k, zero, run=run)
    x = torch.randn(rows, k, device=DEVICE).to(dtype)
    bias = torch.randn(n, device=DEVICE).to(dtype)
    if reason := tiled.supports(x, *found, form):
        pytest.skip(reason)
    codes, scale, zeros, table = found
    exact_form = form._replace(compute="float32")
    rounded = [None if p is None else p.to(COMPUTE[form.compute]).float() for p in (scale, zeros)]
    exact = x.double() @ decode(codes, rounded[0], rounded[1], table, exact_form, torch.float64).t()
    if form.arithmetic == "output":
        exact = exact * scale.flatten().double()
    theirs = x @ decode(*found, form, dtype).t()
    theirs = (theirs * scale.flatten()).to(dtype) if form.arithmetic == "output" else theirs
    exact, theirs = exact + bias.double(), theirs + bias
    ours = tiled.tiled_linear(x, *found, bias, form, chosen)
    assert torch.equal(ours, tiled.tiled_linear(x, *found, bias, form, chosen)), "the order of sums is fixed"
    found_error, their_error = ((y.double() - exact).abs() for y in (ours, theirs))
    assert found_error.max() <= 2 * their_error.max() + 1e-3 * exact.abs().max() * torch.finfo(dtype).eps
    assert found_error.square().mean() <= 4 * their_error.square().mean()
