"""The command line: `torch-fuse` and `python -m torch_fuse`."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Runs the command line; exits with 2 and says what to install when its packages are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"The command line of torch_fuse needs {' and '.join(missing)}: "
            'pip install "torch_fuse[examples]"\n'
            'The backend itself works without: torch.compile(model, backend="fuse")\n'
        )
        raise SystemExit(2)
    from torch_fuse.cli.app import app

    app(prog_name="torch-fuse")


if __name__ == "__main__":
    main()
