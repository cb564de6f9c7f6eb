"""``fastres.load`` and ``fastres.from_module``: create models from weights and from live modules."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, DeviceError, FastresError, WeightsError
from fastres.folding.build import BATCH_NORM_EPSILON
from fastres.images import categories
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture, conv_specs, get_architecture, state_dict_shapes
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD
from fastres.weights import timm_config, transformers_config
from fastres.weights.folders import SavedModel, find_saved
from fastres.weights.layouts import to_torchvision
from fastres.weights.published import DEFAULT
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

    Raises ``UnknownModelError``, ``WeightsError`` and its subclasses, ``ArchitectureError`` for another library's
    network that fastres does not run, ``DtypeError`` and ``DeviceError``.

    >>> model = fastres.load("resnet50").cuda()
    >>> model.predict("cat.jpg")[0][0].label
    """
    parse_dtype(dtype)
    saved = None if name in ARCHITECTURES else find_saved(name)
    if saved is None:
        arch = get_architecture(name)
    else:
        arch, weights = _saved(saved, weights)
    loaded = load_state(arch, weights, num_classes=num_classes, progress=progress)
    model = Model(
        loaded.state,
        loaded.arch,
        transforms=_transforms(loaded),
        categories=_categories(loaded),
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
        return Transforms(resize=entry.resize, crop=entry.crop, mean=entry.mean, std=entry.std)
    if loaded.saved is not None and loaded.saved.transforms is not None:
        return loaded.saved.transforms
    return default_transforms(loaded.arch)


def default_transforms(arch: Architecture) -> Transforms:
    """Return the preprocessing to use if the weights do not specify one: the usual one for ImageNet or CIFAR."""
    resize, crop = (CIFAR_SIZE, CIFAR_SIZE) if arch.stem == "cifar" else (IMAGENET_RESIZE, IMAGENET_CROP)
    return Transforms(resize=resize, crop=crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _categories(loaded: LoadedWeights) -> tuple[str, ...] | None:
    if loaded.saved is not None and not loaded.missing_head:
        return loaded.saved.categories
    if loaded.entry is None or loaded.missing_head:
        return None
    names = categories.load(loaded.entry.categories)
    return names if len(names) == loaded.arch.num_classes else None


def from_module(module: nn.Module, *, dtype: torch.dtype | str = "auto") -> Model:
    """Convert a live ResNet from torchvision, timm or transformers, with its weights, number of classes and device.

    The structure is read from the module's layers, or from a transformers model's configuration, so custom depths,
    widths and classifiers work. Then both models run on one small random batch, and their results must agree. This
    detects a subclass with a different ``forward``. The preprocessing of a timm model and the class names of a
    transformers model are kept. Raises ``ArchitectureError``, with the reason, if fastres cannot run the module.
    """
    if isinstance(module, Model):
        return module
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    labels: tuple[str, ...] | None = None
    if _is_transformers(module):
        arch, labels = transformers_config.parse(module.config.to_dict(), name)  # type: ignore[operator, union-attr]
        _check_norms(module)
    else:
        arch = infer_architecture(module)
    own = next(module.parameters()).dtype
    if dtype == "auto" and own != torch.float32:
        dtype = own
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    floats = {k: v.float() if v.is_floating_point() else v for k, v in to_torchvision(state, arch).items()}
    published = getattr(module, "pretrained_cfg", None)
    transforms = timm_config.transforms(published, name) if isinstance(published, dict) else default_transforms(arch)
    model = Model(floats, arch, transforms=transforms, categories=labels, dtype=dtype, weights=f"from {name}")
    _check_agreement(module, model)
    return model


def _is_transformers(module: nn.Module) -> bool:
    """Return True if ``module`` is a ``ResNetForImageClassification`` or built like one.

    Raises ``ArchitectureError`` for other models of transformers.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "model_type"):
        return False
    if not hasattr(module, "classifier"):
        raise _refusal(module, "it has no classifier; pass a ResNetForImageClassification")
    return True


def _check_norms(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.eps != BATCH_NORM_EPSILON:
            raise _refusal(module, f"{name} is {layer}, but fastres folds batch norm with eps {BATCH_NORM_EPSILON}")


def infer_architecture(module: nn.Module) -> Architecture:
    """Return the architecture of a live module with torchvision's layout.

    Raises ``ArchitectureError`` if the module is laid out differently or fastres cannot run it.
    """
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] == "aa" and not isinstance(layer, nn.Identity):
            raise _refusal(module, f"it has an anti-aliasing filter before its strides ({name}: {layer})")
    try:
        arch = _read_structure(module)
    except (AttributeError, IndexError, TypeError, ValueError, KeyError) as error:
        raise _refusal(module, f"it is not laid out like torchvision's ResNet ({error})") from error
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items() if "num_batches" not in key}
    expected = state_dict_shapes(arch)
    if shapes != expected:
        odd = sorted(set(shapes.items()) ^ set(expected.items()))[:4]
        raise _refusal(module, f"its parameters differ from a ResNet's, for example {', '.join(key for key, _ in odd)}")
    for spec in conv_specs(arch):
        conv, norm = module.get_submodule(spec.conv), module.get_submodule(spec.norm)
        wanted: dict[str, Any] = {"stride": (spec.stride,) * 2, "padding": (spec.padding,) * 2, "dilation": (1, 1)}
        wanted["groups"] = spec.groups
        for attribute, value in wanted.items():
            if getattr(conv, attribute) != value:
                raise _refusal(
                    module, f"{spec.conv}.{attribute} is {getattr(conv, attribute)}, but fastres runs {value}"
                )
        if getattr(norm, "eps", None) != BATCH_NORM_EPSILON:
            raise _refusal(module, f"{spec.norm} is {norm}, but fastres folds batch norm with eps {BATCH_NORM_EPSILON}")
    return arch


def _read_structure(module: nn.Module) -> Architecture:
    def sub(name: str) -> Any:
        return module.get_submodule(name)

    stages = 0
    while hasattr(module, f"layer{stages + 1}"):
        stages += 1
    if not stages:
        raise ValueError("it has no layer1")
    depths = tuple(len(sub(f"layer{stage}")) for stage in range(1, stages + 1))
    bottleneck = hasattr(sub("layer1.0"), "conv3")
    outputs = tuple(sub(f"layer{s}.0.conv{3 if bottleneck else 2}").out_channels for s in range(1, stages + 1))
    widths = tuple(k // 4 for k in outputs) if bottleneck else outputs
    groups = sub("layer1.0.conv2").groups if bottleneck else 1
    width_per_group = sub("layer1.0.conv2").out_channels * 64 // (widths[0] * groups) if bottleneck else 64
    deep = isinstance(sub("conv1"), nn.Sequential)
    stem_convs = [layer for layer in sub("conv1").modules() if isinstance(layer, nn.Conv2d)]
    stem = "deep" if deep else "imagenet" if stem_convs[0].kernel_size == (7, 7) else "cifar"
    own = getattr(module, "architecture", None)
    shortcut = own.shortcut if isinstance(own, Architecture) else "projection"
    if any(name.endswith("downsample.2.weight") for name in module.state_dict()):
        shortcut = "average_pool"
    found = Architecture(
        "custom",
        "bottleneck" if bottleneck else "basic",
        depths,
        widths,
        groups,
        width_per_group,
        stem,  # type: ignore[arg-type]
        shortcut,
        _class_count(module),
        stem_widths=tuple(conv.out_channels for conv in stem_convs),
        stride_in_1x1=bottleneck and any(sub(f"layer{s}.0.conv1").stride != (1, 1) for s in range(1, stages + 1)),
        first_stage_stride=max(sub("layer1.0.conv1").stride[0], sub("layer1.0.conv2").stride[0]),
        squeeze_excitation=getattr(sub("layer1.0"), "se", None) is not None,
    )
    for row in ARCHITECTURES.values():
        if row.with_classes(found.num_classes) == Architecture(**{**vars(found), "name": row.name}):
            return row.with_classes(found.num_classes)
    return found


def _class_count(module: nn.Module) -> int:
    """Return the classes of a live module's ``fc``, or 0 for ``nn.Identity``, the usual way to remove a classifier."""
    head = module.get_submodule("fc")
    return 0 if isinstance(head, nn.Identity) else int(head.out_features)  # type: ignore[arg-type]


def _refusal(module: nn.Module, reason: str) -> ArchitectureError:
    return ArchitectureError(
        f"{type(module).__name__} cannot be run: {reason}. fastres.from_module takes the ResNets, ResNeXts and "
        "Wide ResNets of torchvision.models and timm, and transformers' ResNetForImageClassification"
    )


@torch.no_grad()
def _check_agreement(module: nn.Module, model: Model) -> None:
    """Run both on one small random batch, in float32 on the CPU. Raise ``ArchitectureError`` if they differ.

    In untrained networks the last scale of each residual branch is often zero, which would hide the result of the
    branch. Here such scales are set to one in both.
    """
    import copy

    reference = copy.deepcopy(module).float().cpu().eval()
    for layer in reference.modules():
        if isinstance(layer, nn.BatchNorm2d) and not layer.weight.any():
            layer.weight.fill_(1)
    candidate = copy.deepcopy(model).float().cpu()
    candidate.load_state_dict(to_torchvision(reference.state_dict(), model.architecture))
    size = max(48, model.architecture.minimum_size)
    x = torch.randn(2, 3, size, size + 7, generator=torch.Generator().manual_seed(0))
    expected = reference(x)
    expected = getattr(expected, "logits", expected)
    try:
        error = float((candidate(x) - expected).norm() / expected.norm())
    except FastresError:
        raise
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise _refusal(module, f"its forward returns something other than logits ({problem})") from problem
    if not error < 1e-3:
        raise _refusal(
            module,
            f"its forward does not compute a ResNet (relative difference {error:.2g} on random input)",
        )
