"""Every error that fastres raises on purpose.

Each message says what was given, what is accepted and what to do about it. Where Python has a built-in
error for the same situation, the class derives from that too, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastresError(Exception):
    """Base class of every error raised by fastres."""


class UnknownModelError(FastresError, ValueError):
    """A model name that is not in the table."""


class WeightsError(FastresError):
    """Weights that cannot be found, read or used."""


class UnknownWeightsError(WeightsError, ValueError):
    """A weights entry that the model does not have."""


class DownloadError(WeightsError, OSError):
    """A checkpoint that is not in the cache and could not be downloaded."""


class CorruptCheckpointError(WeightsError, OSError):
    """A checkpoint file that is truncated, altered or not a checkpoint."""


class UnsafeCheckpointError(WeightsError):
    """A pickle that holds something other than tensors and plain data."""


class StateDictMismatchError(WeightsError, ValueError):
    """A state dict whose keys or shapes are not those of the architecture."""


class ConfigError(WeightsError, ValueError):
    """A configuration file that is incomplete, contradictory, or not about the tensors beside it."""


class ArchitectureError(FastresError, ValueError):
    """A module or an architecture description that fastres does not run."""


class ClassifierError(FastresError, RuntimeError):
    """Classes were asked of a network that has no classifier."""


class InputError(FastresError, ValueError):
    """An input tensor of the wrong rank, shape or size."""


class DtypeError(FastresError, TypeError):
    """A dtype that the model or the device does not support."""


class DeviceError(FastresError, RuntimeError):
    """A device that is missing, or a tensor on another device than the model."""


class GraphMemoryWarning(UserWarning):
    """There is no GPU memory for a CUDA graph; calls run without it."""


class GradientError(FastresError, RuntimeError):
    """Training or gradients were asked of an inference-only model."""


class ImageError(FastresError, ValueError):
    """An image that cannot be read or interpreted."""


class SourceError(FastresError, ValueError):
    """Images to classify that are not there, or in something that is not read."""


class OutputError(FastresError, OSError):
    """An output that exists already, is in use or cannot be written."""


class ResumeError(FastresError, RuntimeError):
    """An interrupted run that cannot go on: its images or its settings are no longer the same."""


class WorkerError(FastresError, RuntimeError):
    """A process that reads images died."""


class DatasetError(FastresError, ValueError):
    """A data set on disk that is missing, damaged or another one."""


class KernelError(FastresError, RuntimeError):
    """A kernel was given tensors that it does not take."""


class MissingDependencyError(FastresError, ImportError):
    """An optional package is needed and not installed."""


def near_matches(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string where nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
