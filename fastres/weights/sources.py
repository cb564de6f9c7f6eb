"""Interpret ``weights=``: a published entry, a file, a saved folder or a state dict. The tensors are read later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from fastres.errors import (
    CorruptCheckpointError,
    StateDictMismatchError,
    UnknownWeightsError,
    WeightsError,
)
from fastres.network.architectures import Architecture
from fastres.text import path_text

from . import published
from .checkpoints import SUFFIXES, is_path_like, open_checkpoint, warn_misnamed
from .download import cache_folder, file_sha256
from .folders import CONFIG, WEIGHTS, SavedModel, architecture_beside, find_saved
from .hub import HubId, cached_files
from .published import DEFAULT, WeightsEntry
from .timm_config import refuse_anti_aliasing

_ACCEPTED = (
    f"pass 'DEFAULT', the name of an entry, a torchvision enum member, a path ({', '.join(SUFFIXES)}), a state dict, "
    "or None for random weights."
)


@dataclass(frozen=True)
class Source:
    """A source of weights, described by ``text``: a published ``entry``, a file at ``path``, or an object ``given``.

    A published file that was given by its path has both ``entry`` and ``path``. ``saved`` is the configuration of the
    folder that the file is in, if timm or transformers saved it.
    """

    text: str
    entry: WeightsEntry | None = None
    path: Path | None = None
    saved: SavedModel | None = None
    given: object = field(default=None, repr=False)

    def read(self, progress: bool) -> tuple[object, bool]:
        """Return the content, a state dict or a dictionary around one, and whether its tensors must be copied.

        They must if they are the caller's, or mapped from a file that may change. May download the file, with a bar.
        """
        if self.path is not None:
            self.verify()
            checkpoint = open_checkpoint(self.path)
            warn_misnamed(self.path, checkpoint, stacklevel=5)  # the caller of fastres.load
            return checkpoint.content, checkpoint.mapped
        if self.entry is not None:
            return published.read_entry(self.entry, progress), False
        return self.given, True

    def verify(self) -> None:
        """Raise ``CorruptCheckpointError`` if a published file that was given by its path has another hash."""
        if self.entry is None or self.path is None or not self.path.is_file():
            return
        digest = file_sha256(self.path)
        if not digest.startswith(self.entry.sha256):
            raise CorruptCheckpointError(
                f"{self.path} is not the published {self.entry.file}: its SHA-256 begins with "
                f"{digest[: len(self.entry.sha256)]}, not {self.entry.sha256}. Download it again, or rename it if it "
                "holds weights of your own."
            )


def find_source(arch: Architecture, weights: Any, progress: bool = True) -> Source:
    """Return the source that ``weights`` means for ``arch``; see :func:`fastres.weights.load_state`.

    Reads configurations, but no tensors. The weights of a hub id are downloaded; ``progress`` shows a bar. Raises
    ``UnknownWeightsError`` for an unknown name or object, ``WeightsError`` for a path that the system does not accept,
    ``StateDictMismatchError`` if a folder holds another network, and the errors of
    :func:`~fastres.weights.folders.read_saved`.
    """
    weights = _plain(weights)
    saved = find_saved(weights)
    if saved is not None:
        _check_same(arch, saved.arch, saved.source, saved.source)
        return Source(saved.source, path=saved.weights_file(progress), saved=saved)
    entry = published_entry(arch.name, weights)
    if entry is not None:
        return Source(f"{entry.model} {entry.name} ({entry.file})", entry=entry)
    return _file(arch, weights) if isinstance(weights, (str, Path)) else Source("a state dict", given=weights)


def input_files(*inputs: object) -> list[Path]:
    """Return the existing files that loading a model may read, so that no output replaces them.

    ``inputs`` are a model, its weights and class names, in any form. The files of a saved folder, and what was
    downloaded of a named model or a hub id, are among them.
    """
    found: list[Path] = []
    for given in inputs:
        if isinstance(given, (str, os.PathLike)):
            with suppress(OSError, ValueError, RuntimeError):  # not a path that the system accepts
                path = Path(os.fsdecode(given)).expanduser()
                found += [inner for inner in (path, *(path / name for name in (CONFIG, *WEIGHTS))) if inner.exists()]
        if isinstance(given, str):
            cached = (cache_folder() / entry.file for entry in published.entries_of(given))
            found += [path for path in cached if os.path.exists(path)]
            hub_id = HubId.parse(given)
            found += [] if hub_id is None else cached_files(hub_id, (CONFIG, *WEIGHTS))
    return found


def usable_path(name: str | os.PathLike[str]) -> Path:
    """Return ``name`` as a path, with ``~`` expanded; raises ``WeightsError`` if the system does not accept it."""
    if "://" in str(name):
        raise WeightsError(
            f"{name} is a URL. fastres downloads only published weights and hub ids; download the file, and pass its "
            "path."
        )
    try:
        path = Path(name).expanduser()
        path.lstat()
    except FileNotFoundError:
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, or of an unknown user
        raise WeightsError(
            f"{str(name)!r:.200} is not a path that can be used ({error!s:.200}). Pass the path of a "
            f"{', '.join(SUFFIXES)} file."
        ) from error
    return path


def _file(arch: Architecture, weights: str | Path) -> Source:
    path = usable_path(weights)
    refuse_anti_aliasing(path.stem, str(path))
    beside = architecture_beside(path)
    if beside is not None:
        _check_same(arch, beside, str(path), path.parent)
    entry = next((entry for entry in published.entries_of(arch.name) if entry.file == path.name), None)
    return Source(path_text(path), entry=entry, path=path)


def _check_same(arch: Architecture, held: Architecture, source: str, folder: str | Path) -> None:
    """Raise if a folder's configuration names another network than ``arch``, apart from the number of classes."""
    if replace(held, num_classes=arch.num_classes) != arch:
        raise StateDictMismatchError(
            f"{source} holds {held.name} according to its {CONFIG}, not {arch.name}. Call "
            f"fastres.load({str(folder)!r}) to load {held.name}."
        )


