"""What can go wrong in an export, beyond the errors of :mod:`fastres.errors`."""

from __future__ import annotations

from fastres.errors import FastresError, MissingDependencyError


class ExportError(FastresError):
    """A model that cannot be exported as asked."""


class ExportFileError(ExportError, OSError):
    """A file or folder that cannot be written or read."""


class VerificationError(ExportError):
    """The exported file does not compute what the model computes. Nothing was put in place."""


class CalibrationError(ExportError, ValueError):
    """Calibration images that cannot be used, or a quantised model that disagrees with the original."""


def missing(package: str, extra: str = "onnx") -> MissingDependencyError:
    """The error for an optional ``package`` that is not installed; ``extra`` is the fastres extra that has it."""
    return MissingDependencyError(f"{package} is needed here and is not installed: pip install 'fastres[{extra}]'")
