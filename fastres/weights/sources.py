"""Interpret ``weights=``: a published entry, a file, a saved folder or a state dict. The tensors are read later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from fastres.errors import StateDictMismatchError, UnknownWeightsError
from fastres.network.architectures import Architecture

from . import published
from .checkpoints import SUFFIXES, is_path_like, read_checkpoint
from .folders import CONFIG, SavedModel, architecture_beside, names_a_folder, read_saved
from .published import DEFAULT, WeightsEntry
from .timm_config import refuse_anti_aliasing


@dataclass(frozen=True)
class Source:
    """A source of weights, described by ``text``.

    ``read`` returns the source's content: a state dict, or a dictionary around one. If ``shared``, the memory of its
    tensors belongs to someone else. ``entry`` is the published entry and ``saved`` the configuration of a folder, if
    the source is one of these.
    """

    text: str
    read: Callable[[], object] = field(repr=False)
    shared: bool = False
    entry: WeightsEntry | None = None
    saved: SavedModel | None = None


def find_source(arch: Architecture, weights: Any, progress: bool = True) -> Source:
    """Return the source that ``weights`` means for ``arch``; see :func:`fastres.weights.load_state`.

    Reads configurations, but no tensors. Raises ``UnknownWeightsError`` for an unknown name,
    ``StateDictMismatchError`` if a folder holds another network, and the errors of
    :func:`~fastres.weights.folders.read_saved`.
    """
    if isinstance(weights, SavedModel) or names_a_folder(weights):
        return _saved_source(arch, weights if isinstance(weights, SavedModel) else read_saved(weights))
    entry = _entry_of(arch.name, weights)
    if entry is not None:
        return Source(
            f"{entry.model} {entry.name} ({entry.file})", lambda: published.read_entry(entry, progress), entry=entry
        )
    if isinstance(weights, (str, PathLike)):
        return _file_source(arch, Path(weights).expanduser())
    return Source("a state dict", lambda: weights, shared=True)


def _saved_source(arch: Architecture, saved: SavedModel) -> Source:
    _check_same(arch, saved.arch, saved.source, saved.source)
    return Source(saved.source, lambda: read_checkpoint(saved.weights), shared=True, saved=saved)


def _file_source(arch: Architecture, path: Path) -> Source:
    refuse_anti_aliasing(path.stem, str(path))
    beside = architecture_beside(path)
    if beside is not None:
        _check_same(arch, beside, str(path), path.parent)
    # safetensors maps the file: without a copy, the weights would change when the file is overwritten.
    return Source(str(path), lambda: read_checkpoint(path), shared=path.suffix.lower() == ".safetensors")


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
