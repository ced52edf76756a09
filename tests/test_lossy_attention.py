"""`options["lossy"]`: attention in 8 bits where, and only where, it is allowed."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, rewritten
from torch import Tensor, nn

from torch_fuse import Options, reports, reset_reports
from torch_fuse.rewrite.registry import patterns

PATTERN = "quantised_attention"
LOSSY = Options(kernels="reference", on_error="raise", lossy=("attention",))
module = importlib.import_module("torch_fuse.kernels.quantised_attention")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("example", list(patterns()[PATTERN].spellings()), ids=lambda example: example.name)
def test_a_spelling_fires_with_the_option_only(example, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = example.make(dtype)
    wanted = model(*(x.double() for x in inputs))
    for options, fires in ((LOSSY, True), (Options(kernels="reference", unmeasured=True), False)):
        rewriter = Rewriter(options)
        found = rewritten(model, rewriter)(*inputs)
        assert ((PATTERN, "fused") in rewriter.statuses) == fires, str(rewriter.report)
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, dtype, model(*inputs).stride())
        error = (found.double() - wanted).abs().sum() / wanted.abs().sum()
        assert error <= 0.05 and (error >= 0.005) == fires, error


@pytest.mark.parametrize("example", list(patterns()[PATTERN].near_misses()), ids=lambda example: example.name)
def test_a_near_miss_stays_exact_and_says_why(example) -> None:
    model, inputs = example.make(torch.bfloat16)
    rewriter = Rewriter(LOSSY)
    try:
        wanted = model(*inputs)
    except RuntimeError:  # is_causal with fewer keys: PyTorch's own refusal, which stays its own
        return
    found = rewritten(model, rewriter)(*inputs)
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    assert PATTERN not in {pattern for pattern, status in rewriter.statuses if status == "fused"}


def test_a_mask_and_fp32_are_refused_in_words() -> None:
    q = torch.randn(1, 2, 9, 64)
    mask = torch.rand(9, 9) > 0.1
    mask[:, 0] = True
    for model, inputs, reason in (
        (lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), q.half(), "it reads a mask"),
        (lambda q: F.scaled_dot_product_attention(q, q, q), q, "dtype is torch.float32"),
    ):
        rewriter = Rewriter(Options(kernels="reference", lossy=("attention",), only=(PATTERN,)))
        rewritten(model, rewriter)(inputs)
        assert any(reason in site.reason for site in rewriter.report.sites), str(rewriter.report)


def test_on_a_device_without_fp8_it_is_kept_with_the_reason() -> None:
    q = torch.randn(1, 2, 9, 64).half()
    rewriter = Rewriter(Options(lossy=("attention",), unmeasured=True, only=(PATTERN,)))
    rewritten(lambda q: F.scaled_dot_product_attention(q, q, q), rewriter)(q)
    assert any("not in 8 bits" in site.reason and "cpu" in site.reason for site in rewriter.report.sites)


@pytest.mark.parametrize(
    ("dim", "is_causal", "length", "reason"),
    [
        (128, False, 16384, None),
        (128, False, 16383, "as fast for head_dim 128, not causal of length 16383; it pays from 16384 on"),
        (128, True, 32768, "as fast for head_dim 128, causal"),
        (64, False, 32768, "as fast for head_dim 64, not causal"),
    ],
)
@pytest.mark.parametrize("hopper", [True, False])
def test_the_option_alone_takes_what_was_measured_to_win(
    dim: int, is_causal: bool, length: int, reason: str | None, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "supports", lambda *args: None)
    monkeypatch.setattr(module, "hopper_config", lambda q: module.HOPPER[dim] if hopper else None)
    rewriter = Rewriter(Options(lossy=("attention",), only=(PATTERN,)))
    q = torch.empty(1, 1, length, dim, dtype=torch.bfloat16, device="meta")
    rewritten(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=is_causal), rewriter)(q)
    (site,) = (site for site in rewriter.report.sites if site.pattern == PATTERN)
    if hopper and reason is None:
        assert site.status == "fused"
    else:
        assert site.status == "kept" and (reason if hopper else "measured on Hopper") in site.reason


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 64).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("lossy", [True, False])
def test_a_model_compiled_with_the_option_trains(lossy: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    reset_reports()
    model, x = Layer().bfloat16(), torch.randn(2, 40, 128).bfloat16()
    options = {"kernels": "reference", "on_error": "raise", **({"lossy": ["attention"]} if lossy else {})}
    compiled = torch.compile(model, backend="fuse", options=options)
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        out = call(x)
        out.float().square().sum().backward()
        grads.append(model.qkv.weight.grad.clone())
    assert (reports().counts().get(PATTERN) == {"fused": 1}) == lossy, str(reports())
    assert (grads[0] - grads[1]).norm() <= 0.1 * grads[0].norm()
