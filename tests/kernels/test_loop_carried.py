"""Triton takes a variable for one that no step of a loop changes if it is a copy of another before the loop and in it.

It visits the body once to find what a loop carries, and compares the values of the names before and after. In
`last = stage; for ...: use(last); last = stage; stage += 1` that visit finds in `last` the value of `stage` that it had
before the loop, so every step of the loop gets that one: a kernel that waits on it hangs, another is wrong.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from torch_fuse import kernels

SOURCES = sorted(Path(kernels.__file__).parent.glob("*.py"))


def copies(node: ast.AST) -> set[tuple[str, str]]:
    """(name, of which other name) for each assignment of a name to a name below a node."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Assign):
            for target in each.targets:
                names, values = ([*x.elts] if isinstance(x, ast.Tuple) else [x] for x in (target, each.value))
                if len(names) == len(values):
                    pairs = zip(names, values, strict=True)
                    found |= {(a.id, b.id) for a, b in pairs if isinstance(a, ast.Name) and isinstance(b, ast.Name)}
    return found


def uncarried(source: str) -> list[str]:
    """The names that Triton would not carry through a loop of a jit function, though the loop changes them."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or "jit" not in "".join(map(ast.unparse, function.decorator_list)):
            continue
        names = sorted((x for x in ast.walk(function) if isinstance(x, ast.Name)), key=_order)
        for loop in (x for x in ast.walk(function) if isinstance(x, ast.For | ast.While)):
            before = set()
            for x in ast.walk(function):
                if isinstance(x, ast.Assign) and x.lineno < loop.lineno:
                    before |= copies(x)
            end = loop.end_lineno or loop.lineno
            for name, _ in before & set().union(*map(copies, loop.body)):
                inside = [x for x in names if x.id == name and loop.lineno < x.lineno <= end]
                behind = [x for x in names if x.id == name and x.lineno > end]
                if any(isinstance(each[0].ctx, ast.Load) for each in (inside, behind) if each):
                    found.append(f"{function.name}: {name}")
    return found


def _order(name: ast.Name) -> tuple[int, bool, int]:
    """An assignment is behind what it reads on its line."""
    return name.lineno, isinstance(name.ctx, ast.Store), name.col_offset


def test_what_triton_would_not_carry_is_found() -> None:
    head = "@gluon.jit\ndef kernel(stage, n):\n    last = stage\n    for k in range(n):\n"
    used, copied, moved = (f"        {line}\n" for line in ("use(last)", "last = stage", "stage += 1"))
    assert uncarried(head + used + copied + moved) == ["kernel: last"]
    assert uncarried(head + copied + moved + "    use(last)\n") == ["kernel: last"]
    assert uncarried(head + copied + used + moved) == []
    assert uncarried((head + used + copied + moved).replace("last = stage\n    for", "last = stage + 0\n    for")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_kernels_loops_carry_what_they_change(path: Path) -> None:
    assert uncarried(path.read_text()) == []
