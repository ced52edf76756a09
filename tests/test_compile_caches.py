"""Rewritten graphs stay in torch's caches of compiled graphs: nothing is emitted that a cache would not know again."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from spelled import Block, Spelling, make_input
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from torch_fuse import Options, kernels
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.pattern import Example
from torch_fuse.rewrite.registry import patterns

# Patterns that take small examples as they are, and the attention block at a length that pays.
NAMES = ["causal_mask", "decode_attention", "linear_gelu", "mlp_gelu"]
LONG = Spelling(length=33, dtype=torch.bfloat16)
EXAMPLES = {name: next(iter(patterns()[name].spellings())) for name in NAMES} | {
    "norm_qkv_rope_attention": Example("long", lambda dtype: (Block(LONG).to(dtype), (make_input(LONG),)))
}


@pytest.fixture
def gpu(monkeypatch) -> None:
    """As if the kernels ran on the CPU; the graphs are not run."""
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"torch_fuse.kernels.{info.name}")
        for name in {"no_triton", "supports_device"}.intersection(vars(module)):
            monkeypatch.setattr(module, name, lambda x: None)
    monkeypatch.setattr("torch_fuse.patterns.mlp_gelu.MIN_ELEMENTS", 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_pattern_emits_can_be_cached(name: str, grad: bool, gpu) -> None:
    model, inputs = EXAMPLES[name].make(torch.bfloat16)
    if name in ("decode_attention", "linear_gelu") and grad:
        pytest.skip("fuses without gradients only")
    fused = []

    def backend(gm, example_inputs):
        outcome = rewrite(gm, Options(on_error="raise", only=(name,), unmeasured=True), patterns())
        fused.extend(site for site in outcome.report.sites if (site.pattern, site.status) == (name, "fused"))
        check_cacheable(outcome.gm)  # raises where AOTAutograd's cache would be bypassed
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(*inputs)
    assert fused
