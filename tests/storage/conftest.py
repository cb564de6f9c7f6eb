"""Fixtures: an S3 server on loopback, a proxy that breaks requests, and an empty store in memory."""

from __future__ import annotations

from tests.object_store import bucket, faults, gs, memory, proxy, s3_server

__all__ = ["bucket", "faults", "gs", "memory", "proxy", "s3_server"]
