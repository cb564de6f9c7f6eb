"""Read the ``config.json`` and ``preprocessor_config.json`` that transformers saves for a ResNet.

Facts about transformers (4.50 to 5): ``ResNetForImageClassification`` has torchvision's networks under other names
(:mod:`fastres.weights.layouts`). ``downsample_in_bottleneck`` moves a stage's stride from its first 3×3 to its first
1×1 convolution, and ``downsample_in_first_stage`` gives the first stage a stride as well. The tensors show neither.
These models use ``ConvNextImageProcessor``, which resizes the short side to ``size / crop_pct`` and crops if ``size``
is below 384.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastres.errors import ArchitectureError, ConfigError
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD

from .config_fields import (
    MOST_BLOCKS,
    MOST_CHANNELS,
    MOST_CLASSES,
    MOST_PIXELS,
    field,
    fields,
    made_transforms,
    shown,
    whole_numbers,
)

PROCESSOR = "preprocessor_config.json"
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}
_CONVNEXT = ("ConvNextImageProcessor", "ConvNextFeatureExtractor")
_WARPS_FROM = 384  # pixels; from this size on ConvNextImageProcessor squashes images instead of cropping them
_HALF = [0.5, 0.5, 0.5]  # transformers' IMAGENET_STANDARD_MEAN and _STD


def parse(config: Mapping[str, Any], source: str) -> tuple[Architecture, tuple[str, ...]]:
    """Return the architecture and the class names.

    Raises ``ArchitectureError`` for a network that fastres does not run, ``ConfigError`` for a contradictory file.
    """
    kind = config.get("model_type")
    if kind != "resnet":
        raise ArchitectureError(
            f"{source} holds a model of type {shown(kind)} ({_classes_of(config)}); fastres runs transformers' "
            "'resnet' and timm's ResNets."
        )
    labels = _labels(config, source)
    return architecture(config, source).with_classes(len(labels)), labels


def _classes_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return ", ".join(map(str, names)) if isinstance(names, list) and names else "no architecture named"


def architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """Return the network that a transformers ``ResNetConfig`` describes: a known model or a new architecture."""
    said = fields(
        config, source, hidden_act="relu", num_channels=3, layer_type="bottleneck", downsample_in_bottleneck=False,
        downsample_in_first_stage=False,
    )  # fmt: skip
    activation, channels, block = said["hidden_act"], said["num_channels"], said["layer_type"]
    if activation != "relu":
        raise ArchitectureError(f"{source} has the activation {shown(activation)}; fastres runs only 'relu'.")
    if channels != 3:
        raise ArchitectureError(f"{source} takes images of {shown(channels)} channels; fastres takes only 3 (RGB).")
    if block not in ("basic", "bottleneck"):
        raise ConfigError(f"{source}: layer_type is {shown(block)}; it must be 'basic' or 'bottleneck'.")
    depths = whole_numbers(config.get("depths", [3, 4, 6, 3]), "depths", source, MOST_BLOCKS)
    sizes = whole_numbers(config.get("hidden_sizes", [256, 512, 1024, 2048]), "hidden_sizes", source, MOST_CHANNELS)
    if len(depths) != len(sizes):
        raise ConfigError(
            f"{source}: depths has {len(depths)} stages, but hidden_sizes has {len(sizes)}; they must be equally long."
        )
    (stem,) = whole_numbers([config.get("embedding_size", 64)], "embedding_size", source, MOST_CHANNELS)
    if block == "bottleneck" and any(size % 4 for size in sizes):
        raise ArchitectureError(f"{source} has bottlenecks of {sizes} channels; fastres runs only multiples of 4.")
    found = Architecture(
        name=f"resnet-{block}-{'-'.join(map(str, depths))}",
        block=block,
        depths=depths,
        widths=tuple(size // 4 for size in sizes) if block == "bottleneck" else sizes,
        stem_widths=(stem,),
        stride_in_1x1=said["downsample_in_bottleneck"] and block == "bottleneck",
        first_stage_stride=2 if said["downsample_in_first_stage"] else 1,
    )
    return next((row for row in ARCHITECTURES.values() if replace(row, name=found.name) == found), found)


def _labels(config: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Return the class names of ``id2label`` in logit order; transformers does not write its default, two labels."""
    table = config.get("id2label")
    if table is None:
        (count,) = whole_numbers([field(config, "num_labels", int, source, 2)], "num_labels", source, MOST_CLASSES)
        return tuple(f"LABEL_{index}" for index in range(count))
    if isinstance(table, dict):
        table = {str(key): name for key, name in table.items()}  # the keys are numbers in a live model's configuration
    if not isinstance(table, dict) or set(table) != {str(index) for index in range(len(table))}:
        raise ConfigError(f"{source}: id2label does not map 0, 1, 2, … to names; save the model again.")
    return tuple(str(table[str(index)]) for index in range(len(table)))


