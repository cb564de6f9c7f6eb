"""Errors of an export, in addition to those of :mod:`fastres.errors`."""

from __future__ import annotations

from fastres.errors import CalibrationError as CalibrationError
from fastres.errors import FastresError, MissingDependencyError
from fastres.extras import install


class ExportError(FastresError):
    """The model cannot be exported as requested."""


class ExportFileError(ExportError, OSError):
    """A file or folder cannot be written or read."""


class VerificationError(ExportError):
    """The exported file and the model give different results. Nothing was written."""


def missing(package: str, extra: str = "onnx") -> MissingDependencyError:
    """Return the error for a ``package`` that is not installed; ``extra`` is the fastres extra that contains it."""
    return MissingDependencyError(f"{package} is needed here but is not installed: {install(extra)}")
