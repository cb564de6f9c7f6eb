"""Folders that transformers or timm saved, and hub ids in Hugging Face's local cache → what is in them.

A folder holds ``config.json``, which says what the network is, and ``model.safetensors`` (or ``pytorch_model.bin``).
Nothing is downloaded: a hub id is looked up in the cache that ``huggingface_hub`` keeps, and a missing one is an error
that says how to fetch it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastres.errors import CorruptCheckpointError, DownloadError, MissingDependencyError, WeightsError
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture

from . import timm_config, transformers_config
from .checkpoints import is_checkpoint_name

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class SavedModel:
    """What a folder says of itself.

    ``arch`` has the head's number of classes. ``transforms`` are ``None`` where the folder has no preprocessing, and
    ``categories`` where it has no class names.
    """

    source: str
    folder: Path
    weights: Path
    library: Literal["transformers", "timm"]
    arch: Architecture
    transforms: Transforms | None
    categories: tuple[str, ...] | None


def names_a_folder(name: object) -> bool:
    """Whether ``name`` is an existing folder's or has the form of a hub id, such as ``"timm/resnet50.a1_in1k"``."""
    if not isinstance(name, (str, os.PathLike)):
        return False
    if Path(name).expanduser().is_dir():
        return True
    return isinstance(name, str) and not Path(name).expanduser().exists() and _hub_id(name) is not None


def read_saved(name: str | os.PathLike[str]) -> SavedModel:
    """Read the configuration of the folder or cached hub id called ``name``; the weights are not read.

    Raises ``DownloadError`` for a hub id that is not in the cache, ``MissingDependencyError`` without huggingface_hub,
    ``WeightsError`` where a file is missing, ``CorruptCheckpointError`` where ``config.json`` is no JSON object, and
    ``ArchitectureError`` for a network that fastres does not run.
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
    """The network that the ``config.json`` beside a file of weights names, if there is one of timm's or transformers'.

    Tensors do not show everything: where a stride is, or a filter without parameters.
    """
    config_file = weights.parent / CONFIG
    if weights.name not in WEIGHTS or not config_file.is_file():
        return None
    config = read_json(config_file, str(weights))
    if timm_config.is_timm(config):
        return timm_config.parse(config, str(weights))[0]
    return transformers_config.parse(config, str(weights))[0] if "model_type" in config else None


def read_json(path: Path, source: str) -> dict[str, Any]:
    """The JSON object in the file at ``path``, which belongs to ``source``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{source} has no {path.name} ({path.parent}). A folder that transformers or timm saved has {CONFIG} and "
            f"{WEIGHTS[0]}; a checkpoint file is given by its own path, as weights="
        ) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error}). Fetch or save it again.") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path} holds {type(value).__name__}, not a JSON object. Fetch or save it again.")
    return value


def find_folder(name: str | os.PathLike[str]) -> Path:
    """The folder called ``name``, or the cached snapshot of the hub id; raises as :func:`read_saved` does."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _cached_folder(str(name))


def weights_file(folder: Path, source: str) -> Path:
    """The file of weights in a saved folder; raises ``WeightsError`` where there is none, or several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
        if (folder / f"{name}.index.json").is_file():
            raise WeightsError(
                f"{source} keeps its weights in several files ({name}.index.json). Save it again as one: "
                "model.save_pretrained(folder, max_shard_size='10GB')."
            )
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise WeightsError(f"{source} has {CONFIG} and none of {', '.join(WEIGHTS)} ({folder} has: {found}).")


def _hub_id(name: str) -> re.Match[str] | None:
    match = _HUB_ID.fullmatch(name)
    return None if match is None or is_checkpoint_name(match["id"]) else match


def _cached_folder(name: str) -> Path:
    """The snapshot folder of a hub id in Hugging Face's local cache."""
    match = _hub_id(name)
    if match is None:
        raise WeightsError(f"There is no folder {name}.")
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no folder {name}, and hub ids need huggingface_hub: pip install 'fastres[huggingface]'"
        ) from error
    try:
        found = try_to_load_from_cache(match["id"], CONFIG, revision=match["revision"])
    except ValueError as error:  # the hub's own rules for names
        raise WeightsError(
            f"There is no folder {name}, and no hub id looks like that. Give the path of a folder that transformers or "
            "timm saved, or a hub id such as 'microsoft/resnet-50'."
        ) from error
    if not isinstance(found, str):
        at = f" at revision {match['revision']!r}" if match["revision"] else ""
        raise DownloadError(
            f"There is no folder {name}, and the hub id {match['id']!r}{at} is not in the local cache "
            f"{constants.HF_HUB_CACHE}. fastres downloads nothing from the hub unasked; fetch it first: "
            f"hf download {match['id']}, or huggingface_hub.snapshot_download({match['id']!r})."
        )
    return Path(found).parent
