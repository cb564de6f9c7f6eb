"""Which checkpoints exist, and any of them → a state dict with torchvision's names, float32, on the CPU.

The published entries are torchvision's own (``data/torchvision_weights.json``, checked against torchvision in a test)
and the model in the box, whose weights and training record come with the package.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fastres.errors import (
    ConfigError,
    CorruptCheckpointError,
    StateDictMismatchError,
    UnknownWeightsError,
    WeightsError,
    near_matches,
)
from fastres.network.architectures import Architecture, block_specs, get_architecture, state_dict_shapes, stem_specs
from fastres.network.folding import IMAGENET_MEAN, IMAGENET_STD, Triple
from fastres.network.steps import conv_size

from . import download
from .checkpoints import SUFFIXES, is_path_like, read_checkpoint
from .fitting import FreshHeadWarning, fit_state, random_state
from .folders import CONFIG, SavedModel, architecture_beside, names_a_folder, read_saved
from .layouts import to_torchvision, unwrap
from .timm_config import refuse_anti_aliasing

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

__all__ = ["DEFAULT", "FreshHeadWarning", "LoadedWeights", "WeightsEntry", "entries", "get_entry", "load_state"]

DEFAULT = "DEFAULT"
BUNDLED_MODEL = "resnet20_digits"
BUNDLED_ENTRY = "DIGITS_V1"


@dataclass(frozen=True)
class WeightsEntry:
    """One published checkpoint and what is known of it.

    ``sha256`` is the file's hash in hex, or its beginning (torchvision's file names carry eight digits). ``acc1`` and
    ``acc5`` are percentages on the data set's test part at ``crop`` pixels (images resized to ``resize`` with bilinear
    interpolation first); ``gmacs`` are 10⁹ multiply-accumulates for one such image, ``file_mb`` is in MiB. ``mean`` and
    ``std`` are per RGB channel, for pixels scaled to [0, 1]. ``bundled`` files come with the package.
    """

    model: str
    name: str
    file: str
    sha256: str
    default: bool
    bundled: bool
    acc1: float
    acc5: float | None
    params: int
    gmacs: float
    file_mb: float
    resize: int
    crop: int
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    categories: Literal["imagenet", "digits"] = "imagenet"

    @property
    def url(self) -> str | None:
        """Where the file is downloaded from (``FASTRES_WEIGHTS_URL`` counts); ``None`` for a bundled one."""
        return None if self.bundled else download.base_url() + self.file


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


def entries(model: str) -> dict[str, WeightsEntry]:
    """The published weights of ``model`` by name; empty where there are none.

    Raises ``UnknownModelError`` for a name not in the table and ``WeightsError`` where a packaged file is missing.
    """
    arch = get_architecture(model)
    return _bundled_entries(arch) if model == BUNDLED_MODEL else dict(_torchvision_entries().get(model, {}))


def get_entry(model: str, name: str) -> WeightsEntry:
    """The entry called ``name``, or the best one for ``"DEFAULT"``; ``UnknownWeightsError`` says which there are."""
    known = entries(model)
    if not known:
        raise UnknownWeightsError(
            f"{model} has no published weights, so {name!r} cannot be loaded. Pass weights=None (random weights), the "
            f"path of a checkpoint ({', '.join(SUFFIXES)}) or a state dict."
        )
    if name == DEFAULT:
        return next(entry for entry in known.values() if entry.default)
    if name not in known:
        raise UnknownWeightsError(
            f"{model} has no weights called {name!r}.{near_matches(name.upper(), [DEFAULT, *known])} It has "
            f"{', '.join(map(repr, known))} and 'DEFAULT'; a path ({', '.join(SUFFIXES)}), a state dict and None "
            f"(random weights) are accepted too."
        )
    return known[name]


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
    if isinstance(weights, SavedModel) or names_a_folder(weights):
        return _load_saved(arch, weights if isinstance(weights, SavedModel) else read_saved(weights), num_classes)
    entry = _entry_of(arch.name, weights)
    if entry is not None:
        source = f"{entry.model} {entry.name} ({entry.file})"
        checkpoint = _read_entry(entry, progress)
        shared = False
    elif isinstance(weights, (str, PathLike)):
        path = Path(weights).expanduser()
        refuse_anti_aliasing(path.stem, str(path))
        beside = architecture_beside(path)
        if beside is not None:
            _check_same(arch, beside, str(path), path.parent)
        source, checkpoint = str(path), read_checkpoint(path)
        # safetensors maps the file: without a copy, weights would change when somebody overwrites it.
        shared = path.suffix.lower() == ".safetensors"
    else:
        source, checkpoint, shared = "a state dict", weights, True
    state = to_torchvision(unwrap(checkpoint), arch)
    fitted = fit_state(state, arch, num_classes, source, copy=shared)
    return LoadedWeights(fitted.state, fitted.arch, entry, source, fitted.missing_head)


def _load_saved(arch: Architecture, saved: SavedModel, num_classes: int | None) -> LoadedWeights:
    """The weights of a folder, which must be of ``arch``, whatever its number of classes."""
    _check_same(arch, saved.arch, saved.source, saved.source)
    state = to_torchvision(unwrap(read_checkpoint(saved.weights)), arch)
    fitted = fit_state(state, arch, num_classes, saved.source, copy=True)
    held = state["fc.weight"].shape[0] if "fc.weight" in state else saved.arch.num_classes
    if held != saved.arch.num_classes:
        raise ConfigError(
            f"{saved.source} contradicts itself: {CONFIG} has {saved.arch.num_classes} classes and "
            f"{saved.weights.name} a classifier of {held}. Correct {CONFIG}, or load the weights alone: "
            f"fastres.load({arch.name!r}, weights={str(saved.weights)!r})."
        )
    return LoadedWeights(fitted.state, fitted.arch, None, saved.source, fitted.missing_head, saved)


def _check_same(arch: Architecture, held: Architecture, source: str, folder: str | Path) -> None:
    """Raise where a folder's configuration names another network than ``arch``, whatever the number of classes."""
    if replace(held, num_classes=arch.num_classes) != arch:
        raise StateDictMismatchError(
            f"{source} holds {held.name} (its {CONFIG} says so), not {arch.name}. fastres.load({str(folder)!r}) loads "
            "what it holds."
        )


