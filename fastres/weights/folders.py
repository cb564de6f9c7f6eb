"""Read what transformers or timm saved: folders, and models on Hugging Face's hub (:mod:`fastres.weights.hub`).

Both hold ``config.json``, which describes the network, and ``model.safetensors`` (or ``pytorch_model.bin``). The
weights of a hub id are downloaded only when the configuration is one of a network that fastres runs.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastres.errors import CorruptCheckpointError, WeightsError
from fastres.files import read_regular
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture
from fastres.terminal import warn

from . import timm_config, transformers_config
from .hub import CachedRevisionWarning, HubId, UnreachableError, find_snapshot

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
_DEEPEST = 50  # levels of a configuration


class Files(Protocol):
    """The files of a saved model, in a folder or on the hub."""

    @property
    def source(self) -> str:
        """The name that loads the model again."""
        ...

    def file(self, name: str, progress: bool = False) -> Path | None:
        """Return the path of the file ``name``, which may have to be downloaded, or ``None`` if there is none."""
        ...

    def described(self) -> str:
        """Return where the files are, for messages."""
        ...


@dataclass(frozen=True)
class Folder:
    """The files in the folder at ``path``."""

    source: str
    path: Path

    def file(self, name: str, progress: bool = False) -> Path | None:
        path = self.path / name
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # reading it will give the reason
            return path
        return path

    def described(self) -> str:
        found = ", ".join(sorted(path.name for path in self.path.iterdir())[:8])
        return f"{self.path}, which has {found or 'no files'}"


@dataclass(frozen=True)
class SavedModel:
    """The configuration of a saved folder or of a model on the hub.

    ``source`` names it; a hub id has the hash of the commit. ``arch`` has the head's number of classes. ``transforms``
    is ``None`` if there is no preprocessing, and ``categories`` is ``None`` if there are no class names.
    """

    files: Files
    library: Literal["transformers", "timm"]
    arch: Architecture
    transforms: Transforms | None
    categories: tuple[str, ...] | None

    @property
    def source(self) -> str:
        return self.files.source

    def weights_file(self, progress: bool = True) -> Path:
        """Return the file with the weights; that of a hub id may be downloaded. See :func:`weights_file`."""
        return weights_file(self.files, progress)


def names_a_folder(name: object) -> bool:
    """Return True if ``name`` is an existing folder or looks like a hub id, such as ``"timm/resnet50.a1_in1k"``."""
    if not isinstance(name, (str, os.PathLike)) or name == "":  # as a path, "" is the current folder
        return False
    try:
        path = Path(os.fsdecode(name)).expanduser()
        return path.is_dir() or (isinstance(name, str) and not path.exists() and HubId.parse(name) is not None)
    except (OSError, RuntimeError, ValueError, TypeError):  # a name that the system does not accept
        return False


def find_saved(weights: object) -> SavedModel | None:
    """Return the configuration of the folder or hub id that ``weights`` names; ``None`` if it names neither.

    A :class:`SavedModel` is returned as it is. Raises the errors of :func:`read_saved`.
    """
    if isinstance(weights, SavedModel):
        return weights
    return read_saved(weights) if names_a_folder(weights) else None  # type: ignore[arg-type]


def read_saved(name: str | os.PathLike[str]) -> SavedModel:
    """Read the configuration of the folder or hub id called ``name``; the weights are neither read nor downloaded.

    Raises the errors of :func:`find_files`, ``WeightsError`` without ``config.json``, ``CorruptCheckpointError`` if it
    is not a JSON object, ``ConfigError`` if it is contradictory, and ``ArchitectureError`` for a network that fastres
    does not run.
    """
    return parse_saved(find_files(name))


def parse_saved(files: Files) -> SavedModel:
    """Read the configuration among ``files``; raises the errors of :func:`read_saved`."""
    source = files.source
    path = files.file(CONFIG)
    if path is None:
        raise WeightsError(
            f"{source} has no {CONFIG} ({files.described()}). A folder that transformers or timm saved has {CONFIG} "
            f"and {WEIGHTS[0]}. To load a checkpoint file, pass its own path as weights=."
        )
    config = read_json(path, source)
    if timm_config.is_timm(config):
        return SavedModel(files, "timm", *timm_config.parse(config, source))
    arch, labels = transformers_config.parse(config, source)
    processor = _processor(files)
    found = None if processor is None else transformers_config.transforms(read_json(processor, source), source)
    return SavedModel(files, "transformers", arch, found, labels)


def _processor(files: Files) -> Path | None:
    """Return the file with transformers' preprocessing. Warns if it is unknown whether there is one."""
    try:
        return files.file(transformers_config.PROCESSOR)
    except UnreachableError as error:
        warn(
            f"If the model has its own preprocessing, it is not used, but ImageNet's usual one. {error}",
            CachedRevisionWarning,
            stacklevel=6,  # the caller of fastres.load
        )
        return None


