"""Kernel tests on a machine without a GPU: once more in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["passes_in_interpreter"]


def passes_in_interpreter(*files: str, select: str) -> None:
    """Fails with the end of the output unless the selected tests of the files pass there."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", select]
    command += ["-W", "error:Conversion of an array:DeprecationWarning"]  # NumPy 2.5 refuses it
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
