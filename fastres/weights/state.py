"""Load ``weights=`` as a float32 state dict on the CPU with torchvision's names: find, read, translate, fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.errors import ConfigError
from fastres.network.architectures import Architecture

from .fitting import fit_state, random_state
from .folders import CONFIG, SavedModel
from .layouts import to_torchvision
from .published import WeightsEntry
from .sources import Source, find_source
from .wrapping import Unwrapped, unwrap_traced


@dataclass(frozen=True)
class LoadedWeights:
    """A state dict ready for use, with torchvision's names and order, ``num_batches_tracked``, and its own memory.

    Floating-point tensors are float32 on the CPU. ``arch`` has the head's number of classes. ``source`` describes where
    the weights come from. ``entry`` is the published entry, if they are published; ``saved`` is the configuration of
    another library's folder, if they come from one. ``missing_head`` is True if the head is random because the
    checkpoint has no head or another number of classes.
    """

    state: dict[str, Tensor] = field(repr=False)
    arch: Architecture
    entry: WeightsEntry | None
    source: str
    missing_head: bool
    saved: SavedModel | None = None


def load_state(
    arch: Architecture, weights: Any, num_classes: int | None = None, progress: bool = True
) -> LoadedWeights:
    """Load ``weights`` for ``arch``.

    ``weights`` is one of:

    - ``"DEFAULT"``, an entry's name (also as ``"ResNet50_Weights.IMAGENET1K_V1"``), or a torchvision enum member;
    - the path of a ``.pth``, ``.pt`` or ``.safetensors`` file; under the name of a published file of this model it must
      be that file, and is treated as its entry;
    - a folder that transformers or timm saved, or a hub id (:mod:`fastres.weights.hub`);
    - a state dict, possibly wrapped and with prefixes (:mod:`fastres.weights.wrapping`);
    - ``None`` for random weights, initialised as in torchvision.

    A string with a checkpoint's suffix or a path separator is a path. Any other string is an entry's name or, only if
    the model has no such entry, a file's. If ``num_classes`` differs from the checkpoint's, the head is random, with a
    ``FreshHeadWarning``. ``progress`` shows a bar on stderr during a download. All floating-point types are converted
    to float32.

    Raises ``UnknownWeightsError``, ``DownloadError``, ``CorruptCheckpointError``, ``UnsafeCheckpointError``,
    ``ConfigError`` or ``StateDictMismatchError``, which are all ``WeightsError``. Raises ``ArchitectureError`` for an
    invalid ``num_classes`` and for networks that have a ResNet's tensors but compute a different function.
    """
    if weights is None:
        arch = arch if num_classes is None else arch.with_classes(num_classes)
        return LoadedWeights(random_state(arch), arch, None, "random initialisation", False)
    source = find_source(arch, weights, progress)
    content, shared = source.read(progress)
    return fit_source(source, arch, unwrap_traced(content), num_classes, copy=shared)


def fit_source(
    source: Source, arch: Architecture, unwrapped: Unwrapped, num_classes: int | None, copy: bool
) -> LoadedWeights:
    """Translate and fit what was read from ``source``; the second half of :func:`load_state`, with its errors."""
    text = source.text if unwrapped.part is None else f"{source.text}, its part {unwrapped.part!r}"
    state = to_torchvision(unwrapped.state, arch)
    fitted = fit_state(state, arch, num_classes, text, copy)
    if source.saved is not None and source.path is not None:
        _check_classes(source.saved, source.path, arch, state)
    return LoadedWeights(fitted.state, fitted.arch, source.entry, text, fitted.missing_head, source.saved)


def _check_classes(saved: SavedModel, path: Path, arch: Architecture, state: dict[str, Tensor]) -> None:
    """Raise ``ConfigError`` if a folder's configuration and its classifier differ in the number of classes."""
    held = state["fc.weight"].shape[0] if "fc.weight" in state else saved.arch.num_classes
    if held != saved.arch.num_classes:
        raise ConfigError(
            f"{saved.source} contradicts itself: {CONFIG} has {saved.arch.num_classes} classes, but the classifier in "
            f"{path.name} has {held}. Correct {CONFIG}, or load only the weights: "
            f"fastres.load({arch.name!r}, weights={str(path)!r})."
        )
