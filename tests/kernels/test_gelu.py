"""gelu against float64: every bfloat16 and float16 there is, in the interpreted kernel and on a GPU where there is one.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

import pytest
import torch
import torch.nn.functional as F
from in_interpreter import passes_in_interpreter

from torch_fuse.kernels import _ops
from torch_fuse.kernels.gelu import (
    BLOCK,
    _backward_kernel,
    _forward_kernel,
    gelu,
    gelu_backward,
    reference,
    supports,
)

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
HALVES = (torch.bfloat16, torch.float16)
FLAVOURS = ("none", "tanh")


def every(dtype: torch.dtype) -> torch.Tensor:
    """All values of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)


def exact(x: torch.Tensor, approximate: str, grad: torch.Tensor | None = None) -> torch.Tensor:
    """gelu, or its gradient, in float64, and in the far negative tail without 1 + erf's cancellation."""
    y = x.double().cpu()
    if approximate == "none":
        cdf, density = torch.special.erfc(-y * 0.5**0.5) / 2, torch.exp(-y * y / 2) * (0.5 / torch.pi) ** 0.5
    else:
        k = 2 * (2 / torch.pi) ** 0.5
        cdf = torch.sigmoid(k * (y + 0.044715 * y**3))
        density = cdf * torch.sigmoid(-k * (y + 0.044715 * y**3)) * k * (1 + 3 * 0.044715 * y * y)
    return y * cdf if grad is None else grad.double().cpu() * (cdf + y * density)


def run(kernel, approximate: str, *tensors: torch.Tensor) -> torch.Tensor:
    """A kernel's result before it is rounded: Triton's interpreter truncates to bfloat16, a GPU rounds to nearest."""
    out = torch.full_like(tensors[-1], float("nan"), dtype=torch.float32)
    grid = (_ops.triton.cdiv(out.numel(), BLOCK),)
    ptx = not _ops.INTERPRETED and torch.version.hip is None
    kernel[grid](*tensors, out, out.numel(), TANH=approximate == "tanh", PTX=ptx, BLOCK=BLOCK)
    return out


