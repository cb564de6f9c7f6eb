"""Photographs as a fixture."""

from tests.classification.conftest import photos

__all__ = ["photos"]
