"""The kernels of dequant_linear: decoding against torch bit for bit, the product of a few rows compiled for a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_interpreter import passes_in_interpreter
from strided_weights import STRIDED, strided
from torch import Tensor

from torch_fuse.kernels import _dequant_columns as columns
from torch_fuse.kernels import _dequant_decode as decoding
from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels import _ops, dequant_linear
from torch_fuse.kernels._dequant_rows_kernel import MISSING
from torch_fuse.kernels._gemv_common import activated
from torch_fuse.kernels.packed_weight import COMPUTE, Format, check_parts, decode, weight_shape

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
RUNS = DEVICE == "cuda" or _ops.INTERPRETED
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def parts(form: Format, n: int, k: int, zero: torch.dtype | None = None, dtype: torch.dtype = torch.float16,
          run: int | None = None) -> Parts:  # fmt: skip
    """Random parts of a weight; `run`: the last dimension of codes that are in halves."""
    torch.manual_seed(0)
    shape: tuple[int, ...] = (n, k * form.bits // 8)
    if form.nibbles.startswith("rows"):
        shape = (n // 2, k)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    if form.kind.startswith("fp8"):
        codes &= 0xBB  # no NaN, no inf
        codes = codes.view(torch.float8_e4m3fn if form.kind == "fp8_e4m3" else torch.float8_e5m2)
    elif form.bits == 8 and form.kind == "int":
        codes = codes.view(torch.int8)
    if run is not None:
        codes = codes.view(n, -1, run)
    groups = (-(-n // form.rows), -(-k // form.group))
    scale = (torch.rand(groups) + 0.5).to(dtype)
    zeros = None if zero is None else torch.randint(0, 16, groups).to(zero)
    if zeros is not None and zero is not None and zero.is_floating_point:
        zeros = zeros + torch.rand(groups).to(zero)
    table = torch.randn(16).sort().values if form.kind == "lut16" else None
    found = (codes.to(DEVICE), scale.to(DEVICE), None if zeros is None else zeros.to(DEVICE),
             None if table is None else table.to(DEVICE))  # fmt: skip
    check_parts(*found, form)
    return found


FORMATS: dict[str, tuple[Format, torch.dtype | None, int | None]] = {
    "int8_per_row": (Format(8, "int", 1, 256), None, None),
    "int8_output": (Format(8, "int", 1, 256, arithmetic="output"), None, None),
    "uint8_groups": (Format(8, "uint", 1, 64, 3), torch.float16, None),
    "fp8_blocks": (Format(8, "fp8_e4m3", 128, 128), None, None),
    "fp8_e5m2_per_tensor": (Format(8, "fp8_e5m2", 20, 256), None, None),
    "int4_low": (Format(4, "int", 1, 128), None, None),
    "uint4_high_zero": (Format(4, "uint", 1, 64, nibbles="high", compute="float16"), torch.float16, None),
    "uint4_half": (Format(4, "uint", 1, 32, 8, "half"), None, 16),
    "uint4_half_high_zero": (Format(4, "uint", 1, 64, 0, "half_high"), torch.float16, 64),
    "uint4_mul_add": (Format(4, "uint", 1, 32, arithmetic="mul_add", compute="bfloat16"), torch.bfloat16, None),
    "uint4_mul_sub": (Format(4, "uint", 1, 32, arithmetic="mul_sub"), torch.float32, None),
    "nf4": (Format(4, "lut16", 1, 64, nibbles="high"), None, None),
}


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_is_bit_for_bit_that_of_torch(name: str, dtype: torch.dtype) -> None:
    form, zero, run = FORMATS[name]
    if _ops.INTERPRETED and (dtype == torch.bfloat16 or form.compute == "bfloat16"):
        pytest.skip("the interpreter truncates to bfloat16, a GPU rounds")
    found = parts(form, 20, 256, zero, run=run)
    assert decoding.supports(torch.empty(1, 256, dtype=dtype, device=DEVICE), *found, form) is None
    assert torch.equal(decoding.decode_on_device(*found, form, dtype), decode(*found, form, dtype))


UNEVEN: dict[str, tuple[Format, int]] = {
    "odd_k": (Format(8, "uint", 1, 16), 37),
    "odd_group": (Format(8, "int", 1, 7), 64),
    "odd_group_of_pairs": (Format(4, "uint", 1, 5), 30),
    "group_of_three_pairs": (Format(4, "uint", 1, 6, nibbles="high"), 36),
    "rows_of_blocks": (Format(8, "int", 3, 24), 100),
    "offset_past_256": (Format(8, "int", 1, 64, 144, compute="bfloat16"), 64),
}


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("name", UNEVEN)
def test_decoding_of_sizes_that_fill_no_vector(name: str) -> None:
    form, k = UNEVEN[name]
    codes, scale, zero, _ = parts(form, 10, k, torch.int8)
    scale = (2.0 ** torch.randint(-3, 4, scale.shape)).to(scale)
    if form.compute == "bfloat16":
        codes, zero = codes & ~1, None  # even numbers up to 512, exact: the interpreter truncates
    for dtype in (torch.float16, torch.bfloat16):
        found = decoding.decode_on_device(codes, scale, zero, None, form, dtype)
        wanted = decode(codes, scale, zero, None, form, torch.float32 if _ops.INTERPRETED else dtype)
        torch.testing.assert_close(found, wanted.to(dtype), rtol=2**-7 if _ops.INTERPRETED else 0, atol=0)


# (N, K): eight rows a band and none, a last group or program that is not full
SIZES = [(16, 512), (6, 768)]


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("name", STRIDED)
def test_decoding_reads_codes_and_scales_where_a_library_has_them(name: str) -> None:
    for n, k in SIZES:
        form, (codes, scale, zero, lut) = strided(name, n, k, DEVICE)
        scale[n // 2, -1] = torch.nan
        assert not codes.is_contiguous() or form.nibbles.startswith("rows")
        assert decoding.supports(torch.empty(1, k).half().to(DEVICE), codes, scale, zero, lut, form) is None
        found = decoding.decode_on_device(codes, scale, zero, lut, form, torch.float16)
        wanted = decode(codes, scale, zero, lut, form, torch.float16)
        assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any()
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
        for rows in (0, 3):
            x = torch.randn(rows, k, device=DEVICE).half()
            out = dequant_linear.dequant_linear(x, codes, scale, zero, lut, None, *form)
            assert out.shape == (rows, n)
            if _ops.INTERPRETED and (rows == 0 or columns.supports(x, codes, scale, zero, lut, form) is not None):
                assert torch.equal(out.nan_to_num(), torch.nn.functional.linear(x, wanted).nan_to_num())


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
def test_decoding_follows_a_last_group_that_is_not_full() -> None:
    form, (codes, *_) = strided("columns", 24, 100, DEVICE)
    form = form._replace(group=32)
    scale = torch.rand(4, 24, device=DEVICE).half().t()
    found = decoding.decode_on_device(codes, scale, None, None, form, torch.float16)
    assert torch.equal(found, decode(codes, scale, None, None, form, torch.float16))
    assert found.stride() == codes.stride(), "what is read along the columns is written along them"


@pytest.mark.skipif(not RUNS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("zero", [torch.int8, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_decoding_takes_integers_as_zero_points(zero: torch.dtype, rows: int) -> None:
    """Also in bfloat16: all numbers here are exact in it, and need no rounding."""
    for form in (Format(8, "int", 1, 64, compute="bfloat16"), Format(4, "int", 1, 32, compute="bfloat16")):
        codes, scale, zeros, _ = parts(form, 16, 64, zero)
        found = (codes, (2.0 ** torch.randint(-3, 4, scale.shape)).to(scale), zeros, None)
        weight = decode(*found, form, torch.bfloat16)
        assert torch.equal(decoding.decode_on_device(*found, form, torch.bfloat16), weight)
        x = torch.randn(rows, 64, device=DEVICE).bfloat16()
        if decoding.supports(x, *found, form) is None and _ops.INTERPRETED:
            out = dequant_linear.dequant_linear(x, *found, None, *form)
            assert torch.equal(out, torch.nn.functional.linear(x, weight))


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    files = [
        __file__,
        *(str(Path(__file__).with_name(f"test_dequant_{name}.py")) for name in ("tiled", "planes", "columns")),
    ]
    passes_in_interpreter(*files, select="decoding or order or columns")


def test_tiles_have_one_scale() -> None:
    def tile(form: Format, k: int, run: int | None = None) -> int | None:
        shape = (16, k * form.bits // 8) if run is None else (16, k // 2 // run, run)
        return few.tile_of(torch.empty(shape, dtype=torch.uint8), form)

    assert tile(Format(8, "uint", 1, 2560), 2560) == 128
    assert tile(Format(8, "uint", 1, 32), 2560) == 32
    assert tile(Format(4, "uint", 1, 128), 2560) == 64
    assert tile(Format(4, "uint", 1, 64), 2560) == 32
    assert tile(Format(4, "uint", 1, 32), 2560) == 16
    assert tile(Format(4, "uint", 1, 16), 2560) is None
    assert tile(Format(4, "uint", 1, 65), 2560) is None
    assert tile(Format(4, "uint", 1, 128, nibbles="half"), 2560, 64) == 64
    assert tile(Format(4, "uint", 1, 32, nibbles="half"), 2560, 32) == 32
    assert tile(Format(8, "uint", 1, 100), 100) is None


def compiled(form: Format, found: Parts, rows: int, dtype: torch.dtype, chosen: few.Config,
             activation: str = "none") -> dict[str, str]:  # fmt: skip
    """The kernel for sm_90, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    codes, scale, zero, lut = found
    _, k = weight_shape(codes, form)
    x = torch.empty(rows, k, dtype=dtype)
    assert few.no_layout(x, codes, scale, zero, lut, form) is None
    lead = few.nibbles_of(codes, form)[0].storage_offset() % 16
    known = few.constants(x, codes, scale, zero, None, form, chosen, lead, activation) | ({"M": 1} if rows == 1 else {})
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8"}
    pairs = form.bits == 4 and few.run_of(codes, form) == 0
    kinds = {
        "x": "*i32" if pairs else f"*{short[dtype]}", "codes": f"*{short.get(codes.dtype, 'i8')}",
        "out": "*fp32" if chosen.parts > 1 else f"*{short[dtype]}", "M": "i32", "N": "i32",
        **{name: f"*{short[(scale if part is None else part).dtype]}"
           for name, part in (("scale", scale), ("zero", zero), ("lut", lut), ("bias", None))},
    }  # fmt: skip
    names = few.kernel.arg_names
    signature = {name: "constexpr" if name in known else kinds[name] for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in known and name != "M"}
    source = GluonASTSource(fn=few.kernel, signature=signature, constexprs=constants, attrs=aligned)
    done = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": chosen.warps})
    return {"ptx": done.asm["ptx"], "ttgir": done.asm["ttgir"]}


