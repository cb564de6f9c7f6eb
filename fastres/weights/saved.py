"""The file that ``model.save`` writes and ``fastres.load`` reads: safetensors, with everything else in its metadata.

The tensors are the model's state dict. The metadata's strings are ``format`` (``"fastres"``), ``fastres_version``, and
JSON for ``architecture``, ``transforms``, ``categories``, ``weights`` (where they come from) and ``record`` (how a
model in 8 bit was made, or ``null``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from fastres.errors import CorruptCheckpointError, OutputError
from fastres.files import open_regular, refuse_unwritable, written_whole
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture
from fastres.text import path_text
from fastres.version import __version__

from .formats import is_safetensors

FORMAT = "fastres"
KEYS = ("architecture", "transforms", "categories", "weights", "record")
EXAMPLE = "model.safetensors"
_LONGEST_HEADER = 1 << 24  # bytes that are searched for the metadata
_Data = TypeVar("_Data", Architecture, Transforms)


@dataclass(frozen=True)
class SavedModelFile:
    """The content of a file. ``record`` is ``None`` unless the model is in 8 bit."""

    tensors: dict[str, Tensor]
    arch: Architecture
    transforms: Transforms
    categories: tuple[str, ...] | None
    record: dict[str, Any] | None


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    transforms: Transforms,
    **others: Any,
) -> Path:
    """Write a model to ``path``, completely or not at all; return the path.

    ``others`` are the values of the other :data:`KEYS`, as data for JSON. Raises ``OutputError`` if the file cannot be
    written.
    """
    target = Path(path).expanduser()
    refuse_unwritable(target, EXAMPLE)
    described = {"architecture": asdict(architecture), "transforms": asdict(transforms), **others}
    metadata = {key: json.dumps(described[key], ensure_ascii=False) for key in KEYS}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with written_whole(target) as temporary:
            save_file(stored, temporary, {"format": FORMAT, "fastres_version": __version__, **metadata})
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{path_text(target)} cannot be written ({reason}); free some space or use another path"
        ) from error
    return target


def is_saved(path: Path) -> bool:
    """Return True if :func:`write` wrote the file at ``path``, as far as its beginning shows."""
    try:
        with open_regular(path) as stream:
            beginning = stream.read(16)
            if not is_safetensors(beginning):
                return False
            header = beginning[8:] + stream.read(min(int.from_bytes(beginning[:8], "little"), _LONGEST_HEADER))
    except (OSError, ValueError):
        return False
    return b'"__metadata__"' in header and b'"fastres_version"' in header


def read(path: Path) -> SavedModelFile:
    """Read the file at ``path``. Raise ``CorruptCheckpointError`` if it is damaged or of a newer version."""
    try:
        with safetensors.safe_open(path, "pt", "cpu") as file:
            metadata = file.metadata() or {}
            # Copies, because the file's memory changes with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptCheckpointError(f"{path_text(path)} cannot be read: {error}. Save the model again") from error
    try:
        values = {
            key: json.loads(metadata[key]) for key in ("architecture", "transforms", "categories", "weights", "record")
        }
        names, record = values["categories"], values["record"]
        arch = _parsed(Architecture, values["architecture"])
        if sum(arch.depths) > len(tensors):
            raise ValueError(f"{sum(arch.depths)} blocks cannot have {len(tensors)} tensors")
        return SavedModelFile(
            tensors,
            arch,
            _parsed(Transforms, values["transforms"]),
            None if names is None else tuple(map(str, names)),
            None if record is None else dict(record),
        )
    except (KeyError, ValueError, TypeError) as error:
        made = metadata.get("fastres_version", "an unknown version")
        raise CorruptCheckpointError(
            f"{path_text(path)} is a model saved by fastres {made}, but its description cannot be read by fastres "
            f"{__version__} ({error!r:.200}). Save the model again, or use the version that saved it"
        ) from error


def _parsed(kind: type[_Data], data: Any) -> _Data:
    """Return the dataclass with the fields ``data``; lists become tuples. Raise ``ValueError`` for other fields."""
    known = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) - known:
        raise ValueError(f"{kind.__name__} has fields {sorted(set(data) - known)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    return kind(**values)
