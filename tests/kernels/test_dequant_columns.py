"""A few rows times codes [K, N]: the kernel against float64; test_dequant_kernels runs it in the interpreter, too."""

from __future__ import annotations

import pytest
import torch
from strided_weights import strided
from torch import Tensor

from torch_fuse.kernels import _dequant_columns as kernel
from torch_fuse.kernels import _ops, dequant_linear
from torch_fuse.kernels._gemv_common import activated
from torch_fuse.kernels.packed_weight import Format, decode

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
RUNS = pytest.mark.skipif(DEVICE != "cuda" and not _ops.INTERPRETED, reason="needs a GPU or the interpreter")
FORMS = {
    "columns": Format(8, "int", 1, 4096, compute="float16"),
    "columns_groups": Format(8, "uint", 1, 32, 128, compute="float16"),
    "per tensor": Format(8, "uint", 4096, 4096, 128),
    "output": Format(8, "int", 1, 4096, 0, "low", "output"),
    "groups of 192": Format(8, "int", 3, 192),
}


def weights(name: str, n: int, k: int) -> tuple[Format, Tensor, Tensor, Tensor | None]:
    """Codes along the columns; a NaN among the scales but for one in all."""
    torch.manual_seed(0)
    form = FORMS[name]._replace(group=min(FORMS[name].group, k), rows=min(FORMS[name].rows, n))
    if name.startswith("columns"):
        _, (codes, scale, zero, _) = strided(name, n, k, DEVICE)
    else:
        codes = torch.randint(0, 256, (k, n)).to(torch.uint8).to(DEVICE).t()
        codes = codes.view(torch.int8) if form.kind == "int" else codes
        scale, zero = torch.rand(-(-n // form.rows), -(-k // form.group)).to(DEVICE), None
    if scale.numel() > 1:
        scale[-1, -1] = torch.nan
    return form, codes, scale, zero


@RUNS
@pytest.mark.parametrize("m, n, k, parts, activation", [
    (1, 136, 384, 1, "none"), (3, 40, 416, 2, "silu"), (16, 200, 192, 3, "none"),
])  # fmt: skip
@pytest.mark.parametrize("name", FORMS)
def test_a_few_rows_times_columns_of_codes(name: str, m: int, n: int, k: int, parts: int, activation: str) -> None:
    form, codes, scale, zero = weights(name, n, k)
    x, bias = torch.randn(m, k, device=DEVICE).half(), torch.randn(n, device=DEVICE).half()
    assert kernel.supports(x, codes, scale, zero, None, form) is None
    exact = decode(codes, scale, zero, None, form._replace(compute="float32"), torch.float64)
    wanted = x.double() @ exact.t()
    if form.arithmetic == "output":
        wanted = wanted * scale.flatten().double()
    wanted = activated(wanted + bias.double(), activation)
    chosen = kernel.Config(parts=parts)
    found = kernel.columns_linear(x, codes, scale, zero, bias, form, chosen, activation).double()
    assert torch.equal(found.isnan(), wanted.isnan()) and wanted.isnan().any() == (scale.numel() > 1)
    size = float(wanted.nan_to_num().square().mean().sqrt())
    assert float((found - wanted).nan_to_num().abs().max()) < 0.005 * size
    again = kernel.columns_linear(x, codes, scale, zero, bias, form, chosen, activation).double()
    assert torch.equal(found.nan_to_num(), again.nan_to_num())
    if activation == "none" and name == "columns":
        op = dequant_linear.dequant_linear(x, codes, scale, zero, None, bias, *form)
        assert float((op.double() - wanted).nan_to_num().abs().max()) < 0.005 * size


def test_what_the_kernel_of_columns_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "no_triton", lambda x: None)
    form, codes, scale, zero = weights("columns", 64, 256)
    x = torch.empty(4, 256).half()

    def reason(form: Format = form, codes: Tensor = codes, x: Tensor = x) -> str:
        return kernel.supports(x, codes, scale, zero, None, form) or "none"

    assert reason() == "none"
    assert "17 rows" in reason(x=torch.empty(17, 256).half()) and "dtype" in reason(x=x.float())
    assert "along N" in reason(codes=codes.contiguous()) and "int4" in reason(form._replace(bits=4))
    assert "groups are of 24" in reason(form._replace(group=24)) and "of 8" in reason(form._replace(group=8))
    assert "mul_add" in reason(form._replace(arithmetic="mul_add"))


def test_programs_fill_the_device_and_parts_are_worth_their_sums() -> None:
    pytest.importorskip("triton")
    assert kernel.config(10240, 2560).parts == 6 and kernel.config(1 << 20, 4096).parts == 1
    assert kernel.config(768, 64).parts == 1 and kernel.config(768, 16384).parts == 16


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles Triton")
@pytest.mark.parametrize("name", ["columns", "columns_groups"])
def test_columns_of_codes_are_copied_in_words_and_converted_by_cheap_instructions(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    form, codes, scale, zero = weights(name, 10240, 2560)
    known = kernel.constants(codes, scale, zero, form, kernel.config(10240, 2560))
    kinds = {"x": "*fp16", "codes": "*u8", "scale": "*fp16", "zero": "*i8", "out": "*fp32", "M": "i32"}
    names = kernel._kernel.arg_names
    source = ASTSource(
        fn=kernel._kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in known.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kinds if name != "M"},
    )
    done = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": known["num_warps"]})
    ptx = done.asm["ptx"]
    copies = [line for line in ptx.splitlines() if "shared.global" in line]
    assert "mma.sync" in ptx and copies and all("0x8," in line or "0x10," in line for line in copies)
    assert "cvt.rn.f32.s32" not in ptx and "cvt.rn.f32.u32" not in ptx and "cvt.rn.f16.s" not in ptx
