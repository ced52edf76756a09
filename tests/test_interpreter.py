"""Models and spellings with the Triton kernels themselves, run by Triton's interpreter, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "interpreted.py"


def test_the_kernels_agree_with_the_graphs_that_they_replace() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = json.loads(line.removeprefix("RESULT "))
    assert len(results) == 20
    assert not {name: found["report"] for name, found in results.items() if found["fused"] < 1}
    assert not {name: found["problems"] for name, found in results.items() if found["problems"]}
