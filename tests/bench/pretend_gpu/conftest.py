"""The pretend GPU as a fixture."""

from tests.on_pretend_gpu.conftest import pretence

__all__ = ["pretence"]
