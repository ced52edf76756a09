"""A few rows times codes as libraries lay them out: the Gluon kernel, run statement by statement on the CPU."""

from __future__ import annotations

import gluon_on_cpu
import pytest
import torch
from strided_weights import STRIDED, strided
from test_dequant_kernels import FORMATS, Parts, parts

from torch_fuse.kernels import _dequant_rows as few
from torch_fuse.kernels import _ops
from torch_fuse.kernels._dequant_rows_kernel import MISSING
from torch_fuse.kernels._gemv_common import activated
from torch_fuse.kernels.packed_weight import COMPUTE, Format, decode

pytestmark = pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED or bool(MISSING), reason="needs Gluon")
EXTRA = {
    "groups_of_32": (Format(4, "uint", 1, 32, compute="float16"), torch.float16, None),
    "groups_of_16": (Format(8, "int", 1, 16), None, None),
    "offsets_of_pairs": (Format(4, "uint", 1, 64, arithmetic="mul_add"), torch.float16, None),
    "offsets_of_bytes": (Format(8, "uint", 1, 64, 128, arithmetic="mul_sub"), torch.float16, None),
    "offsets_of_two_rows": (Format(4, "uint", 1, 64, 0, "rows_high", "mul_add"), torch.float16, None),
}
ALONG_ROWS = ("columns", "columns_groups", "bytes_along_k")


def weights(name: str, n: int, k: int, device: str = "cpu") -> tuple[Format, Parts]:
    if name in STRIDED:
        return strided(name, n, k, device)
    form, zero, run = (FORMATS | EXTRA)[name]
    form = form._replace(group=k) if form.group == 256 else form
    return form, tuple(x if x is None else x.to(device) for x in parts(form, n, k, zero, run=run))  # type: ignore[return-value]


def check(name: str, n: int, k: int, m: int, dtype: torch.dtype, chosen: few.Config | None,
          device: str = "cpu") -> None:  # fmt: skip
    form, found = weights(name, n, k, device)
    codes, scale, zero, table = found
    x, bias = torch.randn(m, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    assert few.no_layout(x, *found, form) is None
    if scale.shape[0] == n:
        scale[n // 2, -1] = torch.nan
    rounded = [None if part is None else part.to(COMPUTE[form.compute]).float() for part in (scale, zero)]
    table = None if table is None else table.to(dtype).float()
    exact = decode(codes, rounded[0], rounded[1], table, form._replace(compute="float32"), torch.float64)  # type: ignore[arg-type]
    wanted = x.double() @ exact.t()
    if form.arithmetic == "output":
        wanted *= scale.flatten().double()
    wanted += bias.double()
    out = few.rows_linear(x, *found, bias, form, chosen).double()
    assert torch.equal(out.isnan(), wanted.isnan()) and out.isnan().any() == (scale.shape[0] == n)
    size = float(wanted.nan_to_num().square().mean().sqrt())
    assert float((out - wanted).nan_to_num().abs().max()) < (0.05 if dtype == torch.bfloat16 else 0.01) * size


def test_codes_along_the_rows_are_left_to_the_decode_pass() -> None:
    for name in ALONG_ROWS:
        form, found = weights(name, 20, 256)
        assert "do not fill the tiles" in str(few.no_layout(torch.empty(1, 256).half(), *found, form))


def test_rows_too_long_for_32_bits_are_left_to_the_decode_pass() -> None:
    """GPTQ's words of one expert of many, say."""
    form = STRIDED["gptq"]
    codes = torch.empty_strided((16, 64, 4), (4, 1 << 26, 1), dtype=torch.uint8, device="meta")
    scale = torch.empty(16, 4, dtype=torch.float16, device="meta")
    assert "32 bits" in str(few.no_layout(torch.empty(1, 512).half(), codes, scale, None, None, form))


@pytest.mark.parametrize("name", [name for name in (*STRIDED, *FORMATS, *EXTRA) if name not in ALONG_ROWS])
def test_a_few_rows_times_codes_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "launch", gluon_on_cpu.launch)
    check(name, 20, 256, 3, torch.float16, few.Config(16, 2))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["int8_per_row", "hqq_halves"])
def test_the_sums_go_through_an_activation(name: str, parts: int, activation: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(few, "launch", gluon_on_cpu.launch)
    form, found = weights(name, 20, 256)
    x, bias = torch.randn(3, 256).half() / 64, torch.randn(20).half()
    exact = activated(x.double() @ decode(*found, form, torch.float64).t() + bias.double(), activation)
    theirs = activated(torch.nn.functional.linear(x, decode(*found, form, torch.float16), bias), activation)
    ours = few.rows_linear(x, *found, bias, form, few.Config(16, 2, parts=parts), activation)
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + 1e-3


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k", "q6_k", "q5_k", "gptq_zeros", "hqq_halves", "groups_of_32"])
def test_programs_share_sums_and_tiles_end_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "launch", gluon_on_cpu.launch)
    check(name, 36, 768, 9, torch.bfloat16, few.Config(32, 4, 1, 2, parts=2, tile=64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m, k", [(1, 2560), (11, 768), (30, 1280)])
@pytest.mark.parametrize("name", [name for name in (*STRIDED, *EXTRA) if name not in ALONG_ROWS])
def test_a_few_rows_times_codes_on_a_gpu(name: str, m: int, k: int) -> None:
    check(name, 100, k, m, torch.float16 if m > 1 else torch.bfloat16, None, "cuda")
