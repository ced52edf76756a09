"""Is any model slower than with Inductor alone? Some thirty of every kind, in a few minutes of one GPU.

Each model has a process of its own, so that a crash or a hang costs one model. Several compile at the same time, on one
core each; a model that is ready is timed alone: all others are stopped meanwhile. Compile times are of processor time.

    python benchmarks/against_inductor.py --out results.jsonl --seconds 420     # goes on where the file ends
    python benchmarks/against_inductor.py --only llama-3-8b flux
    python benchmarks/against_inductor.py --table results.jsonl
    python benchmarks/against_inductor.py --dry --eager     # tiny, on the CPU, rewritten but not compiled
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SLOWEST = 0.98  # of Inductor's speed


class Runner:
    """Runs models, several at a time, and times one at a time.

    Args:
        given: the command line.
        deadline: nothing goes on after it, by `time.monotonic`.
    """

    def __init__(self, given: argparse.Namespace, deadline: float) -> None:
        self._given = given
        self._deadline = deadline
        self._device = threading.Lock()  # who holds it times or starts a process
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, name: str) -> None:
        """Measures one model, unless time is up; a row says so when it fails."""
        if time.monotonic() >= self._deadline:
            return
        start = time.monotonic()
        limit = min(self._given.limit, self._deadline - start)
        with tempfile.TemporaryFile("w+") as errors:
            with self._device:
                child = self._start(name, errors)
                self._running.add(child)
            timer = threading.Timer(limit, _signal, (child, signal.SIGKILL))
            timer.start()
            try:
                self._follow(child)
            finally:
                timer.cancel()
                self._running.discard(child)
            errors.seek(0)
            told = errors.read()
        seconds = time.monotonic() - start
        sys.stderr.write(f"{name}: {seconds:.0f} s, exit status {child.returncode}\n")
        if child.returncode and time.monotonic() < self._deadline:
            reason = told[-600:] if child.returncode > 0 else f"killed by signal {-child.returncode}, {seconds:.0f} s"
            self._write({"what": "against_inductor", "model": name, "error": reason, "dry": self._given.dry})

    def stop(self) -> None:
        """Ends everything at once."""
        self._deadline = 0.0
        for child in list(self._running):
            _signal(child, signal.SIGKILL)

    def _start(self, name: str, errors: Any) -> subprocess.Popen[str]:
        given = self._given
        command = [sys.executable, __file__, "--child", name, "--reps", str(given.reps), "--rounds", str(given.rounds)]
        command += ["--out", str(given.out)] if given.out else []
        command += [f"--{flag}" for flag in ("dry", "eager") if getattr(given, flag)]
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            env=os.environ | variables,
        )  # fmt: skip

    def _follow(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None and child.stdin is not None
        for line in child.stdout:
            if line != "ready\n":
                sys.stdout.write(line)
                continue
            with self._device, self._others_stopped(child), contextlib.suppress(BrokenPipeError):
                child.stdin.write("go\n")
                child.stdin.flush()
                for answer in child.stdout:
                    sys.stdout.write(answer)
                    if answer.startswith('{"what"'):
                        break  # its row; the rest is clearing up
        child.wait()

    @contextlib.contextmanager
    def _others_stopped(self, child: subprocess.Popen[str]) -> Any:
        others = self._running - {child}
        for other in others:
            _signal(other, signal.SIGSTOP)
        time.sleep(self._given.settle)  # what they have launched ends
        try:
            yield
        finally:
            for other in others:
                _signal(other, signal.SIGCONT)

    def _write(self, row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        if self._given.out:
            with self._given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _signal(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the child and what it has started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def child(given: argparse.Namespace) -> None:
    """The process of one model."""
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers
    from against_inductor_measure import measure, wait_for_turn
    from common import Log

    transformers.logging.set_verbosity_error()
    log = Log(str(given.out) if given.out else None)
    measure(given.child, log, given.dry, given.eager, given.reps, given.rounds, wait_for_turn)
    sys.stdout.flush()
    os._exit(0)  # a CUDA context takes its time to go


def rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def table(found: list[dict[str, Any]]) -> str:
    """Model by model, the slowest against Inductor first."""
    lines = ["model                    graph: Inductor     fuse  ratio (rounds)         calls: ratio   error  fused"]
    latest = {row["model"]: row for row in found}  # a model that failed may have been run again
    for row in sorted(latest.values(), key=lambda row: row.get("graph_ratio", row.get("calls_ratio", 0.0))):
        if "error" in row:
            lines.append(f"{row['model']:24} failed: {row['error'].strip().splitlines()[-1]}")
            continue
        kind = "graph" if "graph_ratio" in row else "calls"
        fused = {name: counts["fused"] for name, counts in row["sites"].items() if "fused" in counts}
        lines.append(
            f"{row['model']:24} {row[f'{kind}_ms_inductor']:12.3f} ms {row[f'{kind}_ms_fuse']:8.3f} "
            f"{row[f'{kind}_ratio']:6.3f} {row[f'{kind}_ratio_range']!s:18} {row['calls_ratio']:9.3f} "
            f"{row['rms_fuse'] / max(row['rms_eager'], 1e-30):12.2f}  "
            + " ".join(f"{name}={n}" for name, n in fused.items())
            + ("  SLOWER" if row[f"{kind}_ratio"] < SLOWEST and not row["dry"] else "")
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="JSON lines; models that have a row without an error are not run again"
    )
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on the CPU, with the ops' plain torch implementations"
    )
    parser.add_argument("--eager", action="store_true", help="rewritten, but not compiled, next to the model as it is")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so many")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one model")
    parser.add_argument("--workers", type=int, default=14, help="models that compile at the same time")
    parser.add_argument("--settle", type=float, default=0.3, help="seconds of rest before a model is timed")
    parser.add_argument("--reps", type=int, default=6, help="calls timed in a row")
    parser.add_argument("--rounds", type=int, default=9, help="how often the two sides take turns")
    parser.add_argument("--table", type=Path, help="print such a file as a table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        sys.stdout.write(table(rows(given.table)))
        return
    if given.child:
        child(given)
        return
    from against_inductor_models import MODELS

    unknown = sorted(set(given.only or ()) - set(MODELS))
    if unknown:
        parser.error(f"--only has {unknown[0]!r}; allowed: {', '.join(MODELS)}")
    done = {row["model"] for row in rows(given.out) if "error" not in row}
    names = [name for name in given.only or MODELS if name not in done]
    runner = Runner(given, time.monotonic() + given.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ThreadPoolExecutor(given.workers) as pool:
        try:
            list(pool.map(runner.run, names))
        except BaseException:
            runner.stop()
            raise
    if given.out:
        sys.stdout.write(table(rows(given.out)))


if __name__ == "__main__":
    main()
