"""benchmarks/traffic.py: what it makes of Nsight Compute's counters, and its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import traffic

    return traffic


def table(kernels: list[tuple[str, int, int]], unit: str = "byte") -> list[str]:
    rows = []
    for number, (name, read, written) in enumerate(kernels):
        for metric, value in ((READ, read), (WRITE, written), ("gpu__time_duration.sum", 7)):
            rows.append(f'"{number}","99","{name}","{metric}","{unit}","{value:,}"')
    return ["==PROF== Connected to process 99", HEADER, *rows]


FLUSH = ("_traffic_flush", 268_435_456, 0)
KERNELS = [
    FLUSH, ("gemm", 50_000_000, 1_000_000), ("mul, add", 2_000_000, 3_000_000), (FLUSH[0], FLUSH[1], 9_000_000),
    FLUSH, ("gemm", 40_000_000, 2_500_000), FLUSH,
]  # fmt: skip


def test_each_way_has_its_kernels_and_what_was_written_back_behind_them(script: Any) -> None:
    found = script.traffic(script.read_counters(table(KERNELS)))
    assert (found["inductor"]["read_mb"], found["inductor"]["write_mb"]) == (52.0, 13.0)
    assert (found["fuse"]["read_mb"], found["fuse"]["write_mb"]) == (40.0, 2.5)
    assert [kernel[0] for kernel in found["inductor"]["kernels"]] == ["gemm", "mul, add"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["==ERROR== ERR_NVGPUCTRPERM"], "no table"), (table(KERNELS, "Mbyte"), "allowed: byte"),
     (table(KERNELS[:-1]), "3 flushes among 6 kernels; allowed: 4")],
)  # fmt: skip
def test_a_log_that_is_not_what_was_asked_for_is_refused(script: Any, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.traffic(script.read_counters(lines))


def test_the_formula_counts_passes_and_weights(script: Any) -> None:
    plain, fused = (script.formula(2, 1000, 100, fused) for fused in (False, True))
    assert (plain["passes"], fused["passes"]) == (13, 11)
    assert plain["read_mb"] + plain["write_mb"] == pytest.approx(13 * 0.4 + 0.08)
    for moved in ("read_mb", "write_mb"):
        assert plain[moved] - fused[moved] == pytest.approx(0.4)
