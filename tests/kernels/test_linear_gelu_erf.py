"""linear_gelu_erf against float64: the reference (CPU) and, where there is one, a Hopper GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fuse.kernels import _hopper_gemm

module = importlib.import_module("torch_fuse.kernels.linear_gelu_erf")
op = module.linear_gelu_erf

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"


def operands(rows: int = 9, inner: int = 32, width: int = 48, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows, inner), torch.randn(width, inner) / inner**0.5, torch.randn(width)
    return [z.to(DEVICE, dtype) for z in (x, weight, bias)]


def unfused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_the_unfused_spelling(dtype: torch.dtype, save: bool) -> None:
    given = [z.requires_grad_() for z in operands(dtype=dtype)]
    wide = [z.detach().double().requires_grad_() for z in given]
    seed = torch.randn(2, 9, 48, device=DEVICE)
    out, linear = op(*given, save)
    exact, other = unfused(*wide), unfused(*given)
    assert out.is_contiguous() and linear.shape == (out.shape if save else (0,))
    results = [(out, other, exact), *zip(*(torch.autograd.grad(z, leaves, seed.to(z.dtype)) for z, leaves in
               ((out, given), (other, given), (exact, wide))), strict=True)]  # fmt: skip
    for ours, theirs, wanted in results:
        slack = 3 * torch.finfo(dtype).eps * float(1 + wanted.abs().max())
        assert float((ours - wanted).abs().max()) <= 2 * float((theirs - wanted).abs().max()) + slack
    if save:
        torch.testing.assert_close(linear, F.linear(*given))


@pytest.mark.parametrize("save", [False, True])
def test_gradcheck_and_opcheck(save: bool) -> None:
    torch.library.opcheck(op, (*(z.requires_grad_() for z in operands()), save))
    double = [z.requires_grad_() for z in operands(3, 4, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *z: op(*z, save)[0], double)


@pytest.mark.parametrize("fits", [True, False])
def test_where_the_memory_engine_cannot_read_the_result_is_the_same(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch is stood in for; an input that begins at no multiple of 16 bytes goes to PyTorch's product."""

    class Standin:
        def __init__(self, _kernel: Any, how: Any, call: Any) -> None:
            seen.append("launch")
            x, weight, bias, out = call
            out.copy_(unfused(x, weight, bias))

    seen: list[str] = []
    monkeypatch.setattr(module, "supports", lambda *_: None)
    monkeypatch.setattr(module, "Launch", Standin)
    monkeypatch.setattr(_hopper_gemm, "call", lambda how, x, w, bias, _x, out, *_: (how, (x, w, bias, out)))
    module._launches.clear()
    x, weight, bias = operands(dtype=torch.bfloat16)
    if not fits:
        x = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    torch.testing.assert_close(op(x, weight, bias, False)[0], unfused(x, weight, bias), rtol=2e-2, atol=2e-2)
    assert seen == (["launch"] if fits else [])
    module._launches.clear()


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    x, weight, bias = operands()
    with pytest.raises(ValueError, match=r"bias.shape is \(47,\); allowed: \[48\]"):
        op(x, weight, bias[:47], False)


def test_supports_says_why_not() -> None:
    reason = module.supports(*operands())
    assert reason is not None
    if HOPPER:
        assert reason == "dtype is torch.float32; allowed: bfloat16, float16"
        assert module.supports(*operands(dtype=torch.bfloat16)) is None
        assert "multiples of 16" in module.supports(*operands(inner=40, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_hopper_kernel(transposed: bool, save: bool) -> None:
    for rows in (1, 70, 1500):
        x, weight, bias = operands(rows, 320, 1040, torch.bfloat16)
        weight = weight.t().contiguous().t() if transposed else weight
        exact = unfused(x.double(), weight.double(), bias.double())
        for _ in range(2):
            out, linear = op(x, weight, bias, save)
            torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
            if save:
                torch.testing.assert_close(linear, F.linear(x, weight, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("save", [False, True])
def test_hopper_kernel_with_tiles_of_one_part(save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program has several, and one place for a group's."""
    monkeypatch.setattr(module, "config", _hopper_gemm.Config(64, 64, 8, True))
    x, weight, bias = operands(9000, 64, 1040, torch.bfloat16)
    exact = unfused(x.double(), weight.double(), bias.double())
    for _ in range(2):
        torch.testing.assert_close(op(x, weight, bias, save)[0].double(), exact, rtol=1e-2, atol=1e-2)
