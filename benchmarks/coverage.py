"""Which attentions of which architectures are recognised, and whether the rewritten models still compute the same.

Every causal language model of transformers, every transformer of diffusers and the usual encoders, tiny and randomly
initialised, each in a process of its own. The rewritten graphs run in eager mode with the ops' plain torch
implementations (`kernels="reference"`): what counts here is what is recognised, not how fast it is.

python benchmarks/coverage.py --out benchmarks/results/coverage.jsonl          # goes on where the file ends
python benchmarks/coverage.py --only llama qwen3 --quick                        # recognition only
python benchmarks/coverage.py --table benchmarks/results/coverage.jsonl > docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEMORY = 8 << 30  # bytes that one model may take


def cases() -> dict[str, Callable[[], Any]]:
    """Every model by name, with the function that builds it."""
    import coverage_diffusers
    import coverage_encoders
    import coverage_lm

    found: dict[str, Callable[[], Any]] = {}
    for module in (coverage_lm, coverage_encoders, coverage_diffusers):
        found.update(module.cases())
    return found


def run_one(name: str, build: Callable[[], Any], quick: bool, padding: bool, seconds: int) -> dict[str, Any]:
    """Measures one model in a child process, which may crash or hang."""
    start = time.perf_counter()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time
        signal.alarm(20 * seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with os.fdopen(writer, "w") as out:
            json.dump(_measured(build, quick, padding), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGALRM, signal.SIGPROF)
        why = f"took longer than {seconds} s" if slow else f"died of signal {number}"
        row: dict[str, Any] = {"error": why, "stage": "run"}
    else:
        row = json.loads(text) if text else {"error": f"exit status {os.WEXITSTATUS(status)}", "stage": "run"}
    group = getattr(getattr(build, "func", build), "__module__", "").removeprefix("coverage_")
    return {"model": name, "group": group, "padding": padding, **row, "seconds": round(time.perf_counter() - start, 1)}


def _measured(build: Callable[[], Any], quick: bool, padding: bool) -> dict[str, Any]:
    import coverage_measure

    stage = "build"
    try:
        case = build()
        stage = "eager"
        case.run(case.model)
        stage = "fused"
        return coverage_measure.measure(case, quick, padding)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"stage": stage, "error": f"{type(error).__name__}: {str(error)[:300]} ({where})"}


def _warm_up() -> None:
    """Loads what every child needs, once, and before a file changes."""
    import coverage_measure  # noqa: F401
    import torch
    from harness import Rewriter, rewritten

    rewritten(torch.nn.Linear(2, 2), Rewriter())(torch.ones(1, 2))
    torch._dynamo.reset()


def _done(path: Path) -> set[tuple[str, bool]]:
    if not path.exists():
        return set()
    return {(row["model"], row["padding"]) for row in map(json.loads, path.read_text().splitlines())}


def _show(row: dict[str, Any]) -> None:
    kinds = ("fused", "kept", "missed")
    counts = " ".join(f"{row.get(kind, 0)} {kind}" for kind in kinds) if "sites" in row else ""
    wrong = "".join(f"  WRONG: {item}" for item in row.get("wrong", ()))
    error = f"{row['stage']}: {row['error']}" if "error" in row else ""
    sys.stdout.write(f"{row['model']:32} {row['seconds']:6} s  {counts}{error}{wrong}\n")
    for reason in sorted({site["reason"] for site in row.get("missed_sites", ())}):
        sys.stdout.write(f"{'':34}missed: {reason}\n")
    sys.stdout.flush()


def _jobs(names: list[str], number: int, count: int) -> Iterator[str]:
    yield from names[number::count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of models; a trailing * matches any ending")
    parser.add_argument("--out", type=Path, help="JSON lines; models that have a line are not run again")
    parser.add_argument("--quick", action="store_true", help="recognition only: no float64, no gradients, one length")
    parser.add_argument("--padding", action="store_true", help="with padded attention masks, left and right")
    parser.add_argument("--seconds", type=int, default=120, help="processor time for one model")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--table", type=Path, help="print docs/coverage.md from such a file")
    options = parser.parse_args()
    if options.table:
        import coverage_table

        sys.stdout.write(coverage_table.table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(ROOT / "tests")]
    import transformers

    transformers.logging.set_verbosity_error()
    _warm_up()
    known = cases()
    done = _done(options.out) if options.out else set()
    names = [name for name in known if _wanted(name, options.only) and (name, options.padding) not in done]
    children = [os.fork() for _ in range(options.jobs - 1)] if options.jobs > 1 else []
    number = children.index(0) if 0 in children else options.jobs - 1
    for name in _jobs(names, number, options.jobs):
        row = run_one(name, known[name], options.quick, options.padding, options.seconds)
        _show(row)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    for child in children if 0 not in children else ():
        os.waitpid(child, 0)


def _wanted(name: str, only: list[str] | None) -> bool:
    return not only or any(name == item or (item.endswith("*") and name.startswith(item[:-1])) for item in only)


if __name__ == "__main__":
    main()
