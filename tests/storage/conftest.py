"""Fixtures: an S3 server on loopback, and an empty store in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastres.storage import failures, filesystems
from tests.object_store import bucket, faults, proxy, s3_server

__all__ = ["bucket", "faults", "proxy", "s3_server"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a place in memory."""
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    fs = filesystems.filesystem("memory://place")
    fs.store.clear()
    yield "memory://place"
    fs.store.clear()
