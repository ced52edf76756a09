"""Models and spellings with the Triton kernels themselves, run by Triton's interpreter, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "interpreted.py"
CASES = [
    "half", "partial_interleaved", "grouped_rms_per_head_bfloat16", "gemma_over_all_heads", "layer_per_head_float16",
    "stores_stacked", "per_head_split_strided", "GPTNeoX", "Qwen3", "Wan",
]  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What each case gave; Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.xdist_group("interpreter")
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_agree_with_the_graph_that_they_replace(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["fused"] >= 1, found["report"]
    assert not found["problems"]
