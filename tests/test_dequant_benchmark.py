"""benchmarks/bench_dequant_linear.py: the table of dispatch that it makes of measured rows."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_a_way_is_taken_up_to_the_last_row_before_it_loses_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_dequant_linear as script

    def row(bits: int, name: str, m: int, **us: float) -> dict[str, object]:
        return {"what": "dequant_linear", "bits": bits, "format": name, "N": 64, "K": 64, "M": m, "us": us}

    lines = [
        row(8, "int8", 8, rows=9),
        row(8, "int8", 16, rows=11, tiled=13, decode=39),
        row(8, "int8", 32, rows=25, tiled=14, decode=39),
        row(8, "int8", 512, tiled=60, decode=50),
        row(8, "q8_0", 32, rows=30, decode=38),
        row(8, "q8_0", 64, rows=60, decode=38),
        row(4, "gptq", 16, rows=40, decode=30),
        {"what": "failed"},
    ]
    found = script.crossovers(lines)
    assert found[8] == (16, 32, 32) and found[4] == (None, 0, None)
