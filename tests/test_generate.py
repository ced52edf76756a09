"""The libraries' own ways to compile reach the backend, in a process that never imports torch_fuse itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_BEFORE = """
import json, sys
import torch
torch.set_num_threads(1)
import models
"""
_AFTER = """
assert "torch_fuse" in sys.modules, "the backend was not reached"
import torch_fuse
report = torch_fuse.reports()
print("RESULT", json.dumps({"counts": report.counts(), "errors": report.to_dict()["errors"], "same": same}))
"""

_GENERATE = """
from transformers import CompileConfig
# A cache of 128 tokens and a prompt of 20: the mask is causal but for the cache's unused end.
model = models.build("Llama", num_hidden_layers=1, intermediate_size=32, max_position_embeddings=128)
model.generation_config.eos_token_id = None
prompt = models.inputs("Llama", batch=2, length=20)["input_ids"]
asked = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
expected = model.generate(prompt, **asked)
assert "torch_fuse" not in sys.modules
config = CompileConfig(backend="fuse", fullgraph=False)
config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
found = model.generate(prompt, **asked, cache_implementation="static", compile_config=config)
same = bool(torch.equal(found, expected))
"""

_REPEATED_BLOCKS = """
model = models.build("Wan", num_layers=1, ffn_dim=32)
inputs = models.inputs("Wan", batch=1, length=8)
with torch.no_grad():
    expected = model(**inputs)[0]
    assert "torch_fuse" not in sys.modules
    model.compile_repeated_blocks(backend="fuse", options={"kernels": "reference"})
    found = model(**inputs)[0]
torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
same = True
"""


def _run(script: str) -> dict[str, Any]:
    """Runs a script in a fresh process and returns what it reports."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _BEFORE + script + _AFTER], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_generate_with_a_static_cache_gives_the_tokens_that_eager_gives() -> None:
    result = _run(_GENERATE)
    assert result["same"]
    assert not result["errors"]
    attention = result["counts"]["norm_qkv_rope_attention"]
    assert sum(attention.values()) >= 1


def test_compiled_repeated_blocks_of_diffusers_give_what_eager_gives() -> None:
    result = _run(_REPEATED_BLOCKS)
    assert result["same"]
    assert not result["errors"]
    assert result["counts"]["norm_qkv_rope_attention"]["fused"] >= 1


# The tokens are the ops'; that Inductor takes a step as it is, test_decode.py shows.
_DECODE = """
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig
import torch_fuse.backend
sys.modules["torch_fuse.backend"].compile_with_inductor = lambda gm, inputs, patches: aot_eager(gm, inputs)
same = True
for name, batch, layers, lengths in (("GPTNeoX", 1, 2, (20, 7)), ("Llama", 3, 1, (9,))):
    torch._dynamo.reset()
    model = models.build(name, max_position_embeddings=128, num_hidden_layers=layers, intermediate_size=32)
    model.generation_config.eos_token_id = None
    config = CompileConfig(backend="fuse", fullgraph=True, mode=None, options={"kernels": "reference"})
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    for length in lengths:
        prompt = models.inputs(name, batch=batch, length=length)["input_ids"]
        asked = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected = model.generate(prompt, **asked)
        found = model.generate(prompt, **asked, cache_implementation="static", compile_config=config)
        same = same and bool(torch.equal(found, expected))
"""


def test_the_ops_of_a_decoding_step_generate_the_tokens_that_eager_generates() -> None:
    result = _run(_DECODE)
    assert result["same"]
    assert not result["errors"]
    for op in ("decode_attention", "decode_norm_linear", "decode_linear_residual", "decode_stack"):
        assert result["counts"][op]["fused"] >= 1, result["counts"]