COMPILED = {
    "int8": (Format(8, "int", 1, 512), None, None, 1, few.Config(16, 4)),
    "fp8_parts": (Format(8, "fp8_e4m3", 16, 512), None, None, 8, few.Config(16, 4, parts=2)),
    "uint8_groups_uneven": (Format(8, "uint", 1, 128), torch.float32, None, 16, few.Config(16, 8)),
    "int4_zero": (Format(4, "uint", 1, 128), torch.float16, None, 5, few.Config(16, 4, ahead=1, unroll=1)),
    "int4_half_zero": (Format(4, "uint", 1, 128, 0, "half_high"), torch.float16, 64, 1, few.Config(16, 4)),
    "nf4": (Format(4, "lut16", 1, 64, nibbles="high"), None, None, 32, few.Config(32, 4)),
}


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED or bool(MISSING), reason="compiles Gluon")
@pytest.mark.parametrize("name", [*COMPILED, "q8_0", "q4_0", "q4_k", "q6_k", "q5_k", "gptq_zeros", "hqq_halves"])
def test_codes_go_from_memory_to_the_product_without_shared_memory(name: str) -> None:
    width = 4  # words of x that a lane has side by side, as a rule
    if name in STRIDED:
        form, found = strided(name, 32, 2048)
        rows, chosen, dtype, width = (
            8,
            few.Config(),
            torch.float16,
            {"q8_0": 2, "q4_k": 2, "q5_k": 2, "q4_0": 1, "q6_k": 1}.get(name, 4),
        )
    else:
        form, kind, run, rows, chosen = COMPILED[name]
        dtype = torch.bfloat16 if rows == 1 else torch.float16
        found = parts(form, 16, 1536 if form.group == 128 else 512, kind, run=run)
        found = tuple(None if part is None else part.cpu() for part in found)  # type: ignore[assignment]
    ptx = compiled(form, found, rows, dtype, chosen)["ptx"]
    assert "mma.sync.aligned.m16n8k16" in ptx
    loop, _ = ptx.rsplit("mma.sync", 1)
    assert "st.shared" not in loop and "bar.sync" not in loop, "a layout is converted in the loop"
    wide = "ld.global.b32" if width == 1 else f"ld.global.v{width}.b32"
    assert "evict_first" in ptx and wide in ptx, "activations are read in pieces"
    zero = found[2]
    whole = zero is not None and zero.itemsize == 1  # zero points of one byte
    read = "evict_first" if whole else "ld.global"
    assert not any(".b8" in line for line in ptx.splitlines() if read in line), "codes are read byte by byte"


