"""The command line: `demo`, `explain` and `doctor`. Needs typer and rich (the extra `examples`)."""
