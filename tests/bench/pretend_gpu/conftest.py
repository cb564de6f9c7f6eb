"""The pretend GPU as a fixture."""

from tests.pretend.conftest import pretence

__all__ = ["pretence"]