def of_processor(value: Any) -> Any:
    """Return the transforms of an image processor of transformers; any other ``value`` as it is.

    Raises ``ConfigError`` if fastres's transforms cannot do the same.
    """
    described = getattr(value, "to_dict", None)
    if not callable(described) or not hasattr(value, "image_mean"):
        return value
    config = {key: list(given) if isinstance(given, tuple) else given for key, given in described().items()}
    return transforms(config, f"The {type(value).__name__}")


def transforms(config: Mapping[str, Any], source: str) -> Transforms:
    """Return the transforms that a ``preprocessor_config.json`` describes.

    Raises ``ConfigError`` if fastres's transforms cannot do the same.
    """
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "an image processor")
    convnext = name.startswith(_CONVNEXT)
    needed = {"do_resize": True, "do_rescale": True, "do_convert_grayscale": False, "do_pad": False}
    said = fields(
        config, source, **needed, rescale_factor=1 / 255, resample=3 if convnext else 2, do_center_crop=False,
        do_normalize=True, **({"crop_pct": 224 / 256} if convnext else {}),
    )  # fmt: skip
    for key, wanted in needed.items():
        if said[key] != wanted:
            raise _unsupported(source, f"{name} has {key}={not wanted}")
    if abs(said["rescale_factor"] * 255 - 1) > 1e-6:
        raise _unsupported(source, f"{name} scales pixels by {said['rescale_factor']}, not by 1/255")
    resample, crops = said["resample"], said["do_center_crop"]
    if resample not in _PILLOW_FILTERS:
        raise _unsupported(source, f"{name} resizes with Pillow's filter {resample}, not 2 (bilinear) or 3 (bicubic)")
    if convnext:
        resize, crop = _convnext_sizes(config, said["crop_pct"], crops, source)
    else:
        resize, crop = _sizes(config, name, crops, source)
    colours = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    if said["do_normalize"]:
        mean, std = (_HALF, _HALF) if convnext else (list(IMAGENET_MEAN), list(IMAGENET_STD))
        colours = fields(config, source, image_mean=mean, image_std=std)
    return made_transforms(
        source,
        resize=resize,
        crop=crop,
        mean=tuple(colours["image_mean"]),
        std=tuple(colours["image_std"]),
        interpolation=_PILLOW_FILTERS[resample],
        crop_rounding="down",
    )


def _convnext_sizes(config: Mapping[str, Any], share: float, crops: bool, source: str) -> tuple[int, int]:
    size = _length(config.get("size", 384), "size", "shortest_edge", source)
    if size >= _WARPS_FROM:
        raise _unsupported(
            source, f"ConvNextImageProcessor squashes images to {size}×{size} if the size is {_WARPS_FROM} or more"
        )
    if not 0 < share <= 1:
        raise ConfigError(f"{source}: crop_pct is {share}; it must be above 0 and at most 1.")
    if crops:
        raise _unsupported(source, "ConvNextImageProcessor crops twice (do_center_crop)")
    return int(size / max(share, 1 / MOST_PIXELS)), size


def _sizes(config: Mapping[str, Any], name: str, crops: bool, source: str) -> tuple[int, int]:
    """Return the sizes of a processor that resizes the short side and then crops the centre."""
    if not crops:
        raise _unsupported(source, f"{name} resizes images without cropping them")
    resize = _length(config.get("size"), "size", "shortest_edge", source)
    return resize, _length(config.get("crop_size"), "crop_size", "height", source)


def _length(value: Any, key: str, side: str, source: str) -> int:
    """Return a number of pixels, given as a number, ``{side: …}``, or ``{"height": …, "width": …}`` of a square."""
    if isinstance(value, dict):
        if value.get("height") != value.get("width") or (side == "shortest_edge" and side not in value):
            raise _unsupported(source, f"{key} is {shown(value)}")
        value = value.get(side)
    (length,) = whole_numbers([value], key, source, MOST_PIXELS)
    return length


def _unsupported(source: str, what: str) -> ConfigError:
    return ConfigError(
        f"{source}: {what}. fastres's transforms do not support this. Preprocess the images yourself and load only the "
        "weights: fastres.load(name, weights='…/model.safetensors')."
    )
