"""``weights=`` → a state dict with torchvision's names, float32, on the CPU: find the source, read, translate, fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastres.errors import ConfigError
from fastres.network.architectures import Architecture

from .fitting import fit_state, random_state
from .folders import CONFIG, SavedModel
from .layouts import to_torchvision, unwrap
from .published import WeightsEntry
from .sources import find_source


@dataclass(frozen=True)
class LoadedWeights:
    """A state dict ready for use: torchvision's names and order, with ``num_batches_tracked``, and memory of its own.

    Floating-point tensors are float32 on the CPU. ``arch`` has the head's number of classes. ``entry`` is the published
    entry, ``saved`` what another library's folder says of them, where they are one or the other. ``source`` says in
    words where the weights are from, and ``missing_head`` that the head is random because the checkpoint's has another
    number of classes or none.
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

    ``weights`` is ``"DEFAULT"``, an entry's name, a torchvision enum member, the path of a ``.pth``, ``.pt`` or
    ``.safetensors`` file, a folder that transformers or timm saved or its hub id, if cached (:mod:`fastres.weights.folders`), a
    state dict (wrapped and prefixed ones too, see ``fastres.weights.layouts``), or ``None`` for random weights as torchvision
    initialises them. A string with a checkpoint's suffix or a separator is a path; any other is
    an entry's name and, only where the model has no such entry, a file's. ``num_classes`` other than the checkpoint's
    gives a random head, with a ``FreshHeadWarning``. ``progress`` shows a bar on stderr during a download. Whatever
    floating-point type the checkpoint has becomes float32.

    Raises ``UnknownWeightsError``, ``DownloadError``, ``CorruptCheckpointError``, ``UnsafeCheckpointError``,
    ``ConfigError`` or ``StateDictMismatchError``, all of them ``WeightsError``, and ``ArchitectureError`` for an
    impossible ``num_classes`` and for networks that share a ResNet's tensors and not its function.
    """
    if weights is None:
        arch = arch if num_classes is None else arch.with_classes(num_classes)
        return LoadedWeights(random_state(arch), arch, None, "random initialisation", False)
    source = find_source(arch, weights, progress)
    state = to_torchvision(unwrap(source.read()), arch)
    fitted = fit_state(state, arch, num_classes, source.text, copy=source.shared)
    if source.saved is not None:
        _check_classes(source.saved, arch, state)
    return LoadedWeights(fitted.state, fitted.arch, source.entry, source.text, fitted.missing_head, source.saved)


def _check_classes(saved: SavedModel, arch: Architecture, state: dict[str, Tensor]) -> None:
    """Raise ``ConfigError`` where a folder's configuration and its classifier differ in the number of classes."""
    held = state["fc.weight"].shape[0] if "fc.weight" in state else saved.arch.num_classes
    if held != saved.arch.num_classes:
        raise ConfigError(
            f"{saved.source} contradicts itself: {CONFIG} has {saved.arch.num_classes} classes and "
            f"{saved.weights.name} a classifier of {held}. Correct {CONFIG}, or load the weights alone: "
            f"fastres.load({arch.name!r}, weights={str(saved.weights)!r})."
        )
