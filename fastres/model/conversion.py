"""``fastres.from_module``: create a model from a live module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import DtypeError, InputError, UnknownWeightsError
from fastres.images import presets
from fastres.images.categories import parse as parse_names
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture
from fastres.network.plan import LOGITS, POOLED
from fastres.text import article, dtype_name
from fastres.weights import timm_config
from fastres.weights.layouts import to_torchvision
from fastres.weights.published import WeightsEntry
from fastres.weights.sources import published_entry
from fastres.weights.transformers_config import of_processor

from .agreement import check, reference_copy, undisturbed
from .loading import default_transforms, entry_categories, entry_transforms
from .model import COMPUTE_DTYPES, Model
from .modules import VOUCH, check_layers, refusal, unwrapped
from .reading import read


def from_module(
    module: nn.Module,
    *,
    dtype: torch.dtype | str = "auto",
    weights: Any = None,
    categories: Any = None,
    transforms: Any = None,
    image_size: int | None = None,
    mean: Any = None,
    std: Any = None,
) -> Model:
    """Convert a live ResNet from torchvision, timm or transformers, with its weights, number of classes and device.

    The structure is read from the module's layers, or from a transformers model's configuration, so custom depths,
    widths and classifiers work. Then a copy of the module runs on a few random batches. The operations that it runs
    must be exactly those of the network, on its own tensors, and its results must agree with fastres's. A module in
    training mode is converted as it would be after ``eval()``, and does not change. ``torch.compile``,
    ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel`` around it are taken off.

    ``dtype`` is the dtype of the computation. ``"auto"`` is that of :func:`fastres.load` for a float32 module, and
    otherwise the module's own.

    A module holds tensors, but neither class names nor preprocessing, except that timm's have their preprocessing and
    transformers' their class names. ``torchvision.models.resnet50(weights="DEFAULT")`` has neither: without the
    arguments below, :meth:`Model.predict` then answers with ``"class 281"`` and uses ImageNet's usual preprocessing
    (resize to 256, crop to 224), which is not that of torchvision's newer weights.

    - ``weights`` is the name of the published weights from which the module comes (``"DEFAULT"``,
      ``"IMAGENET1K_V2"``), or torchvision's enum member. Their preprocessing applies, and their class names if the
      number of classes is the same. Their tensors are not used.
    - ``categories`` are the class names, as in :func:`fastres.load`.
    - ``transforms`` is the preprocessing, and ``image_size``, ``mean`` and ``std`` are parts of it, as in
      :func:`fastres.load`.

    These prevail over ``weights`` and over what the module knows.

    Raises ``ArchitectureError``, with the reason, if fastres cannot run the module: another network, another
    ``forward``, hooks, a ``forward`` set on an object, parametrized or quantized layers, branches that depend on the
    values of the image, tensors on several devices or on the meta device, and things that are no live module. Raises
    ``WeightsError`` for weights that are not finite, ``UnknownWeightsError`` if ``weights`` names none of this
    architecture, ``InputError`` for ``categories`` that are not one name for each class and for preprocessing that
    fastres cannot do, and ``DtypeError``.

    >>> theirs = torchvision.models.resnet50(weights="IMAGENET1K_V2")
    >>> model = fastres.from_module(theirs, weights="IMAGENET1K_V2")
    """
    module = unwrapped(module)
    change = presets.Change.of(of_processor(transforms), image_size, mean, std)
    if isinstance(module, Model):
        return _described(module, change, *_description(module.architecture, weights, categories))
    with undisturbed():
        check_layers(module)
        arch, labels = read(module)
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        state = {key: value.detach().clone() for key, value in module.state_dict().items()}
        floats = {k: v.float() if v.is_floating_point() else v for k, v in to_torchvision(state, arch).items()}
        names, preprocessing = _description(arch, weights, categories)
        config = getattr(module, "pretrained_cfg", None)
        if preprocessing is None and isinstance(config, dict):
            preprocessing = timm_config.transforms(config, name)
        model = Model(
            floats,
            arch,
            transforms=change(preprocessing or default_transforms(arch)),
            categories=labels if names is None else names,
            dtype=_dtype(module, dtype),
            weights=f"from {name}",
        )
        _check_agreement(module, model)
    return model


def _description(arch: Architecture, weights: Any, categories: Any) -> tuple[tuple[str, ...] | None, Transforms | None]:
    """Return the class names that were given, and the preprocessing of ``weights``; each ``None`` if it was not."""
    names, preprocessing = None, None
    if weights is not None:
        entry = _entry(arch.name, weights)
        names, preprocessing = entry_categories(entry, arch.num_classes), entry_transforms(entry)
    if categories is not None:
        names = parse_names(categories, arch.num_classes)
    return names, preprocessing


def _described(
    model: Model, change: presets.Change, names: tuple[str, ...] | None, preprocessing: Transforms | None
) -> Model:
    """Return ``model``, or a copy with other class names and preprocessing if they were given."""
    transforms = change(preprocessing or model.transforms)
    if names is None and transforms == model.transforms:
        return model
    twin = copy.deepcopy(model)
    twin.categories = twin.categories if names is None else names
    twin.transforms = transforms
    return twin


def _entry(name: str, weights: Any) -> WeightsEntry:
    """Return the published weights that ``weights`` names."""
    if name not in ARCHITECTURES:
        raise UnknownWeightsError(
            "The module has an architecture of its own, which has no published weights; give its class names and its "
            "preprocessing with categories= and transforms="
        )
    entry = published_entry(name, weights)
    if entry is None:
        raise InputError(
            f"weights is {article(weights)}, but from_module takes the tensors from the module; give the name of the "
            "published weights whose class names and preprocessing apply, such as 'DEFAULT'"
        )
    return entry


def _dtype(module: nn.Module, dtype: torch.dtype | str) -> torch.dtype | str:
    """Return the dtype of the computation: a reduced one of the module for ``"auto"``."""
    own = next(module.parameters()).dtype
    if dtype != "auto" or own == torch.float32:
        return dtype
    if own not in COMPUTE_DTYPES:
        raise DtypeError(
            f"{type(module).__name__} is in {dtype_name(own)}, but fastres computes in "
            f"{', '.join(map(dtype_name, COMPUTE_DTYPES))}; pass dtype='float32', which rounds its weights"
        )
    return own


def _check_agreement(module: nn.Module, model: Model) -> None:
    """Raise ``ArchitectureError`` unless ``module`` computes the logits of ``model``."""
    twin = reference_copy(module)
    candidate = copy.deepcopy(model).float().cpu()
    candidate.load_state_dict(to_torchvision(twin.state_dict(), model.architecture))

    def results(output: Any) -> Mapping[str, Tensor]:
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise refusal(module, f"its forward returns a {type(output).__name__} instead of logits", VOUCH)
        return {LOGITS: logits}

    def ours(x: Tensor) -> Mapping[str, Tensor]:
        return {POOLED: candidate.embed(x), LOGITS: candidate(x)}

    check(module, twin, model.architecture, results, ours)