def architecture_beside(weights: Path) -> Architecture | None:
    """Return the network named by timm's or transformers' ``config.json`` beside a weights file, if there is one.

    The file is needed because tensors do not show everything, such as the place of a stride or a filter without
    parameters.
    """
    config_file = weights.parent / CONFIG
    if weights.name not in WEIGHTS or not config_file.is_file():
        return None
    config = read_json(config_file, str(weights))
    if timm_config.is_timm(config):
        return timm_config.parse(config, str(weights))[0]
    return transformers_config.parse(config, str(weights))[0] if "model_type" in config else None


def read_json(path: Path, source: str) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``, which belongs to ``source``."""
    try:
        value = json.loads(read_regular(path).decode("utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error!s:.200}). Download or save it again.") from error
    if _depth(value) > _DEEPEST:
        raise CorruptCheckpointError(f"{path} is nested too deeply for a configuration. Download or save it again.")
    if not isinstance(value, dict):
        raise CorruptCheckpointError(
            f"{path} holds a {type(value).__name__}, not a JSON object. Download or save it again."
        )
    return value


def _depth(value: object) -> int:
    """Return how deeply lists and objects are nested in ``value``."""
    depth, level = 0, [value]
    while level:
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += bool(level)
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object; raises ``ValueError`` if it gives one name two values."""
    found = dict(pairs)
    for key, value in pairs:
        if found[key] is not value and found[key] != value:
            raise ValueError(f"it has two values for {key!r:.80}")
    return found


def find_files(name: str | os.PathLike[str]) -> Files:
    """Return the files of the folder ``name``, or those of the hub id; see :func:`fastres.weights.hub.find_snapshot`.

    Raises ``WeightsError`` for a name that is neither, and the errors of that function.
    """
    folder, text = Path(name).expanduser(), str(name)
    if folder.is_dir():
        return Folder(text, folder)
    hub_id = HubId.parse(text)
    if hub_id is None:
        raise WeightsError(
            f"There is no folder {text}. Pass the path of a folder that transformers or timm saved, or a hub id such "
            "as 'microsoft/resnet-50'."
        )
    return find_snapshot(hub_id, CONFIG)


def weights_file(files: Files, progress: bool = True) -> Path:
    """Return the file with the weights; ``progress`` shows a bar if it is downloaded.

    Raises ``WeightsError`` if there is none or if it is split, and ``DownloadError``.
    """
    unknown: list[UnreachableError] = []

    def found(name: str, progress: bool = False) -> Path | None:
        try:
            return files.file(name, progress)
        except UnreachableError as error:  # the next one may be in the cache
            unknown.append(error)
            return None

    for name in WEIGHTS:
        if (path := found(name, progress)) is not None:
            return path
        if found(f"{name}.index.json") is not None:
            raise WeightsError(
                f"{files.source} has its weights in several files ({name}.index.json). Save them again as one file: "
                "model.save_pretrained(folder, max_shard_size='10GB')."
            )
    if unknown:
        raise unknown[0]
    raise WeightsError(
        f"{files.source} has no weights: there must be {' or '.join(WEIGHTS)} in {files.described()}. Save the model "
        "there again, or pass another folder or hub id."
    )
