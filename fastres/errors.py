"""The errors and warnings that fastres raises on purpose.

Each error message says what was given, what is accepted and what to do. If Python has a built-in error for the same
situation, the class derives from it as well, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FastresError(Exception):
    """Base class of every error raised by fastres."""


class UnknownModelError(FastresError, ValueError):
    """There is no model with the given name."""


class WeightsError(FastresError):
    """The weights cannot be found, read or used."""


class UnknownWeightsError(WeightsError, ValueError):
    """The model has no published weights with the given name."""


class DownloadError(WeightsError, OSError):
    """The checkpoint is not in the cache and could not be downloaded."""


class CorruptCheckpointError(WeightsError, OSError):
    """The checkpoint file is truncated, altered or not a checkpoint."""


class UnsafeCheckpointError(WeightsError):
    """The checkpoint's pickle holds something other than tensors and plain data."""


class StateDictMismatchError(WeightsError, ValueError):
    """The keys or shapes of the state dict do not match the architecture."""


class ConfigError(WeightsError, ValueError):
    """The configuration file is incomplete, contradictory, or does not describe the tensors beside it."""


class ArchitectureError(FastresError, ValueError):
    """fastres cannot run the given module or architecture."""


class ClassifierError(FastresError, RuntimeError):
    """Classes were requested from a network that has no classifier."""


class InputError(FastresError, ValueError):
    """The input has the wrong rank, shape or size, or an argument has an invalid value."""


class LabelError(InputError):
    """The labels of the images do not fit the images, or the classes of the model."""


class DtypeError(FastresError, TypeError):
    """The model or the device does not support the dtype."""


class DeviceError(FastresError, RuntimeError):
    """The device is missing, or a tensor is on a different device from the model."""


class OneDnnError(FastresError, RuntimeError):
    """A function of oneDNN's refused what fastres asked of it."""


class GraphMemoryWarning(UserWarning):
    """There is not enough GPU memory for a CUDA graph; calls run without one."""


class GradientError(FastresError, RuntimeError):
    """Training or gradients were requested from an inference-only model."""


class ImageError(FastresError, ValueError):
    """The image cannot be read or interpreted."""


class SourceError(FastresError, ValueError):
    """The images to classify do not exist, or are in a form that ``classify`` does not read."""


class OutputError(FastresError, OSError):
    """The output already exists, is in use or cannot be written."""


class StorageError(FastresError, OSError):
    """An object store cannot be used: the network, the credentials, the permissions or the store itself failed."""


class Int8Warning(UserWarning):
    """A model in 8 bit is less exact on this processor than on others, or not faster than in float32."""


class ThreadsWarning(UserWarning):
    """torch uses more threads than the container has cores."""


class ResumeError(FastresError, RuntimeError):
    """The interrupted run cannot be resumed: its images or settings have changed, or its files are damaged."""


class ResumeWarning(UserWarning):
    """Finished rows of an interrupted run were damaged or missing, and are computed again."""


class WorkerError(FastresError, RuntimeError):
    """A worker process that reads images died."""


class ShardError(FastresError, RuntimeError):
    """Some rows of a run in shards could not be computed, although it was tried several times."""


class RayError(FastresError, RuntimeError):
    """The Ray cluster cannot be reached, or has not what was asked of it."""


class ServerError(FastresError, RuntimeError):
    """The server cannot start, or cannot go on."""


class CalibrationError(FastresError, ValueError):
    """The calibration images or the network cannot be used for quantisation, or 8 bit disagrees with float32."""


class CalibrationWarning(UserWarning):
    """Some calibration images could not be read, and are not used."""


class DatasetError(FastresError, ValueError):
    """The data set on disk is missing, damaged or not the expected one."""


class KernelError(FastresError, RuntimeError):
    """A kernel was given tensors that it does not accept."""


class MissingDependencyError(FastresError, ImportError):
    """An optional package is needed but not installed."""


def _family(name: str) -> str:
    return re.split(r"\d", name, maxsplit=1)[0].rstrip("_-")


def near_matches(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string if no known name is close.

    Names that begin with ``name`` come first, then those of its family (the same letters before the first digit).
    """
    given = name.lower()

    def distance(name: str) -> tuple[bool, bool, float, int, int]:
        other = name.lower()
        ratio = difflib.SequenceMatcher(None, other, given).ratio()
        numbers, wanted = ([int(digits[:9]) for digits in re.findall(r"\d+", text)] for text in (other, given))
        same, apart = len(set(numbers) & set(wanted)), sum(abs(a - b) for a, b in zip(numbers, wanted, strict=False))
        return not other.startswith(given), _family(other) != _family(given), -ratio, -same, apart

    ranked = sorted((distance(other), other) for other in known) if given else []
    matches = [other for (later, _, ratio, *_), other in ranked if not later or ratio <= -0.5][:count]
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
