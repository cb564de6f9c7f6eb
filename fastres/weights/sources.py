"""Interpret ``weights=``: a published entry, a file, a saved folder or a state dict. The tensors are read later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from fastres.errors import StateDictMismatchError, UnknownWeightsError
from fastres.network.architectures import Architecture

from . import published
from .checkpoints import SUFFIXES, is_path_like, read_checkpoint
from .folders import CONFIG, SavedModel, architecture_beside, find_saved
from .published import DEFAULT, WeightsEntry
from .timm_config import refuse_anti_aliasing


@dataclass(frozen=True)
class Source:
    """A source of weights, described by ``text``: a published ``entry``, a file at ``path``, or an object ``given``.

    ``saved`` is the configuration of the folder that the file is in, if timm or transformers saved it.
    """

    text: str
    entry: WeightsEntry | None = None
    path: Path | None = None
    saved: SavedModel | None = None
    given: object = field(default=None, repr=False)

    @property
    def shared(self) -> bool:
        """True if the tensors read must be copied: they are the caller's, or mapped from a file that may change."""
        mapped = self.path is not None and (self.saved is not None or self.path.suffix.lower() == ".safetensors")
        return mapped or (self.entry is None and self.path is None)

    def read(self, progress: bool) -> object:
        """Return the source's content: a state dict, or a dictionary around one. May download it, with a bar."""
        if self.entry is not None:
            return published.read_entry(self.entry, progress)
        return self.given if self.path is None else read_checkpoint(self.path)


def find_source(arch: Architecture, weights: Any) -> Source:
    """Return the source that ``weights`` means for ``arch``; see :func:`fastres.weights.load_state`.

    Reads configurations, but no tensors. Raises ``UnknownWeightsError`` for an unknown name,
    ``StateDictMismatchError`` if a folder holds another network, and the errors of
    :func:`~fastres.weights.folders.read_saved`.
    """
    saved = find_saved(weights)
    if saved is not None:
        _check_same(arch, saved.arch, saved.source, saved.source)
        return Source(saved.source, path=saved.weights, saved=saved)
    entry = _entry_of(arch.name, weights)
    if entry is not None:
        return Source(f"{entry.model} {entry.name} ({entry.file})", entry=entry)
    if not isinstance(weights, (str, PathLike)):
        return Source("a state dict", given=weights)
    path = Path(weights).expanduser()
    refuse_anti_aliasing(path.stem, str(path))
    beside = architecture_beside(path)
    if beside is not None:
        _check_same(arch, beside, str(path), path.parent)
    return Source(str(path), path=path)


def _check_same(arch: Architecture, held: Architecture, source: str, folder: str | Path) -> None:
    """Raise if a folder's configuration names another network than ``arch``, apart from the number of classes."""
    if replace(held, num_classes=arch.num_classes) != arch:
        raise StateDictMismatchError(
            f"{source} holds {held.name} according to its {CONFIG}, not {arch.name}. Call "
            f"fastres.load({str(folder)!r}) to load {held.name}."
        )


def _entry_of(model: str, weights: object) -> WeightsEntry | None:
    """Return the published entry for a string or an enum member; ``None`` for a path or a state dict."""
    if isinstance(weights, str):
        if is_path_like(weights):
            return None
        known = weights == DEFAULT or weights in published.entries(model)
        return None if not known and Path(weights).is_file() else published.get_entry(model, weights)
    if isinstance(weights, (Mapping, PathLike, nn.Module)):
        return None
    if all(hasattr(weights, attribute) for attribute in ("url", "meta", "name")):
        return published.entry_of_enum(model, weights)
    raise UnknownWeightsError(
        f"weights has type {type(weights).__name__} ({weights!r:.80}); pass 'DEFAULT', the name of an entry, a "
        f"torchvision enum member, a path ({', '.join(SUFFIXES)}), a state dict, or None for random weights."
    )
