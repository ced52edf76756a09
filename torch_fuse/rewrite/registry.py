"""The registered patterns: ours, found in `torch_fuse.patterns`, and third parties', found by entry point."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import logging
import pkgutil
import threading
from typing import TypeVar

from torch_fuse.rewrite.pattern import STAGES, Pattern

ENTRY_POINT_GROUP = "torch_fuse.patterns"

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_patterns: dict[str, Pattern] = {}
_discovered = False

P = TypeVar("P", bound=type[Pattern])


def register(pattern: P) -> P:
    """Class decorator that adds a pattern; one of the same name is replaced.

    Raises:
        ValueError: for a class that is no `Pattern`, has no name or an unknown stage.
    """
    if not (inspect.isclass(pattern) and issubclass(pattern, Pattern)):
        raise ValueError(f"pattern is {pattern!r}; allowed: a subclass of torch_fuse.Pattern")
    if not pattern.name.isidentifier():
        raise ValueError(f"{pattern.__name__}.name is {pattern.name!r}; allowed: an identifier")
    if pattern.stage not in STAGES:
        raise ValueError(f"{pattern.__name__}.stage is {pattern.stage!r}; allowed: {', '.join(STAGES)}")
    with _lock:
        _patterns[pattern.name] = pattern()
    return pattern


def patterns() -> dict[str, Pattern]:
    """All patterns by name, in the order in which they are tried: by stage, lossy ones first, then alphabetically."""
    _discover()
    with _lock:
        order = sorted(_patterns.values(), key=lambda x: (STAGES.index(x.stage), not x.lossy, x.name))
        return {pattern.name: pattern for pattern in order}


def _discover() -> None:
    global _discovered
    with _lock:
        if _discovered:
            return
        _discovered = True
        package = importlib.import_module("torch_fuse.patterns")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"torch_fuse.patterns.{module.name}")
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                register(point.load())
            except Exception as error:
                _log.warning("pattern entry point %s did not load: %s", point.name, error)


def fingerprint() -> str:
    """A hash of the sources that decide what is emitted: the engine's, the ops' and every pattern's."""
    _discover()
    digest = hashlib.sha256()
    for module in _source_modules():
        source = inspect.getsourcefile(module)
        if source is not None:
            with open(source, "rb") as file:
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _source_modules() -> list:
    found = {}
    for package_name in ("torch_fuse.graph", "torch_fuse.rewrite", "torch_fuse.kernels"):
        package = importlib.import_module(package_name)
        for info in pkgutil.iter_modules(package.__path__):
            name = f"{package_name}.{info.name}"
            found[name] = importlib.import_module(name)
    for pattern in patterns().values():
        module = inspect.getmodule(type(pattern))
        if module is not None and getattr(module, "__file__", None):
            found[module.__name__] = module
    return [found[name] for name in sorted(found)]
