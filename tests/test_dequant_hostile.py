"""Linear layers with quantised weights that look like what is recognised, and what must hold for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, rewritten
from test_dequant import PATTERN, Packed, run
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse.kernels import _dequant_dispatch as dispatch
from torch_fuse.kernels import dequant_linear
from torch_fuse.kernels._measured import not_hopper
from torch_fuse.patterns import _dequant_refusals
from torch_fuse.patterns._dequant_examples import Quantised

SIZE = 32  # of the square weights: an axis taken for the other one is no error of shapes


def square(forward: Callable[[Any, Tensor], Any]) -> Quantised:
    torch.manual_seed(0)
    return Quantised(
        forward,
        q=torch.randint(-100, 100, (SIZE, SIZE)).to(torch.int8),
        s=torch.rand(SIZE, 1) + 0.5,
        z=torch.full((SIZE, 1), 199, dtype=torch.int32),
    )


def _written_before_the_scale(what: str) -> Callable[[Any, Tensor], Any]:
    def forward(m: Any, x: Tensor) -> Any:
        x = x + 0
        y = F.linear(x, m.q.to(x.dtype))
        {"x": x, "codes": m.q, "scale": m.s}[what].mul_(2)
        return y * m.s.flatten(), x

    return forward


def _other_axis(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.q.to(x.dtype) * m.s.t())


HOSTILE: dict[str, Callable[[Any, Tensor], Any]] = {
    **{f"{what} written before the scale": _written_before_the_scale(what) for what in ("x", "codes", "scale")},
    "scale of the other axis": _other_axis,
    "scale that is the zero point": lambda m, x: F.linear(x, (m.q.to(x.dtype) - m.s) * m.s),
    "random scale": lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s * (torch.rand_like(m.s) > -1)),
    "infinite bound": lambda m, x: F.linear(x, (m.q.to(x.dtype) * m.s).clamp(max=float("inf"))),
    "turned around": lambda m, x: F.linear(x, (m.q.to(x.dtype) * m.s).t()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_only_looks_like_a_format_computes_what_it_did(name: str) -> None:
    x = torch.randn(5, SIZE)
    module, plain = square(HOSTILE[name]), square(HOSTILE[name])
    found, _, _ = run(module, x.clone())
    with torch.no_grad():
        torch.testing.assert_close(found, plain(x.clone()), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)


def test_what_was_proven_for_another_default_type_does_not_count() -> None:
    """`int8 * 1.0` is of the default type, which rounds q - zero."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, ((m.q * 1.0 - m.z) * m.s).to(x.dtype))

    module, x = square(forward), torch.randn(5, SIZE)
    _, rewriter, _ = run(module, x)
    assert rewriter.statuses == {(PATTERN, "fused")}
    torch._dynamo.reset()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _, _ = run(module, x)
        with torch.no_grad():
            assert torch.equal(found, module(x))
    finally:
        torch.set_default_dtype(torch.float32)


class Multiplied(Packed):
    """A packed weight that products other than `linear` take too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            return args[0] @ (args[1].codes.to(args[1].dtype) * args[1].scale)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_tensor_subclass_is_not_taken_for_transposed() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.randint(-128, 128, (SIZE, SIZE)).to(torch.int8)
            self.weight = nn.Parameter(Multiplied(codes, torch.rand(SIZE, 1)), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight)

    layer, x = Layer(), torch.randn(3, SIZE)
    with torch.no_grad():
        found, rewriter, _ = run(layer, x)
        torch.testing.assert_close(found, layer(x))
    assert (PATTERN, "fused") not in rewriter.statuses


def _layer(form: str, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A layer of K = 256 columns in a format, as users write it."""
    n, k, group = 16, 256, 128
    codes = torch.randint(0, 256, (n, k if "int8" in form else k // 2)).to(torch.uint8)
    scale, zero = torch.rand(n, 1 if "int8" in form else k // group).to(dtype), torch.randint(0, 9, (n, k // group))

    def forward(m: Any, x: Tensor) -> Tensor:
        if "int8" in form:
            return F.linear(x, m.q.to(x.dtype) * m.s)
        halves = [m.q >> 4, m.q & 15] if "high" in form else [m.q & 15, m.q >> 4]
        q = torch.stack(halves, -1).view(n, -1, group).to(x.dtype)
        q = q - m.z.to(x.dtype)[:, :, None] if "zero" in form else q - 8
        return F.linear(x, (q * m.s[:, :, None]).view(n, k))

    codes = codes if "uint8" in form or "int8" not in form else codes.view(torch.int8)
    return Quantised(forward, q=codes, s=scale, z=zero.to(torch.int32))


@pytest.mark.parametrize("form, rows, reason", [
    ("int8", (1,), None), ("int8", (2, 8), None), ("int4", (16,), None), ("int4 zero", (1, 1), None),
    ("int8", (256,), None), ("int8", (257,), "257 rows"), ("int4", (0,), "0 rows"), ("uint8", (1,), "for this format"),
    ("int4 high", (1,), "for this format"), ("int8 trained", (1,), "a gradient"), ("int8 dynamic", (4,), "not static"),
    ("int8 without graphs", (1,), "CUDA graphs"),
])  # fmt: skip
def test_only_what_is_measured_to_win_fires_by_default(
    form: str, rows: tuple[int, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dequant_refusals, "not_hopper", lambda device: None)
    monkeypatch.setattr(dequant_linear, "supports_device", lambda device: None)
    monkeypatch.setattr(dequant_linear, "supports", lambda *args: None)
    monkeypatch.setattr(dispatch.few, "MISSING", "")
    module, x = _layer(form), torch.randn(*rows, 256).half()
    graphs = {} if "without graphs" in form else {"triton.cudagraphs": True}
    rewriter = Rewriter(Options(on_error="raise", inductor=graphs))
    torch._dynamo.reset()
    if "dynamic" in form:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.set_grad_enabled("trained" in form):
        x.requires_grad_("trained" in form)
        torch.testing.assert_close(rewritten(module, rewriter)(x), module(x))
    assert rewriter.statuses == {(PATTERN, "fused" if reason is None else "kept")}, str(rewriter.report)
    assert reason is None or reason in rewriter.report.sites[0].reason


def test_nothing_is_measured_but_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in (not_hopper(torch.device("cpu")) or "")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, measured in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (not_hopper(torch.device("cuda")) is None) == measured
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "cuda" in (not_hopper(torch.device("cuda")) or "")


def test_the_kernels_get_a_bias_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read it so; a column of a table and one number for all are right, too."""
    module, seen = importlib.import_module("torch_fuse.kernels.dequant_linear"), list[Tensor]()

    def run_instead(x: Tensor, codes: Tensor, scale: Tensor, zero: Any, lut: Any, bias: Tensor, *_: Any) -> Tensor:
        seen.append(bias)
        return x @ (codes * scale).t() + bias

    monkeypatch.setattr(module._dequant_dispatch, "supports", lambda *_: None)
    monkeypatch.setattr(module._dequant_dispatch, "run", run_instead)
    x, codes, scale = torch.randn(2, SIZE), torch.ones(8, SIZE, dtype=torch.int8), torch.ones(8, 1)
    form = (8, "int", 1, SIZE, 0, "low", "sub_mul", "float32")
    for bias in (torch.randn(8, 3)[:, 1], torch.randn(1).expand(8)):
        found = module.dequant_linear(x, codes, scale, None, None, bias, *form)
        torch.testing.assert_close(found, x @ codes.float().t() + bias)
        assert seen.pop().is_contiguous()
