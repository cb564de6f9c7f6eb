"""``fastres.load``: create models from weights."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from fastres.errors import DeviceError, WeightsError
from fastres.images import presets
from fastres.images.categories import load as load_names
from fastres.images.categories import parse as parse_names
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture, get_architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.weights.folders import SavedModel, find_saved
from fastres.weights.published import DEFAULT, WeightsEntry
from fastres.weights.state import LoadedWeights, load_state

from .model import Model, parse_dtype

CIFAR_SIZE = 32
IMAGENET_RESIZE, IMAGENET_CROP = 256, 224


def load(
    name: str,
    weights: str | PathLike[str] | Mapping[str, Tensor] | Any | None = "DEFAULT",
    *,
    num_classes: int | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int | None = None,
    progress: bool = True,
    categories: Any = None,
    transforms: Any = None,
) -> Model:
    """Load a model by name, or from a folder that transformers or timm saved.

    ``name`` is one of :func:`fastres.list_models`, or a folder with ``config.json`` and ``model.safetensors``, or a hub
    id that is in Hugging Face's local cache (``"microsoft/resnet-50"``, ``"timm/resnet50.a1_in1k"``). A folder also
    provides the architecture, the class names and the preprocessing. ``weights`` is ``"DEFAULT"``, an entry of the
    model's published weights (``"IMAGENET1K_V1"``), a torchvision enum member, a path (``.pth``, ``.pt``,
    ``.safetensors``), a folder or hub id, a state dict, or ``None`` for random weights, initialised as in torchvision.

    Published weights are downloaded once into torch's hub cache and checked against their sha256 at every load.
    If ``num_classes`` differs from the weights' number of classes, the classifier is random and a warning says so. With
    ``num_classes=0`` there is no classifier, and ``model(x)`` returns the same as :meth:`Model.embed`. ``dtype="auto"``
    computes in float16 on CUDA and float32 on the CPU.

    ``categories`` are the class names, for weights that do not bring theirs: a list, or a file with one name a line or
    in JSON (:func:`fastres.images.categories.parse`). ``transforms`` is the preprocessing of :meth:`Model.predict`: a
    :class:`fastres.Transforms`, or the ``transforms()`` of torchvision's weights. Both replace those of the weights.

    Raises ``UnknownModelError``, ``WeightsError`` and its subclasses, ``ArchitectureError`` for another library's
    network that fastres does not run, ``InputError`` for ``categories`` that are not one name for each class and for
    ``transforms`` that fastres cannot do, ``DtypeError`` and ``DeviceError``.

    >>> model = fastres.load("resnet50").cuda()
    >>> model.predict("cat.jpg")[0][0].label
    """
    parse_dtype(dtype)
    preprocessing = None if transforms is None else presets.parse(transforms)
    saved = None if name in ARCHITECTURES else find_saved(name)
    if saved is None:
        arch = get_architecture(name)
    else:
        arch, weights = _saved(saved, weights)
    loaded = load_state(arch, weights, num_classes=num_classes, progress=progress)
    model = Model(
        loaded.state,
        loaded.arch,
        transforms=preprocessing or _transforms(loaded),
        categories=_categories(loaded) if categories is None else parse_names(categories, loaded.arch.num_classes),
        dtype=dtype,
        weights=loaded.source,
    )
    return model if device is None else model.to(_device(device))


def _saved(saved: SavedModel, weights: object) -> tuple[Architecture, object]:
    """Return the architecture of a folder or hub id, and its weights (``None`` for random ones)."""
    if weights is not None and not (isinstance(weights, str) and weights == DEFAULT):
        raise WeightsError(
            f"{saved.source} has its own weights, but other weights were given too. Pass the folder alone, or the "
            f"model's name with weights=: fastres.load({saved.arch.name!r}, weights=…)."
        )
    return saved.arch, None if weights is None else saved


def _device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
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
