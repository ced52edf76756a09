"""The commands and their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_fuse._version import __version__
from torch_fuse.cli import pythia
from torch_fuse.cli.arguments import DTYPES, KERNELS, at_least, check_mode, check_output_file, one_of
from torch_fuse.cli.progress import make_console

app = typer.Typer(
    name="torch-fuse",
    help='Fused kernels for unmodified PyTorch models: torch.compile(model, backend="fuse").',
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

_DTYPES = ("auto", *DTYPES)
_SIZES = ("auto", *pythia.SIZES)

Batch = Annotated[int, typer.Option(parser=at_least(1), metavar="INTEGER", help="Sequences at once.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Kernels = Annotated[
    str,
    typer.Option(
        callback=one_of(KERNELS),
        help="auto: fused ops where they win; reference: every rewrite, with plain PyTorch ops.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        make_console().print(f"torch_fuse {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused kernels for unmodified PyTorch models: torch.compile(model, backend="fuse")."""


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A local checkpoint of a causal language model."),
    ] = None,
    size: Annotated[str, typer.Option(callback=one_of(_SIZES), help=f"Pythia size: {', '.join(_SIZES)}.")] = "auto",
    tokens: Annotated[
        int | None,
        typer.Option(parser=at_least(1), metavar="INTEGER", help="Tokens of a sequence; 1024 on a CPU, 2048 on a GPU."),
    ] = None,
    batch: Batch = 1,
    dtype: Annotated[str, typer.Option(callback=one_of(_DTYPES), help=f"{', '.join(_DTYPES)}.")] = "auto",
    device: Device = "auto",
    mode: Annotated[
        str | None, typer.Option(callback=check_mode, help="Inductor's mode, for Inductor and fuse.")
    ] = None,
    kernels: Kernels = "auto",
    seed: Annotated[
        int, typer.Option(parser=at_least(0), metavar="INTEGER", help="Of the weights and the tokens.")
    ] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", callback=check_output_file, help="Write all figures here."),
    ] = None,
) -> None:
    """Run an unmodified Pythia eagerly, under Inductor and under fuse; check, time, show what was fused."""
    from torch_fuse.cli.demo import DemoArguments, run_demo

    arguments = DemoArguments(model, size, tokens, batch, dtype, device, mode, kernels, seed, json_file)
    raise typer.Exit(run_demo(arguments, make_console()))


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers or diffusers class, such as LlamaForCausalLM or WanTransformer3DModel "
            "(built small, random weights), or the directory of a local checkpoint.",
        ),
    ],
    batch: Batch = 1,
    tokens: Annotated[
        int,
        typer.Option(parser=at_least(1), metavar="INTEGER", help="Tokens of a sequence, or latent tokens."),
    ] = 128,
    layers: Annotated[
        int, typer.Option(parser=at_least(1), metavar="INTEGER", help="Layers of a model built small.")
    ] = 2,
    device: Device = "auto",
    kernels: Kernels = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Trace a model, run nothing, and say what would be fused, what not, and why."""
    from torch_fuse.cli.explain import ExplainArguments, run_explain

    arguments = ExplainArguments(model, batch, tokens, layers, device, kernels, json_output)
    raise typer.Exit(run_explain(arguments, make_console()))


@app.command()
def measurements(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them; they are measured again when needed.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show or delete what options={"attention": "measure"} has measured on this machine."""
    from torch_fuse.cli.measured import run_measurements

    raise typer.Exit(run_measurements(clear, json_output, make_console()))


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, patterns, which ops work on this machine and why not, and the cache."""
    from torch_fuse.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(json_output, make_console()))
