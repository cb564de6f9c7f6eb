"""``fastres.load``: create models from weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.errors import (
    ArchitectureError,
    DeviceError,
    DtypeError,
    InputError,
    StateDictMismatchError,
    UnknownModelError,
    WeightsError,
)
from fastres.images import presets
from fastres.images.categories import load as load_names
from fastres.images.categories import parse as parse_names
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture, get_architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.text import dtype_name, path_text
from fastres.weights.checkpoints import is_checkpoint_name
from fastres.weights.folders import SavedModel, find_saved
from fastres.weights.inspect import inspect
from fastres.weights.published import DEFAULT, WeightsEntry
from fastres.weights.saved import is_saved, read
from fastres.weights.state import LoadedWeights, load_state
from fastres.weights.transformers_config import of_processor

from .model import Model, parse_dtype
from .quantized import QuantizedModel

CIFAR_SIZE = 32
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224


def load(
    name: str | PathLike[str],
    weights: str | PathLike[str] | Mapping[str, Tensor] | Any | None = "DEFAULT",
    *,
    num_classes: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int | None = None,
    progress: bool = True,
    categories: Any = None,
    transforms: Any = None,
    image_size: int | None = None,
    mean: Any = None,
    std: Any = None,
) -> Model:
    """Load a model by name, from a file that ``model.save`` wrote, or from a folder that transformers or timm saved.

    ``name`` is one of :func:`fastres.list_models`, or such a file (``"model.safetensors"``, which brings everything),
    or a folder with ``config.json`` and ``model.safetensors``, or a hub id (``"microsoft/resnet-50"``,
    ``"timm/resnet50.a1_in1k"``, or with a branch, tag or commit: ``"timm/resnet50.a1_in1k@main"``). Folders and hub ids
    also provide the architecture, the class names and the preprocessing. ``weights`` is ``"DEFAULT"``, an entry of the
    model's published weights (``"IMAGENET1K_V1"``), a torchvision enum member, a path (``.pth``, ``.pt``,
    ``.safetensors``), a folder or hub id, a state dict, or ``None`` for random weights, initialised as in torchvision.

    Published weights are downloaded once into torch's hub cache and checked against their sha256 at every load. The
    files of a hub id are downloaded by huggingface_hub into its own cache, and ``model.weights`` names their commit.
    ``progress`` shows a bar on stderr during a download.

    If ``num_classes`` differs from the weights' number of classes, the classifier is random and a warning says so. With
    ``num_classes=0`` there is no classifier, and ``model(x)`` returns the same as :meth:`Model.embed`. ``dtype="auto"``
    computes in float16 on CUDA and float32 on the CPU.

    ``categories`` are the class names, for weights that do not bring theirs: a list, or a file with one name a line or
    in JSON (:func:`fastres.images.categories.parse`). ``transforms`` is the preprocessing of :meth:`Model.predict`: a
    :class:`fastres.Transforms`, the ``transforms()`` of torchvision's weights, a ``Compose`` that does the same, as
    timm's do, or an image processor of transformers. Both replace those of the weights. ``image_size`` (the side of the
    crop, in pixels), ``mean`` and ``std`` (three numbers each, for pixels scaled to 0..1) change only these parts. The
    shorter side is then resized in proportion to the crop.

    Raises ``UnknownModelError``, ``WeightsError`` and its subclasses, ``ArchitectureError`` for another library's
    network that fastres does not run, ``InputError`` for ``categories`` that are not one name for each class and for
    preprocessing that fastres cannot do, ``DtypeError`` and ``DeviceError``.

    >>> model = fastres.load("resnet50").cuda()
    >>> model.predict("cat.jpg").top1.label
    """
    change = presets.Change.of(of_processor(transforms), image_size, mean, std)
    file = _own_file(name, weights)
    if file is not None:
        return _load_file(file, name, num_classes, dtype, device, categories, change)
    parse_dtype(dtype)
    saved = None if name in ARCHITECTURES else find_saved(name)
    if saved is None:
        _refuse_checkpoint(name)
        arch = get_architecture(path_text(name) if isinstance(name, PathLike) else name)
    else:
        arch, weights = _saved(saved, weights)
    loaded = load_state(arch, weights, num_classes=num_classes, progress=progress)
    model = Model(
        loaded.state,
        loaded.arch,
        transforms=change(_transforms(loaded)),
        categories=_categories(loaded) if categories is None else parse_names(categories, loaded.arch.num_classes),
        dtype=dtype,
        weights=loaded.source,
    )
    return model if device is None else model.to(parse_device(device))


def _own_file(name: object, weights: object) -> Path | None:
    """Return the file that ``model.save`` wrote, if ``name`` or ``weights`` is one."""
    default = isinstance(weights, str) and weights == DEFAULT
    for given in (name,) if default else (name, weights):
        if isinstance(given, (str, PathLike)) and given not in ARCHITECTURES:
            with suppress(OSError, ValueError, RuntimeError):  # not a path that the system accepts
                path = Path(given).expanduser()
                if path.is_file() and is_saved(path):
                    if given is name and not default:
                        raise WeightsError(
                            f"{path_text(path)} has its own weights, but other weights were given too. Pass the file "
                            "alone"
                        )
                    return path
    return None


def _refuse_checkpoint(name: object) -> None:
    """Raise ``UnknownModelError``, with the call that loads it, if ``name`` is the path of a checkpoint file."""
    if not isinstance(name, (str, PathLike)) or name in ARCHITECTURES or not os.path.isfile(name):
        return
    path = path_text(name)
    if path.endswith(".onnx"):
        raise UnknownModelError(
            f"{path} is an ONNX file, and fastres loads checkpoints. fastres.export.runtime.Session opens what fastres "
            "export wrote"
        )
    models: tuple[str, ...] = ()
    try:
        models = inspect(name).models
    except (WeightsError, ArchitectureError):
        if not is_checkpoint_name(path):
            return
    what = f"fits {' and '.join(models)}" if models else "does not name its network"
    raise UnknownModelError(
        f"{path} is a checkpoint file, which {what}. Give the model's name and the file: "
        f"fastres.load({models[0] if models else 'resnet50'!r}, weights={path!r})"
    )


def _load_file(
    path: Path,
    name: object,
    num_classes: int | None,
    dtype: torch.dtype | str,
    device: torch.device | str | int | None,
    categories: Any,
    change: presets.Change,
) -> Model:
    """Load the file at ``path``, which ``model.save`` wrote; ``name`` is the path, or the name of its network."""
    file = read(path)
    if name in ARCHITECTURES and name != file.arch.name:
        raise StateDictMismatchError(f"{path_text(path)} holds {file.arch.name}, not {name}. Pass the file alone")
    names = file.categories if categories is None else parse_names(categories, file.arch.num_classes)
    if file.record is None:
        loaded = load_state(file.arch, file.tensors, num_classes=num_classes)
        names = names if loaded.arch == file.arch else None
        preprocessing = change(file.transforms)
        kinds: dict[str, Any] = {
            "transforms": preprocessing,
            "categories": names,
            "dtype": dtype,
            "weights": path_text(path),
        }
        model = Model(loaded.state, loaded.arch, **kinds)
    else:
        if num_classes not in (None, file.arch.num_classes):
            raise InputError(
                f"num_classes is {num_classes}, but the model in 8 bit in {path_text(path)} has "
                f"{file.arch.num_classes} classes; leave num_classes out"
            )
        if dtype != "auto" and dtype_name(dtype) != "int8":
            raise DtypeError(
                f"dtype is {dtype}, but the model in {path_text(path)} is in 8 bit; leave dtype out, or load the float "
                "checkpoint"
            )
        kinds = {"transforms": file.transforms, "categories": names, "record": file.record}
        model = QuantizedModel(file.tensors, file.arch, weights=path_text(path), **kinds)
        model.transforms = change(file.transforms)
    return model if device is None else model.to(parse_device(device))


def _saved(saved: SavedModel, weights: object) -> tuple[Architecture, object]:
    """Return the architecture of a folder or hub id, and its weights (``None`` for random ones)."""
    if weights is not None and not (isinstance(weights, str) and weights == DEFAULT):
        raise WeightsError(
            f"{saved.source} has its own weights, but other weights were given too. Pass the folder alone, or the "
            f"model's name with weights=: fastres.load({saved.arch.name!r}, weights=…)."
        )
    return saved.arch, None if weights is None else saved


def parse_device(device: torch.device | str | int) -> torch.device:
    """Return ``device``, such as ``"cuda:1"``. Raises ``DeviceError`` for anything else."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device is {device!r}; give 'cpu', 'cuda' or 'cuda:1'") from error


