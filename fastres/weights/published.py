"""The table of published weights for each model, and the code that reads their files.

The entries are torchvision's (``data/torchvision_weights.json``, checked against torchvision in a test) and the bundled
model, which comes with the package together with its weights and training record.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastres.errors import (
    CorruptCheckpointError,
    UnknownWeightsError,
    WeightsError,
    near_matches,
)
from fastres.network.architectures import (
    ARCHITECTURES,
    Architecture,
    block_specs,
    get_architecture,
    state_dict_shapes,
    stem_specs,
)
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD, Triple
from fastres.network.steps import conv_size

from . import download
from .checkpoints import SUFFIXES, read_checkpoint

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

DEFAULT = "DEFAULT"
BUNDLED_MODEL = "resnet20_digits"
BUNDLED_ENTRY = "DIGITS_V1"


@dataclass(frozen=True)
class WeightsEntry:
    """One published checkpoint and its facts.

    ``sha256`` is the file's hash in hex, or the beginning of it (torchvision's file names contain eight digits).
    ``acc1`` and ``acc5`` are accuracies in percent on the data set's test part at ``crop`` pixels, after a bilinear
    resize to ``resize``. ``gmacs`` are 10⁹ multiply-accumulates for one such image, ``file_mb`` is in MiB. ``mean`` and
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
        """The URL to download the file from, which respects ``FASTRES_WEIGHTS_URL``; ``None`` for a bundled file."""
        return None if self.bundled else download.base_url() + self.file


def entries(model: str) -> dict[str, WeightsEntry]:
    """Return the published weights of ``model`` by name; empty if there are none.

    Raises ``UnknownModelError`` for a name that is not in the table and ``WeightsError`` if a packaged file is missing.
    """
    arch = get_architecture(model)
    return _bundled_entries(arch) if model == BUNDLED_MODEL else dict(_torchvision_entries().get(model, {}))


def get_entry(model: str, name: str) -> WeightsEntry:
    """Return the entry called ``name``, or the best one for ``"DEFAULT"``.

    Raises ``UnknownWeightsError``, which lists the entries, if there is no such entry.
    """
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
            f"{', '.join(map(repr, known))} and 'DEFAULT'. You can also pass a path ({', '.join(SUFFIXES)}), a state "
            "dict, or None for random weights."
        )
    return known[name]


def entries_of(model: str) -> list[WeightsEntry]:
    """Return the published weights of ``model``, or nothing if it is not in the table of models."""
    return list(entries(model).values()) if model in ARCHITECTURES else []


def name_in_enum(model: str, text: str) -> str | None:
    """Return ``"IMAGENET1K_V1"`` for ``"ResNet50_Weights.IMAGENET1K_V1"``, which torchvision's ``get_model`` accepts.

    Returns ``None`` for another text. Raises ``UnknownWeightsError`` for the weights of another model.
    """
    enum, dot, name = text.partition(".")
    owner = enum.lower().removesuffix("_weights")
    if not dot or not enum.endswith("_Weights") or not name.isidentifier() or owner not in _torchvision_entries():
        return None
    if owner != model:
        raise _of_another(text, owner, model)
    return name


def entry_of_enum(model: str, member: Any, url: str) -> WeightsEntry:
    """Return the entry with the same file as the ``url`` of a torchvision enum member, or of the member's value.

    Raises ``UnknownWeightsError`` for others.
    """
    file = url.rpartition("/")[2]
    for entry in entries_of(model):
        if entry.file == file:
            return entry
    shown = f"{type(member).__name__}.{member.name}" if isinstance(member, Enum) else f"a {type(member).__name__}"
    others = [name for name, table in _torchvision_entries().items() if any(e.file == file for e in table.values())]
    if others:
        raise _of_another(shown, others[0], model)
    raise UnknownWeightsError(
        f"fastres does not know the weights {shown} ({file}). {_accepted(model)}, or pass their state dict: "
        "weights=member.get_state_dict()."
    )


def _of_another(shown: str, owner: str, model: str) -> UnknownWeightsError:
    return UnknownWeightsError(
        f"{shown} are weights of {owner}, not of {model}. {_accepted(model)}, or load {owner!r}."
    )


def _accepted(model: str) -> str:
    names = ", ".join(repr(entry.name) for entry in entries_of(model))
    return (
        f"Pass one of {model}'s entries ({names})"
        if names
        else f"Pass a path or a state dict ({model} has no published weights)"
    )


def read_entry(entry: WeightsEntry, progress: bool) -> object:
    """Return the content of the entry's file, after checking its hash."""
    if not entry.bundled:
        return read_checkpoint(download.cached_checkpoint(entry.file, entry.sha256, progress))
    from safetensors.torch import load

    content = _packaged(entry.file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise CorruptCheckpointError(
            f"{entry.file} in the installed package does not match its training record: its SHA-256 is {digest}, not "
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
    """Return the first eight hex digits of the file's SHA-256, which are the end of torchvision's file names."""
    return Path(file).stem.rpartition("-")[2]


def _bundled_entries(arch: Architecture) -> dict[str, WeightsEntry]:
    """Return the entry of the bundled model, from its training record."""
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
    """Return the number of trainable parameters; batch norm's running statistics do not count."""
    shapes = state_dict_shapes(arch).items()
    return sum(math.prod(shape) for key, shape in shapes if "running" not in key)


def _macs(arch: Architecture, size: int) -> int:
    """Return the multiply-accumulates of the convolutions and the head for one ``size`` × ``size`` image."""
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
