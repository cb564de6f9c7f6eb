"""Read the architecture of a live module from its layers, or from a transformers model's configuration.

This gives the network that the module claims to be. :mod:`fastres.model.agreement` checks that it computes it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastres.folding.build import BATCH_NORM_EPSILON
from fastres.network.architectures import ARCHITECTURES, Architecture, conv_specs, state_dict_shapes
from fastres.weights import transformers_config
from fastres.weights.layouts import to_torchvision

from .modules import refusal


def read(module: nn.Module) -> tuple[Architecture, tuple[str, ...] | None]:
    """Return the architecture of a live module and, for a transformers model, its class names.

    Raises ``ArchitectureError`` if the module is laid out differently or fastres cannot run it.
    """
    if not _is_transformers(module):
        return infer_architecture(module), None
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    config: Any = module.config
    arch, labels = transformers_config.parse(config.to_dict(), name)
    _check_shapes(module, arch)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.eps != BATCH_NORM_EPSILON:
            raise refusal(module, f"{name} is {layer}, but fastres folds batch norm with eps {BATCH_NORM_EPSILON}")
    return arch, labels


def _is_transformers(module: nn.Module) -> bool:
    """Return True if ``module`` is a ``ResNetForImageClassification`` or built like one.

    Raises ``ArchitectureError`` for other models of transformers.
    """
    config = getattr(module, "config", None)
    if not hasattr(config, "model_type") or not hasattr(config, "to_dict"):
        return False
    if not hasattr(module, "classifier"):
        raise refusal(module, "it has no classifier; pass a ResNetForImageClassification")
    return True


def infer_architecture(module: nn.Module) -> Architecture:
    """Return the architecture of a live module with torchvision's layout. Raises ``ArchitectureError`` for others."""
    for name, layer in module.named_modules():
        if name.rpartition(".")[2] == "aa" and not isinstance(layer, nn.Identity):
            raise refusal(module, f"it has an anti-aliasing filter before its strides ({name}: {layer})")
    try:
        arch = _read_structure(module)
    except (AttributeError, IndexError, TypeError, ValueError, KeyError) as error:
        inner = _inner(module)
        advice = f"It may be a wrapper around a ResNet; then pass its {inner!r}" if inner else ""
        raise refusal(module, f"it is not laid out like torchvision's ResNet ({error})", advice) from error
    _check_shapes(module, arch)
    for spec in conv_specs(arch):
        conv, norm = module.get_submodule(spec.conv), module.get_submodule(spec.norm)
        wanted: dict[str, Any] = {"stride": (spec.stride,) * 2, "padding": (spec.padding,) * 2, "dilation": (1, 1)}
        wanted["groups"] = spec.groups
        for attribute, value in wanted.items():
            if getattr(conv, attribute) != value:
                raise refusal(
                    module, f"{spec.conv}.{attribute} is {getattr(conv, attribute)}, but fastres runs {value}"
                )
        if getattr(norm, "eps", None) != BATCH_NORM_EPSILON:
            raise refusal(module, f"{spec.norm} is {norm}, but fastres folds batch norm with eps {BATCH_NORM_EPSILON}")
    return arch


def _check_shapes(module: nn.Module, arch: Architecture) -> None:
    """Raise ``ArchitectureError`` unless the tensors of ``module`` have the names and shapes of ``arch``."""
    state = to_torchvision(module.state_dict(), arch)
    shapes = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    expected = state_dict_shapes(arch)
    if shapes != expected:
        odd = [key for key in sorted({*shapes, *expected}) if shapes.get(key) != expected.get(key)][:4]
        raise refusal(module, f"its parameters differ from a ResNet's, for example {', '.join(odd)}")


def _inner(module: nn.Module) -> str | None:
    """Return the name of a layer that has the stages of a ResNet itself, or ``None``."""
    for name, layer in module.named_modules():
        if name and hasattr(layer, "layer1") and hasattr(layer, "conv1"):
            return name
    return None


def _read_structure(module: nn.Module) -> Architecture:
    def sub(name: str) -> Any:
        return module.get_submodule(name)

    stages = 0
    while hasattr(module, f"layer{stages + 1}"):
        stages += 1
    if not stages:
        raise ValueError("it has no layer1")
    depths = tuple(len(list(sub(f"layer{stage}").children())) for stage in range(1, stages + 1))
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
