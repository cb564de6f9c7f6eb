"""Read folders that transformers or timm saved, and hub ids in Hugging Face's local cache.

A folder holds ``config.json``, which describes the network, and ``model.safetensors`` (or ``pytorch_model.bin``).
Nothing is downloaded. A hub id is looked up in ``huggingface_hub``'s cache; if it is not there, the error says how to
download it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastres.errors import CorruptCheckpointError, DownloadError, MissingDependencyError, WeightsError
from fastres.files import read_regular
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture

from . import timm_config, transformers_config
from .checkpoints import is_checkpoint_name

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
_DEEPEST = 50  # levels of a configuration
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class SavedModel:
    """The configuration of a saved folder.

    ``arch`` has the head's number of classes. ``transforms`` is ``None`` if the folder has no preprocessing, and
    ``categories`` is ``None`` if it has no class names.
    """

    source: str
    folder: Path
    weights: Path
    library: Literal["transformers", "timm"]
    arch: Architecture
    transforms: Transforms | None
    categories: tuple[str, ...] | None


def names_a_folder(name: object) -> bool:
    """Return True if ``name`` is an existing folder or looks like a hub id, such as ``"timm/resnet50.a1_in1k"``."""
    if not isinstance(name, (str, os.PathLike)) or name == "":  # as a path, "" is the current folder
        return False
    try:
        path = Path(os.fsdecode(name)).expanduser()
        return path.is_dir() or (isinstance(name, str) and not path.exists() and _hub_id(name) is not None)
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
    """Read the configuration of the folder or cached hub id called ``name``; the weights are not read.

    Raises ``DownloadError`` for a hub id that is not in the cache, ``MissingDependencyError`` without huggingface_hub,
    ``WeightsError`` if a file is missing, ``CorruptCheckpointError`` if ``config.json`` is not a JSON object,
    ``ConfigError`` if it is contradictory, and ``ArchitectureError`` for a network that fastres does not run.
    """
    folder = find_folder(name)
    source = str(name)
    config = read_json(folder / CONFIG, source)
    weights = weights_file(folder, source)
    if timm_config.is_timm(config):
        arch, transforms, categories = timm_config.parse(config, source)
        return SavedModel(source, folder, weights, "timm", arch, transforms, categories)
    arch, labels = transformers_config.parse(config, source)
    processor = folder / transformers_config.PROCESSOR
    found = transformers_config.transforms(read_json(processor, source), source) if processor.exists() else None
    return SavedModel(source, folder, weights, "transformers", arch, found, labels)


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
    except FileNotFoundError as error:
        raise WeightsError(
            f"{source} has no {path.name} ({path.parent}). A folder that transformers or timm saved has {CONFIG} and "
            f"{WEIGHTS[0]}. To load a checkpoint file, pass its own path as weights=."
        ) from error
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


def find_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder ``name``, or the cached snapshot of the hub id; raises the errors of :func:`read_saved`."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _cached_folder(str(name))


def weights_file(folder: Path, source: str) -> Path:
    """Return the weights file of a saved folder; raises ``WeightsError`` if there is none or if it is split."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
        if (folder / f"{name}.index.json").is_file():
            raise WeightsError(
                f"{source} has its weights in several files ({name}.index.json). Save them again as one file: "
                "model.save_pretrained(folder, max_shard_size='10GB')."
            )
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise WeightsError(
        f"{source} has no weights: {folder} must hold {' or '.join(WEIGHTS)}, but it has {found or 'no files'}. "
        "Save the model there again, or pass another folder."
    )


def _hub_id(name: str) -> re.Match[str] | None:
    match = _HUB_ID.fullmatch(name)
    return None if match is None or is_checkpoint_name(match["id"]) else match


def _cached_folder(name: str) -> Path:
    """Return the snapshot folder of a hub id in Hugging Face's local cache."""
    match = _hub_id(name)
    if match is None:
        raise WeightsError(
            f"There is no folder {name}. Pass the path of a folder that transformers or timm saved, or a hub id such "
            "as 'microsoft/resnet-50'."
        )
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no folder {name}. If it is a hub id, install huggingface_hub: pip install 'fastres[huggingface]'"
        ) from error
    try:
        found = try_to_load_from_cache(match["id"], CONFIG, revision=match["revision"])
    except ValueError as error:  # the hub's own rules for names
        raise WeightsError(
            f"There is no folder {name}, and it is not a valid hub id. Pass the path of a folder that transformers or "
            "timm saved, or a hub id such as 'microsoft/resnet-50'."
        ) from error
    if not isinstance(found, str):
        at = f" at revision {match['revision']!r}" if match["revision"] else ""
        raise DownloadError(
            f"There is no folder {name}, and the hub id {match['id']!r}{at} is not in the local cache "
            f"{constants.HF_HUB_CACHE}. fastres does not download from the hub; download it first with "
            f"hf download {match['id']} or huggingface_hub.snapshot_download({match['id']!r})."
        )
    return Path(found).parent
