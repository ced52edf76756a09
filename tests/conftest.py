"""Shared by all tests: one thread each (the machine runs several at once), the same Hypothesis draws every time."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
# HYPOTHESIS_PROFILE=hunt pytest tests/test_properties.py: new draws every time, many more, and shrunk when they fail.
settings.register_profile("hunt", settings.get_profile("default"), derandomize=False, phases=list(Phase))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-fusion-counts", action="store_true",
        help="write tests/fusion_counts.json from what is fused now (without -n), instead of comparing",
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
