"""Run by test_interpreter.py with TRITON_INTERPRET=1: models and spellings with the Triton kernels on the CPU.

Prints one JSON line: for each case, how many sites the fused op took and what disagreed.
"""

from __future__ import annotations

import json
import sys

import models
import torch
from harness import Comparison, compare
from spelled import Block, Spelling, make_input

from torch_fuse import Options
from torch_fuse.patterns import _gated_residual_norm_examples, gated_residual_norm

AUTO = Options(kernels="auto", unmeasured=True, on_error="raise")

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
    told = {
        name: {
            "fused": max(r.fused(pattern) for pattern in ("norm_qkv_rope_attention", "gated_residual_norm")),
            "problems": r.problems,
            "report": r.reasons,
        }
        for name, r in results.items()
    }
    sys.stdout.write("RESULT " + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
