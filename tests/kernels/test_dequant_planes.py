"""Weights whose bits lie in several places of a block: decoded by a kernel, bit for bit as torch does.

`test_kernels_in_the_interpreter` of test_dequant_kernels runs these, too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.kernels import _dequant_decode as decoding
from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import _dequant_planes as kernel
from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels import _ops, dequant_linear
from torch_fuse.kernels.packed_weight import Format, check_parts, decode

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
RUNS = pytest.mark.skipif(DEVICE != "cuda" and not _ops.INTERPRETED, reason="needs a GPU or the interpreter")
# format, bytes of a block, of which codes are, weights of a block
BLOCKS: dict[str, tuple[Format, int, slice, int]] = {
    "q6_k": (Format(6, "uint", 1, 16, 32, "4x64+2x32", compute="float16"), 210, slice(0, 192), 256),
    "q5_k": (Format(5, "uint", 1, 32, 0, "1x32+4x32", "mul_sub", "float16"), 176, slice(16, 176), 256),
    "q5_0": (Format(5, "uint", 1, 32, 16, "1x1+4x16", compute="float16"), 22, slice(2, 22), 32),
    "q5_1": (Format(5, "uint", 1, 32, 0, "1x1+4x16", "mul_add", "float16"), 24, slice(4, 24), 32),
    "q2_k": (Format(2, "uint", 1, 16, 0, "2x32", "mul_sub", "float16"), 84, slice(16, 80), 256),
    "q3_k": (Format(3, "uint", 1, 16, 4, "1x32+2x32", compute="float16"), 110, slice(0, 96), 256),
    "fp32": (Format(6, "uint", 1, 16, 32, "4x64+2x32"), 210, slice(0, 192), 256),
    "blocks side by side": (Format(6, "uint", 2, 64, 3, "2x4+4x8", "mul_add"), 12, slice(0, 12), 16),
    "one scale": (Format(5, "uint", 7, 4096, 0, "4x2+1x1", "output"), 5, slice(0, 5), 8),
    "groups of three": (Format(3, "uint", 1, 3, 1, "1x2+2x4"), 6, slice(0, 6), 16),
}  # fmt: skip
Parts = tuple[Tensor, Tensor, Tensor | None, None]


def blocks(name: str, n: int, count: int, device: str = DEVICE) -> tuple[Format, Parts]:
    """`count` blocks a row, codes where they lie, a NaN among the scales."""
    form, whole, codes, weights = BLOCKS[name]
    form = form._replace(group=min(form.group, count * weights), rows=min(form.rows, n))
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (n, count, whole)).to(torch.uint8).to(device)
    grid = -(-n // form.rows), -(-count * weights // form.group)
    scale, zero = torch.randn(grid).half().to(device), torch.randn(grid).half().to(device) * 9
    scale[-1, -1] = torch.nan
    found = raw[..., codes], scale, zero if form.arithmetic.startswith("mul_") else None, None
    check_parts(*found, form)
    return form, found


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@RUNS
@pytest.mark.parametrize("n, count", [(5, 3), (7, 1)])
@pytest.mark.parametrize("name", BLOCKS)
def test_decoding_of_planes_is_bit_for_bit_that_of_torch(name: str, n: int, count: int) -> None:
    form, found = blocks(name, n, count)
    x = torch.randn(3, decode(*found, form, torch.float16).shape[1], device=DEVICE).half()
    assert dequant_linear.supports(x, *found, None, form) is None
    for dtype in (torch.float16,) if _ops.INTERPRETED else (torch.float16, torch.bfloat16):  # it truncates to bfloat16
        wanted = decode(*found, form, dtype)
        assert same(decoding.decode_on_device(*found, form, dtype), wanted)
        assert form.arithmetic == "output" or wanted.isnan().any()
    if _ops.INTERPRETED and form.arithmetic != "output":
        wanted = F.linear(x, decode(*found, form, x.dtype))
        assert same(dequant_linear.dequant_linear(x, *found, None, *form), wanted)


@RUNS
def test_decoding_of_planes_reaches_every_program_and_rows_that_are_not_whole() -> None:
    form, found = blocks("q6_k", 18, 5)
    bigger = decoding.decode_on_device(*found, form, torch.float16)
    assert bigger.numel() // 8 > kernel.CHUNKS * 5 and bigger.numel() // 8 % kernel.CHUNKS
    assert same(bigger, decode(*found, form, torch.float16))
    every = found[0][:, ::2], found[1][:, :48].contiguous(), None, None  # blocks further apart
    assert same(decoding.decode_on_device(*every, form, torch.float16), decode(*every, form, torch.float16))


def test_a_chunk_has_one_scale_and_lies_in_one_block() -> None:
    widths = {name: kernel.width_of(blocks(name, 2, 1)[1][0], blocks(name, 2, 1)[0]) for name in BLOCKS}
    assert widths.pop("groups of three") == 1 and set(widths.values()) == {8}


def test_bytes_that_are_not_side_by_side_are_refused() -> None:
    form, (codes, *_) = blocks("q6_k", 2, 2)
    spread = torch.empty_strided(codes.shape, (4000, 400, 2), dtype=torch.uint8)
    assert "side by side" in str(kernel.no_planes(spread, form))


# Words of two bytes of each plane, of 16 where blocks are aligned to that; then scales, offsets.
LOADS = {"q6_k": 4 + 4 + 1, "q5_k": 1 + 1 + 2, "q5_0": 1 + 4 + 1, "q2_k": 2 + 2}


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles Triton")
@pytest.mark.parametrize("name", LOADS)
def test_a_chunk_of_planes_is_read_in_words_and_stored_at_once(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    form, (codes, scale, zero, _) = blocks(name, 64, 8, "cpu")
    known = kernel.constants(codes, scale, zero, form, codes.storage_offset() % 16)
    kinds = {"codes": "*u8", "scale": "*fp16", "zero": "*fp16", "out": "*fp16", "count": "i32"}
    names = kernel._kernel.arg_names
    source = ASTSource(
        fn=kernel._kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in known.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kinds},
    )
    options = {name: known[name] for name in ("num_warps", "enable_fp_fusion")}
    ptx = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    chunks = known["CHUNKS"] // known["num_warps"] // 32
    assert ptx.count("st.global.v4.b32") == ptx.count("st.global") == chunks and "st.shared" not in ptx
    assert ptx.count("ld.global") == chunks * LOADS[name], ptx.count("ld.global") / chunks


@pytest.mark.parametrize("name", ["q6_k", "q5_0"])
def test_planes_are_not_measured_and_do_not_fire_by_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.few, "MISSING", "")
    form, found = blocks(name, 4, 2, "cpu")
    assert "not measured to win" in str(dispatch.unmeasured(*found, form))


@pytest.mark.skipif(not _ops.HAS_TRITON, reason="needs Triton")
def test_a_few_rows_read_planes_where_a_byte_has_the_higher_bits_of_both_halves() -> None:
    def reason(name: str, **changed: int | str) -> str:
        form, (codes, scale, zero, lut) = blocks(name, 4, 2, "cpu")
        x = torch.empty(1, codes.shape[1] * BLOCKS[name][3]).half()
        return few.no_layout(x, codes, scale, zero, lut, form._replace(**changed)) or "none"

    assert reason("q6_k") == reason("q5_k") == "none"
    for name in ("q5_0", "q2_k", "q3_k"):
        assert "lie as" in reason(name)
    assert "offset is 65" in reason("q6_k", offset=65) and "zero point" in reason("q5_k", arithmetic="sub_mul")
    assert "do not fill" in reason("q6_k", group=8)