def _plain(weights: Any) -> Any:
    """Return a path of any class as a ``Path``, and a string of any class, such as an enum's, as a ``str``."""
    if isinstance(weights, str):
        return str.__str__(weights)
    if isinstance(weights, os.PathLike):
        try:
            path = os.fspath(weights)
        except Exception as error:
            raise WeightsError(
                f"weights is a {type(weights).__name__} whose path cannot be read ({error!s:.80}). Pass a str or a "
                "pathlib.Path."
            ) from error
        return Path(os.fsdecode(path))
    return weights


def published_entry(model: str, weights: object) -> WeightsEntry | None:
    """Return the published entry for a string or an enum member; ``None`` for a path or a state dict.

    Raises ``UnknownWeightsError`` for an entry of another model, an unknown name, or an object of another kind.
    """
    if isinstance(weights, str):
        qualified = published.name_in_enum(model, weights)
        if qualified is not None:
            return published.get_entry(model, qualified)
        if is_path_like(weights):
            return None
        known = weights == DEFAULT or weights in published.entries(model)
        return None if not known and os.path.isfile(weights) else published.get_entry(model, weights)
    if isinstance(weights, (Mapping, Path, nn.Module)):
        return None
    url = _attribute(weights, "url")
    if isinstance(url, str) and not isinstance(weights, type):
        return published.entry_of_enum(model, weights, url)
    raise UnknownWeightsError(f"weights {_what(weights)}; {_ACCEPTED}")


def _what(weights: object) -> str:
    """Describe an object that is no form of weights, and say what it may have been meant for."""
    if isinstance(weights, type):
        members = list(weights) if issubclass(weights, Enum) else []
        hint = f", not one of its members, such as {weights.__name__}.{members[0].name}" if members else ""
        return f"is the class {weights.__name__}{hint}"
    if isinstance(weights, Enum):
        return f"is {type(weights).__name__}.{weights.name}, an enum member without a url; pass its value, if it is one"
    try:
        shown = f"{weights!r:.80}"
    except Exception:
        shown = "its repr fails"
    return f"has type {type(weights).__name__} ({shown})"


def _attribute(obj: object, name: str) -> object:
    """Return an attribute, or ``None`` if the object has none or computing it fails."""
    try:
        return getattr(obj, name, None)
    except Exception:
        return None