def errors(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Largest and root mean square error of what is finite."""
    finite = wanted.isfinite() & found.cpu().isfinite()
    difference = (found.double().cpu() - wanted)[finite]
    scale = float(difference.abs().max()) or 1.0
    return scale, float((difference / scale).square().mean().sqrt()) * scale


needs_kernel = pytest.mark.skipif(not _ops.INTERPRETED and DEVICE == "cpu", reason="needs a GPU or the interpreter")


@needs_kernel
@pytest.mark.parametrize("approximate", FLAVOURS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_off_by_little_more_than_one_rounding(dtype: torch.dtype, approximate: str) -> None:
    x = every(dtype)
    wide = run(_forward_kernel, approximate, x)
    found, wanted = wide.to(dtype).cpu(), exact(x, approximate)
    theirs = reference(x, approximate).cpu()
    for mine, other in zip(errors(found, wanted), errors(theirs, wanted), strict=True):
        assert mine <= 1.001 * other
    normal = wanted.isfinite() & (wanted.abs() >= 2.0**-120) & (wanted.abs() <= torch.finfo(dtype).max)
    relative = (wide.double().cpu() / wanted - 1)[normal].abs()
    assert float(relative.max()) < 3e-5
    assert float(relative[wanted[normal].abs() > 1e-7].max()) < 1.5e-5


@needs_kernel
@pytest.mark.parametrize("approximate", FLAVOURS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_infinity_and_signed_zero_come_out_as_in_float64(dtype: torch.dtype, approximate: str) -> None:
    x = every(dtype)
    found, wanted = run(_forward_kernel, approximate, x).to(dtype).cpu(), F.gelu(x.double(), approximate=approximate)
    wanted = wanted.to(dtype).cpu()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf() & (found > 0), wanted.isinf() & (wanted > 0)) and not (found == -torch.inf).any()
    assert torch.equal(found.signbit()[~found.isnan()], wanted.signbit()[~wanted.isnan()])
    infinite = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype, device=DEVICE)
    special = run(_forward_kernel, approximate, infinite)
    assert special[0] == torch.inf and special[1:].isnan().all()


@needs_kernel
@pytest.mark.parametrize("approximate", FLAVOURS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_gradient_is_no_worse_than_pytorchs(dtype: torch.dtype, approximate: str) -> None:
    x, grad = every(dtype), torch.linspace(-1.5, 1.5, 2**16).to(DEVICE, dtype)
    wide = run(_backward_kernel, approximate, grad, x)
    wanted = exact(x, approximate, grad)
    theirs = torch.ops.aten.gelu_backward(grad, x, approximate=approximate).cpu()
    for mine, other in zip(errors(wide.to(dtype), wanted), errors(theirs, wanted), strict=True):
        assert mine <= 1.05 * other
    assert torch.equal(wide.isnan().cpu(), theirs.isnan())


@pytest.mark.parametrize("approximate", FLAVOURS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_the_op_and_its_gradient_keep_shape_dtype_and_strides(dtype: torch.dtype, approximate: str) -> None:
    torch.manual_seed(0)
    rounding = 2 * torch.finfo(dtype).eps
    for x in (
        torch.randn(3, 7, 150),
        torch.randn(5, 6, 7).permute(2, 0, 1),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 10)[:, ::2],
        torch.randn(6, 1).expand(6, 4),
        torch.randn(()),
        torch.randn(0, 4),
    ):
        x = torch.empty_like(x, dtype=dtype, device=DEVICE).copy_(x) if x.is_contiguous() else x.to(DEVICE, dtype)
        mine, other = (x.detach().requires_grad_() for _ in range(2))
        found, wanted = gelu(mine, approximate), F.gelu(other, approximate=approximate)
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
        torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)
        grad = torch.randn_like(wanted)
        for cotangent in (grad, grad.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else grad):
            (a,) = torch.autograd.grad(found, mine, cotangent, retain_graph=True)
            (b,) = torch.autograd.grad(wanted, other, cotangent, retain_graph=True)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=2 * rounding, atol=2 * rounding)


def test_several_blocks_and_a_ragged_end() -> None:
    x = torch.randn(3 * BLOCK + 5, device=DEVICE).half()
    torch.testing.assert_close(gelu(x, "none"), F.gelu(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("approximate", FLAVOURS)
@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is the reference's, the same on every device")
def test_gradcheck(approximate: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gelu(x, approximate), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, device=DEVICE).to(dtype)
    torch.library.opcheck(gelu, (x.clone().requires_grad_(), "tanh"))
    torch.library.opcheck(gelu, (x.t().requires_grad_(), "none"))
    torch.library.opcheck(gelu_backward, (torch.randn_like(x), x, "none"))


def test_compiled_with_dynamic_sizes_it_agrees_with_eager() -> None:
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda x: gelu(x, "none") * 2, dynamic=True, fullgraph=True, backend=backend)
    for length in (5, 9, 32):
        leaves = [torch.randn(4, length, device=DEVICE).bfloat16().requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        results = [f(x) for f, x in zip((compiled, lambda x: F.gelu(x) * 2), leaves, strict=True)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.float().square().sum(), x) for y, x in zip(results, leaves, strict=True))
        )


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match="approximate is 'erf'; allowed: none, tanh"):
        gelu(x, "erf")
    with pytest.raises(ValueError, match="approximate is 'erf'; allowed: none, tanh"):
        gelu_backward(x, x, "erf")
    with pytest.raises(ValueError, match=r"grad.shape is \(2,\); allowed: x's \(3,\)"):
        gelu_backward(x[:2], x, "none")


def test_supports_says_why_not() -> None:
    x = torch.ones(4, 6, device=DEVICE, dtype=torch.bfloat16)
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(x) == "Triton has no backend for device 'cpu'"
        return
    assert supports(x) is None and supports(x.t()) is None
    assert "torch.float32" in supports(x.float())
    assert "gaps or overlaps" in supports(x[:, ::2]) and "gaps or overlaps" in supports(x[:1].expand(4, 6))


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not gradcheck and not compiled and not opcheck")
