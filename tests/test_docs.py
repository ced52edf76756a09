"""What the documents name exists: commands, options, patterns, files; and CI sets up as the README says."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import torch_fuse
from torch_fuse.report import Site
from torch_fuse.rewrite.registry import patterns

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if path.name != "CHANGELOG.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (document.parent / target).exists(), target


def test_the_options_table_is_complete() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", text_of("docs/options.md"), flags=re.MULTILINE)
    assert documented == [field.name for field in fields(torch_fuse.Options)]


def test_the_report_table_names_every_field_of_a_site() -> None:
    rows = re.findall(r"^\| (`.*?) \|", text_of("docs/report.md"), flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == {field.name for field in fields(Site)}


def test_the_readme_lists_the_patterns_of_this_package() -> None:
    section = text_of("README.md").split("## What is recognised")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    ours = {name for name, pattern in patterns().items() if type(pattern).__module__.startswith("torch_fuse.")}
    assert documented == ours


def test_every_option_used_in_an_example_is_known() -> None:
    from torch_fuse.options import parse_options

    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    written = [found for text in texts for found in re.findall(r'options=(\{"[^{}]*\})', text)]
    complete = [found for found in written if "..." not in found and ": n}" not in found]
    assert complete
    for found in complete:
        parse_options(eval(found), patterns())


def test_commands_and_their_options_exist() -> None:
    typer = pytest.importorskip("typer")
    from torch_fuse.cli.app import app

    commands = typer.main.get_command(app).commands
    for document in DOCUMENTS:
        for name, rest in re.findall(r"torch-fuse ([a-z]+)([^`\n]*)", document.read_text(encoding="utf-8")):
            assert name in commands, f"{document.name}: torch-fuse {name}"
            known = {flag for parameter in commands[name].params for flag in parameter.opts}
            for flag in re.findall(r"--[a-z-]+", rest):
                assert flag in known, f"{document.name}: torch-fuse {name} {flag}"


def test_ci_sets_up_and_tests_as_the_readme_says() -> None:
    command = next(line for line in text_of("README.md").splitlines() if line.startswith('pip install -e ".[test]"'))
    assert f"({command})" in text_of(".ci/run")


def test_extras_named_in_documents_are_declared() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    declared = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for document in DOCUMENTS:
        for extra in re.findall(r'"(?:\.|torch_fuse)\[(\w+)\]"', document.read_text(encoding="utf-8")):
            assert extra in declared, f"{document.name}: {extra}"


@pytest.mark.parametrize("name", ["pythia", "quantized", "rcm", "wan"])
def test_examples_do_not_need_torch_fuse_before_they_compile(name: str) -> None:
    source = text_of(f"examples/{name}.py")
    imported = re.search(r"^(?:import|from) torch_fuse", source, flags=re.MULTILINE)
    assert imported is None, "torch_fuse is imported at the top"
    assert "backend=" in source and '"fuse"' in source
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
