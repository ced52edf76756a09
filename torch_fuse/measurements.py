"""Measurements that are remembered between processes: one JSON file each, in Inductor's cache directory.

A file is named by a hash of its key and holds {"key": key, "value": value}. It is written next to its place and
moved over it, so processes that measure the same thing at the same time write one after the other, and none reads half
a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch_fuse._compat import cache_directory

_log = logging.getLogger(__name__)
_allowed: ContextVar[bool] = ContextVar("torch_fuse_may_measure", default=True)
_TOP = "torch_fuse"
T = TypeVar("T")
_UNKNOWN = (OSError, KeyError, ModuleNotFoundError)  # no such user, no such directory, not ours to write to


def directory(kind: str) -> Path:
    """Where measurements of a kind are; it need not exist."""
    return cache_directory() / _TOP / kind


def may_measure() -> bool:
    """Whether something may run on a device to be measured."""
    return _allowed.get()


@contextlib.contextmanager
def only_remembered() -> Iterator[None]:
    """Nothing is measured in here: what is not remembered is unknown."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def recall(kind: str, key: Mapping[str, Any], read: Callable[[Any], T]) -> T | None:
    """What was stored for a key, or None; a file that cannot be read is reported and counts as missing.

    Args:
        kind: of measurement.
        key: what it depends on, as plain data.
        read: makes something of the value that was stored; raises ValueError, KeyError or TypeError for a wrong one.
    """
    try:
        file = directory(kind) / _file_name(key)
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        _distrust(file, error)
        return None
    except _UNKNOWN as error:
        _log.warning("measurements of %s cannot be read: %s", kind, error)
        return None
    try:
        entry = json.loads(text)
        if entry["key"] != _plain(key):
            raise ValueError("it holds another key")
        return read(entry["value"])
    except (ValueError, KeyError, TypeError) as error:
        _distrust(file, error)
        return None


def store(kind: str, key: Mapping[str, Any], value: Any) -> None:
    """Keeps a value for a key; where that is not possible, logs why."""
    try:
        folder = directory(kind)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")  # readable by the user only
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": _plain(key), "value": value}, file, indent=1)
            os.replace(name, folder / _file_name(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except _UNKNOWN as error:
        _log.warning("measurements of %s are not kept: %s", kind, error)


def stored(kind: str) -> list[dict[str, Any]]:
    """All readable entries of a kind, {"key", "value"} each."""
    found = []
    for file in _files(kind, "*.json"):
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(entry, dict) and entry.keys() == {"key", "value"} and isinstance(entry["key"], dict):
                found.append(entry)
    return found


def clear(kind: str) -> int:
    """Deletes all entries of a kind, unreadable ones too, and returns how many there were."""
    count = 0
    for pattern in ("*.json", "*.part"):
        for file in _files(kind, pattern):
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
                count += pattern == "*.json"
    return count


def _files(kind: str, pattern: str) -> list[Path]:
    try:
        return sorted(directory(kind).glob(pattern))
    except _UNKNOWN:
        return []


def _plain(key: Mapping[str, Any]) -> Any:
    """A key as it comes out of JSON."""
    return json.loads(json.dumps(key, sort_keys=True))


def _file_name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()[:32] + ".json"


def _distrust(file: Path, error: Exception) -> None:
    warnings.warn(f"torch_fuse ignores {file}, which is not a measurement it wrote: {error}", stacklevel=2)