# Loads of a chunk's codes, by their width in bytes: GGUF's blocks are aligned to two.
LOADS = {"int8_per_row": 1, "uint4_high_zero": 1, "q8_0": 4, "q4_0": 4, "q4_k": 1, "gptq": 1, "hqq_halves": 1}


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles Triton")
@pytest.mark.parametrize("name", LOADS)
def test_decoding_reads_a_scale_once_for_what_it_stores_at_once(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if name in STRIDED:
        form, (codes, scale, zero, _) = strided(name, 64, 1024)
    else:
        form, kind, _ = FORMATS[name]
        codes = torch.empty(128, 256 * form.bits // 8, dtype=torch.int8 if form.kind == "int" else torch.uint8)
        scale, zero = torch.empty(128, 4), None if kind is None else torch.empty(128, 4)
    known = decoding.constants(codes, scale, zero, form, codes.storage_offset() % 16)
    kinds = {"codes": "*i8" if form.kind == "int" else "*u8", "scale": "*fp16", "zero": "*fp16", "lut": "*fp16",
             "out": "*fp16", "count": "i32"}  # fmt: skip
    names = decoding._kernel.arg_names
    source = ASTSource(
        fn=decoding._kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in known.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kinds},
    )
    options = {name: known[name] for name in ("num_warps", "enable_fp_fusion")}
    ptx = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    chunks, sides = known["CHUNKS"] // known["num_warps"] // 32, 2 if known["APART"] else 1
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") == chunks * sides and "st.shared" not in ptx
    assert ptx.count("ld.global") == chunks * (LOADS[name] + sides * (1 if zero is None else 2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype, rows", [(torch.float16, 1), (torch.bfloat16, 12), (torch.float16, 40)])
def test_a_few_rows_times_codes(name: str, dtype: torch.dtype, rows: int) -> None:
    form, zero, run = FORMATS[name]
    found = parts(form, 100 if form.rows in (1, 128) else 20, 256, zero, run=run)
    x = torch.randn(rows, 256, device=DEVICE).to(dtype)
    if reason := few.supports(x, *found, form):
        pytest.skip(reason)
    codes, scale, zeros, table = found
    exact_form = form._replace(compute="float32")
    rounded = [None if p is None else p.to(COMPUTE[form.compute]).float() for p in (scale, zeros)]
    exact = x.double() @ decode(codes, rounded[0], rounded[1], table, exact_form, torch.float64).t()
    if form.arithmetic == "output":
        exact = exact * scale.flatten().double()
    theirs = x @ decode(*found, form, dtype).t()
    theirs = (theirs * scale.flatten()).to(dtype) if form.arithmetic == "output" else theirs
    found_error, their_error = ((y.double() - exact).abs() for y in (few.rows_linear(x, *found, None, form), theirs))
    assert found_error.max() <= 2 * their_error.max() + 1e-3 * exact.abs().max() * torch.finfo(dtype).eps
    assert found_error.square().mean() <= 4 * their_error.square().mean()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("chosen", [None, few.Config(16, 8, parts=2)])
def test_a_few_rows_through_an_activation(activation: str, chosen: few.Config | None) -> None:
    form = Format(8, "int", 1, 2048)
    found = parts(form, 100, 2048)
    scaled = (found[0], found[1] / 2000, None, None)
    x, bias = torch.randn(3, 2048, device=DEVICE).half(), torch.randn(100, device=DEVICE).half()
    exact = activated(x.double() @ decode(*scaled, form, torch.float64).t() + bias.double(), activation)
    theirs = activated(torch.nn.functional.linear(x, decode(*scaled, form, torch.float16), bias), activation)
    ours = few.rows_linear(x, *scaled, bias, form, chosen, activation)
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()
