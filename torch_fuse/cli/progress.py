"""Says what is being done, so that a long compile does not look hung."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; wide enough for the tables where the output is a file or a pipe."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


class Steps:
    """Shows each step while it runs (a spinner on a terminal, a line elsewhere) and how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Times the block and names it `text` in what is shown."""
        start = time.perf_counter()
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                progress.add_task(text)
                yield
        else:
            self.console.print(f"  ... {text}", highlight=False)
            yield
        seconds = self.seconds[text] = time.perf_counter() - start
        self.console.print(f"  {seconds:7.1f} s  {text}", highlight=False)
