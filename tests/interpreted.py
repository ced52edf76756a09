"""Run by test_interpreter.py with TRITON_INTERPRET=1: models and spellings with the Triton kernels on the CPU.

Prints one JSON line: for each case, how many sites the fused op took and what disagreed.
"""

from __future__ import annotations

import json
import sys

import models
import torch
import torch.nn.functional as F
from harness import Comparison, compare
from spelled import Block, Spelling, make_input
from torch import Tensor

from torch_fuse import Options
from torch_fuse.kernels import linear_skip_backward
from torch_fuse.patterns import (
    _attention_skip_examples,
    _gated_residual_norm_examples,
    attention_skip,
    gated_residual_norm,
    masked_attention,
)

AUTO = Options(kernels="auto", unmeasured=True, on_error="raise")

PATTERNS = (
    "norm_qkv_rope_attention", "gated_residual_norm", "masked_attention", "softcap_sinks_attention", "attention_skip",
)  # fmt: skip
SPELLINGS = {
    "half": Spelling(),
    "partial_interleaved": Spelling(rotary_dim=4, interleaved=True),
    "grouped_rms_per_head_bfloat16": Spelling(groups=2, norm="rms", dtype=torch.bfloat16),
    "gemma_over_all_heads": Spelling(norm="gemma", norm_over="all", table="half"),
    "layer_per_head_float16": Spelling(norm="layer", rotate_transposed=False, dtype=torch.float16),
    "stores_stacked": Spelling(projection="stacked", rotation="stores", interleaved=True),
    "per_head_split_strided": Spelling(projection="per_head", rotary_dim=4, strided_input=True, bias=True),
}


def spelled(name: str) -> Comparison:
    """A block of at least 64 tokens, which is where the pattern begins to use the kernel."""
    fields = {**SPELLINGS[name].__dict__, "length": 33}
    spelling = Spelling(**fields)
    torch.manual_seed(0)
    return compare(Block(spelling).to(spelling.dtype), (make_input(spelling),), options=AUTO, draws=2)


def three_layers(x: Tensor, y: Tensor, padding: Tensor) -> list[Tensor]:
    """Padding alone, then with a causal mask; then other padding in a window. Layers share the range of kept keys."""
    keep, i, results = (padding != 0)[:, None, None], torch.arange(x.shape[1]), []
    for layer, mask in enumerate((keep, keep & (i[None] <= i[:, None]), None)):
        if mask is None:
            mask = (padding.flip(1) != 0)[:, None, None] & ((i[None] - i[:, None]).abs() < 9)
        q, k, v = x.unflatten(2, (2, 32)), y[:, :, None], (y * (layer + 1))[:, :, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)
        results.append(x)
    return results


def padded() -> Comparison:
    """The interpreter multiplies the bits of bfloat16 as integers."""
    masked_attention.MIN_LENGTH = {"band": 1, "keys": 1}
    x, y = (torch.randn(2, 70, n, dtype=torch.float16, requires_grad=True) for n in (64, 32))
    padding = torch.ones(2, 70, dtype=torch.int64)
    padding[0, 60:], padding[1, :5], padding[1, 20] = 0, 0, 0
    return compare(three_layers, (x, y, padding), options=AUTO, draws=1)


def two_written_out(x: Tensor, y: Tensor, sinks: Tensor, padding: Tensor) -> list[Tensor]:
    """As Gemma 2 and gpt-oss write attention: with a soft cap in a window; with sinks and padding."""
    i, results = torch.arange(x.shape[1]), []
    keep = i[None] <= i[:, None]
    for layer, mask in enumerate((keep & (i[None] > i[:, None] - 20), keep & (padding != 0)[:, None, None])):
        q, k, v = (t.unflatten(2, (-1, 32)).transpose(1, 2) for t in (x, y, y * 0.5))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        scores = q @ k.transpose(2, 3) * 0.3
        if layer == 0:
            scores = torch.tanh(scores / 2.0) * 2.0
        scores = scores.masked_fill(~mask, -torch.inf)
        if layer == 1:
            scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        x = ((weights[..., :-1] if layer == 1 else weights) @ v).transpose(1, 2).flatten(2)
        results.append(x)
    return results


def capped_and_sunk() -> Comparison:
    """Both features of the kernels, through the pattern."""
    x, y = (torch.randn(2, 70, n, dtype=torch.float16, requires_grad=True) for n in (64, 32))
    padding = torch.ones(2, 70, dtype=torch.int64)
    padding[0, 60:], padding[1, :5] = 0, 0
    sinks = torch.randn(2, dtype=torch.float16, requires_grad=True)
    return compare(two_written_out, (x, y, sinks, padding), options=AUTO, draws=1)


def main() -> None:
    results = {name: spelled(name) for name in SPELLINGS}
    for name in ("GPTNeoX", "Qwen3", "Wan"):
        inputs = models.inputs(name, batch=2, length=64 if name == "Wan" else 33)
        results[name] = compare(models.build(name), kwargs=inputs, options=AUTO, draws=1)
    gated_residual_norm.MIN_WIDTH, gated_residual_norm.MIN_ELEMENTS = 8, 1
    for name in ("neox_parallel", "wan_feed_forward", "bert_post_norm"):
        model, inputs = _gated_residual_norm_examples._example(getattr(_gated_residual_norm_examples, name), True).make(
            torch.float32
        )
        results[name] = compare(model, inputs, options=AUTO, draws=2)
    attention_skip.MIN_ROWS = 1
    linear_skip_backward.MIN_LENGTH = 1
    for name in ("rcm", "layer_scale", "conv1d", "lerp", "written_out_lerp_back"):
        made = _attention_skip_examples.make(getattr(_attention_skip_examples, name), torch.float16)
        results[name] = compare(*made, options=AUTO, draws=2)
        assert {site.op for site in results[name].report.sites if site.status == "fused"} == {"torch_fuse::linear_skip"}
    results["padded"] = padded()
    assert results["padded"].fused("masked_attention") == 3, results["padded"].reasons
    results["capped_and_sunk"] = capped_and_sunk()
    assert results["capped_and_sunk"].fused("softcap_sinks_attention") == 2, results["capped_and_sunk"].reasons
    told = {
        name: {
            "fused": max(r.fused(pattern) for pattern in PATTERNS),
            "problems": r.problems,
            "report": r.reasons,
        }
        for name, r in results.items()
    }
    sys.stdout.write("RESULT " + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
