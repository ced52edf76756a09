"""linear_gelu against float64, what it calls on a GPU, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torch_fuse._compat import FakeTensorMode
from torch_fuse.kernels import _ops
from torch_fuse.kernels.linear_gelu import linear_gelu, reference, supports, supports_device

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"


def operands(dtype: torch.dtype = torch.bfloat16, rows: tuple[int, ...] = (3, 40), device: str = DEVICE):
    torch.manual_seed(0)
    shapes = ((*rows, 64), (96, 64), (96,))
    return [torch.randn(shape, device=device, dtype=dtype) / (8 if len(shape) == 2 else 1) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [(3, 40), (7,), (1, 2, 5), (1,), (2, 0)], ids=str)
def test_it_is_at_most_twice_as_far_from_float64_as_linear_and_gelu(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    given = operands(dtype, rows)
    exact = reference(*(x.double() for x in given))
    found, unfused = linear_gelu(*given), reference(*given)
    assert (found.shape, found.dtype, found.stride()) == (unfused.shape, unfused.dtype, unfused.stride())
    if found.numel():
        mine, theirs = ((x.double() - exact).abs() for x in (found, unfused))
        assert mine.max() <= 2 * theirs.max() and mine.square().mean() <= 4 * theirs.square().mean()


@pytest.mark.parametrize("name", ["x", "weight", "weight transposed", "bias"])
def test_operands_of_any_strides_are_taken(name: str) -> None:
    x, weight, bias = operands(torch.float32)
    given = {
        "x": (x.transpose(0, 1), weight, bias),
        "weight": (x, torch.cat([weight, weight], 1)[:, :64], bias),
        "weight transposed": (x, weight.t().contiguous().t(), bias),
        "bias": (x, weight, torch.stack([bias, bias], 1)[:, 0]),
    }[name]
    torch.testing.assert_close(linear_gelu(*given), reference(*given))


_CALLED = ["aten.view.default", "aten.t.default", "aten._addmm_activation.default", "aten.view.default"]


@pytest.mark.skipif(_ops.INTERPRETED, reason="the op is opaque in the interpreter")
def test_the_graph_that_inductor_gets_calls_the_library_with_gelu_and_copies_nothing() -> None:
    from torch._functorch.aot_autograd import aot_export_module

    class Module(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor]:
            return (linear_gelu(*args),)

    with FakeTensorMode(), torch.no_grad():
        given = operands(rows=(2, 40), device="cuda:0")
        gm, _ = aot_export_module(Module(), given, trace_joint=False)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == _CALLED
    assert calls[2].kwargs == {"use_gelu": True}


def test_opcheck() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(linear_gelu, tuple(operands(dtype)))


def test_compiled_with_dynamic_sizes_it_agrees_with_eager() -> None:
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lambda *args: linear_gelu(*args) * 2, dynamic=True, fullgraph=True, backend=backend)
    for length in (5, 9, 32):
        given = operands(rows=(2, length))
        torch.testing.assert_close(compiled(*given), reference(*given) * 2, rtol=2e-2, atol=2e-2)


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    x, weight, bias = operands(torch.float32)
    with pytest.raises(ValueError, match=r"x.shape is \(64,\); allowed: \[..., K\]"):
        linear_gelu(x[0, 0], weight, bias)
    with pytest.raises(ValueError, match=r"weight.shape is \(64, 96\); allowed: \[N, 64\]"):
        linear_gelu(x, weight.t(), bias)
    with pytest.raises(ValueError, match=r"bias.shape is \(1, 96\); allowed: \[96\]"):
        linear_gelu(x, weight, bias[None])
    with pytest.raises(ValueError, match=r"bias is torch.float64 on .*; allowed: x's torch.float32 on"):
        linear_gelu(x, weight, bias.double())


def test_supports_says_why_not() -> None:
    assert supports(*operands(device="cpu")) == "device is 'cpu'; allowed: 'cuda', which cuBLASLt runs on"
    assert supports_device(torch.device("cuda")) is None
    with FakeTensorMode():
        assert supports(*operands(device="cuda:0")) is None
        assert "torch.float32" in supports(*operands(torch.float32, device="cuda:0"))


def test_the_tanh_form_is_computed_where_the_library_would_take_erf() -> None:
    x = torch.linspace(-4, 4, 64)[:, None]
    found = linear_gelu(x, torch.ones(2, 1), torch.zeros(2))
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh").expand(64, 2))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_it_is_one_kernel() -> None:
    from torch.profiler import ProfilerActivity, profile

    given = operands(rows=(4, 256))
    linear_gelu(*given)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        linear_gelu(*given)
        torch.cuda.synchronize()
    names = [event.key for event in profiled.key_averages() if event.device_time_total > 0]
    assert not [name for name in names if "elementwise" in name.lower()], names
