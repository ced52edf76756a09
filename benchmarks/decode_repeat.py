"""One decoding step again and again from the same cache: `decode.py --repeat 10000` runs it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Log, captured
from decode_models import start, ways
from torch import Tensor


def repeat(log: Log, name: str, dry: bool, steps: int) -> None:
    """Takes a step `steps` times in a CUDA graph, and a tenth as often from Python, plain and with early launches.

    Raises:
        AssertionError: when logits or cache are not the same bits each time, or the device's memory has grown.
    """
    model, cache, token, prompt, _, rewind = start(name, dry)
    for way, make in ways(model, dry).items():
        if way in ("eager", "inductor"):
            continue
        try:
            function = make()
            step = lambda f=function: f(token, past_key_values=cache).logits  # noqa: E731
            for _ in range(2):
                rewind()
                step()
            calls = {way: (step, max(steps // 10, 2))}
            if not dry:
                calls = {f"{way}_graph": (_kept(step), steps), **calls}
        except Exception as problem:
            log.write(what="repeat", name=name, way=way, problem=repr(problem)[:600])
            continue
        for kind, (call, count) in calls.items():
            found = _repeated(call, count, cache, rewind)
            log.write(what="repeat", name=name, way=kind, prompt=prompt, steps=count, **found)
            assert found["other_logits"] == 0 and found["same_cache"] and found["device_bytes_grown"] == 0, found


def _kept(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step in a CUDA graph, with the logits that it writes."""
    static: dict[str, Tensor] = {}
    replay = captured(lambda: static.update(logits=step()))

    def call() -> Tensor:
        static["logits"].fill_(float("nan"))  # a replay that wrote nothing would leave the last one's
        replay()
        return static["logits"]

    return call


def _repeated(call: Callable[[], Tensor], count: int, cache: Any, rewind: Callable[[], None]) -> dict[str, Any]:
    """Of `count` steps: how many gave other bits than the first, what the memory grew by behind the first tenth."""
    rewind()
    first = call().clone()
    before = [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]
    other = torch.zeros((), dtype=torch.int64, device=first.device)
    seen, begin = [], time.perf_counter()
    for i in range(count):
        rewind()
        other += (call().view(torch.uint8) != first.view(torch.uint8)).any()
        if i in (count // 10, count - 1):
            seen.append((_device_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    wrong = int(other)  # waits for the device
    after = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return {
        "other_logits": wrong,
        "same_cache": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "device_bytes_grown": seen[-1][0] - seen[0][0],
        "host_kib_grown": seen[-1][1] - seen[0][1],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _device_bytes() -> int:
    """What the process holds of the device's memory, used or not."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
