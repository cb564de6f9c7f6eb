"""Fixtures of the executors' tests: the two ways in which a network runs on a CPU."""

from __future__ import annotations

import pytest

from fastres.executors import cpu


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's operators run all steps."""
    monkeypatch.setattr(cpu, "absent", lambda: "a test asks for torch's operators")


@pytest.fixture
def primitives() -> None:
    """Skip the test where oneDNN's primitives cannot be called."""
    if reason := cpu.absent():
        pytest.skip(reason)


@pytest.fixture(params=["primitives", "operators"])
def way(request: pytest.FixtureRequest) -> str:
    """Run the test once in each way."""
    request.getfixturevalue(request.param)
    return str(request.param)