def _transforms(loaded: LoadedWeights) -> Transforms:
    entry = loaded.entry
    if entry is not None:
        return entry_transforms(entry)
    if loaded.saved is not None and loaded.saved.transforms is not None:
        return loaded.saved.transforms
    return default_transforms(loaded.arch)


def entry_transforms(entry: WeightsEntry) -> Transforms:
    """Return the preprocessing of published weights."""
    return Transforms(resize=entry.resize, crop=entry.crop, mean=entry.mean, std=entry.std)


def entry_categories(entry: WeightsEntry, num_classes: int) -> tuple[str, ...] | None:
    """Return the class names of published weights, or ``None`` if a network has another number of classes."""
    names = load_names(entry.categories)
    return names if len(names) == num_classes else None


def default_transforms(arch: Architecture) -> Transforms:
    """Return the preprocessing to use if the weights do not specify one: the usual one for ImageNet or CIFAR."""
    resize, crop = (CIFAR_SIZE, CIFAR_SIZE) if arch.stem == "cifar" else (IMAGENET_RESIZE, IMAGENET_CROP)
    return Transforms(resize=resize, crop=crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _categories(loaded: LoadedWeights) -> tuple[str, ...] | None:
    if loaded.saved is not None and not loaded.missing_head:
        return loaded.saved.categories
    if loaded.entry is None or loaded.missing_head:
        return None
    return entry_categories(loaded.entry, loaded.arch.num_classes)