def _entry_of(model: str, weights: object) -> WeightsEntry | None:
    """The published entry that ``weights`` names, by string or enum member; ``None`` for a path or a state dict."""
    if isinstance(weights, str):
        if is_path_like(weights):
            return None
        published = weights == DEFAULT or weights in entries(model)
        return None if not published and Path(weights).is_file() else get_entry(model, weights)
    if isinstance(weights, (Mapping, PathLike, nn.Module)):
        return None
    if all(hasattr(weights, attribute) for attribute in ("url", "meta", "name")):
        return _enum_entry(model, weights)
    raise UnknownWeightsError(
        f"weights is {type(weights).__name__} ({weights!r:.80}); accepted are 'DEFAULT', the name of an entry, a "
        f"torchvision enum member, a path ({', '.join(SUFFIXES)}), a state dict, or None for random weights."
    )


def _enum_entry(model: str, member: Any) -> WeightsEntry:
    """The entry with the file of a torchvision enum member."""
    file = str(member.url).rpartition("/")[2]
    for entry in entries(model).values():
        if entry.file == file:
            return entry
    others = [name for name, table in _torchvision_entries().items() if any(e.file == file for e in table.values())]
    if others:
        raise UnknownWeightsError(
            f"{member} are weights of {others[0]}, not of {model}. {_accepted(model)} or load {others[0]!r}."
        )
    raise UnknownWeightsError(
        f"{member} ({file}) is in no table of fastres. {_accepted(model)}, or pass its state dict: "
        "weights=member.get_state_dict()."
    )


def _accepted(model: str) -> str:
    names = ", ".join(map(repr, entries(model)))
    return (
        f"Pass one of {model}'s own ({names})" if names else f"Pass a path or a state dict ({model} has none published)"
    )


def _read_entry(entry: WeightsEntry, progress: bool) -> object:
    """What the entry's verified file holds."""
    if not entry.bundled:
        return read_checkpoint(download.cached_checkpoint(entry.file, entry.sha256, progress))
    from safetensors.torch import load

    content = _packaged(entry.file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise CorruptCheckpointError(
            f"{entry.file} in the installed package is not the file of its record: its SHA-256 is {digest}, not "
            f"{entry.sha256}. Install fastres again."
        )
    return load(content)


def _data_folder() -> Traversable:
    return importlib.resources.files("fastres") / "data"


def _packaged(file: str) -> bytes:
    try:
        return (_data_folder() / file).read_bytes()
    except OSError as error:
        raise WeightsError(
            f"{file} is missing from the installed package (looked in {_data_folder()}). Install fastres again, or "
            "pass weights=<path>, a state dict or None."
        ) from error


@functools.cache
def _torchvision_entries() -> dict[str, dict[str, WeightsEntry]]:
    table = json.loads(_packaged("torchvision_weights.json"))
    return {
        model: {
            name: WeightsEntry(model, name, sha256=_hash_in_name(row["file"]), bundled=False, **row)
            for name, row in rows.items()
        }
        for model, rows in table.items()
    }


def _hash_in_name(file: str) -> str:
    """The first eight hex digits of the file's SHA-256, with which torchvision's file names end."""
    return Path(file).stem.rpartition("-")[2]


def _bundled_entries(arch: Architecture) -> dict[str, WeightsEntry]:
    """The model in the box, as its training record describes it."""
    file = f"{BUNDLED_MODEL}.safetensors"
    record = json.loads(_packaged(f"{BUNDLED_MODEL}.json"))
    entry = WeightsEntry(
        model=BUNDLED_MODEL,
        name=BUNDLED_ENTRY,
        file=file,
        sha256=record["sha256"],
        default=True,
        bundled=True,
        acc1=round(100 * record["held_out_accuracy"], 3),
        acc5=None,
        params=_parameters(arch),
        gmacs=round(_macs(arch, record["crop"]) / 1e9, 3),
        file_mb=round(len(_packaged(file)) / 2**20, 3),
        resize=record["resize"],
        crop=record["crop"],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        categories="digits",
    )
    return {BUNDLED_ENTRY: entry}


def _parameters(arch: Architecture) -> int:
    """Trainable parameters: batch norm's running statistics are none."""
    shapes = state_dict_shapes(arch).items()
    return sum(math.prod(shape) for key, shape in shapes if "running" not in key)


def _macs(arch: Architecture, size: int) -> int:
    """Multiply-accumulates of the convolutions and the head for one ``size`` × ``size`` image."""
    total = arch.features * arch.num_classes
    for stem in stem_specs(arch):
        size = conv_size(size, stem.kernel, stem.stride, stem.padding)
        total += math.prod(stem.weight_shape) * size**2
    size = size if arch.stem == "cifar" else conv_size(size, 3, 2, 1)
    for block in block_specs(arch):
        for conv in block.convs:
            size = conv_size(size, conv.kernel, conv.stride, conv.padding)
            total += math.prod(conv.weight_shape) * size**2
        if block.projection is not None:
            total += math.prod(block.projection.weight_shape) * size**2
    return total
