"""Read timm's ``config.json``: the architecture, its preprocessing and its class names.

In timm 1.0, the plain ResNets, ResNeXts and Wide ResNets have torchvision's names and compute the same function. The
variants with anti-aliasing (``resnetaa…``, ``resnetblur…``) have the same names and shapes, but compute a different
function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastres.errors import ArchitectureError, ConfigError, near_matches
from fastres.images import categories
from fastres.images.transforms import Transforms
from fastres.network.architectures import ARCHITECTURES, Architecture
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD

from .config_fields import MOST_CLASSES, MOST_PIXELS, field, made_transforms, shown, whole_numbers

# Anti-aliasing filters before strides (Zhang, ICML 2019) have no parameters, so the tensors do not show them.
_ANTI_ALIASED = re.compile(r"(?:^|[^a-z])(?:se|eca)?resne(?:x)?t(aa|blur)\d+", re.IGNORECASE)
_OLD_NAME = re.compile(r"(?:tv|ssl|swsl|ig|gluon)_(?P<name>.+?)(?:_v1(?P<variant>[bcds]))?")
# Model arguments that affect only training or saving, not the outputs.
_NEUTRAL = {"num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last", "pretrained"}
_SAME = {"in_chans": (3,), "output_stride": (32,), "global_pool": ("avg",)}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Return True if a ``config.json`` was written by timm or by transformers' TimmWrapper."""
    return "architecture" in config


def anti_aliasing(name: str) -> str | None:
    """Return the kind of anti-aliasing filter in timm's network ``name``, or ``None`` if it has none."""
    found = _ANTI_ALIASED.search(name)
    if found is None:
        return None
    return "an average pool" if found[1].lower() == "aa" else "a blur filter"


def refuse_anti_aliasing(name: str, source: str) -> None:
    """Raise ``ArchitectureError`` if ``name`` is an anti-aliased network: its tensors look like a plain ResNet's."""
    filter_ = anti_aliasing(name)
    if filter_ is not None:
        raise ArchitectureError(
            f"{source} holds timm's {name}. Its tensors have the names and shapes of a plain ResNet, but the network "
            f"has {filter_} before each stride, so its logits differ. fastres cannot run it; use timm."
        )


def parse(config: Mapping[str, Any], source: str) -> tuple[Architecture, Transforms, tuple[str, ...] | None]:
    """Return the architecture, the transforms (timm's, for its default size, not its test size) and the class names.

    Raises ``ArchitectureError`` for a network that fastres does not run, ``ConfigError`` for a contradictory file.
    """
    name = field(config, "architecture", str, source)
    pretrained = field(config, "pretrained_cfg", dict, source, dict(config))
    arch = architecture(name, source)
    _check_arguments(config, name, source)
    classes = field(config, "num_classes", int, source, field(pretrained, "num_classes", int, source, 1000))
    if not 0 <= classes <= MOST_CLASSES:
        raise ConfigError(
            f"{source}: num_classes is {shown(classes)} in its configuration; it must be 0 or more, and at most "
            f"{MOST_CLASSES:,}."
        )
    arch = arch.with_classes(classes)
    return arch, transforms(pretrained, source), _class_names({**pretrained, **config}, arch.num_classes, source)


def architecture(name: str, source: str) -> Architecture:
    """Return the architecture for timm's model ``name``, given with or without its tag (``"resnet50.a1_in1k"``)."""
    plain = name.partition(".")[0]
    refuse_anti_aliasing(plain, source)
    old = _OLD_NAME.fullmatch(plain)
    if old is not None:
        plain = old["name"] + (old["variant"] or "").replace("b", "")
    if plain not in ARCHITECTURES:
        raise ArchitectureError(
            f"{source} holds timm's {name}, which fastres does not run.{near_matches(plain, ARCHITECTURES)} "
            "fastres.list_models() lists the models that it runs."
        )
    return ARCHITECTURES[plain]


def _check_arguments(config: Mapping[str, Any], name: str, source: str) -> None:
    arguments = list(field(config, "model_args", dict, source, {}).items())
    for key, value in (*arguments, ("global_pool", config.get("global_pool"))):
        if key in _NEUTRAL or value is None or value in _SAME.get(key, ()):
            continue
        raise ArchitectureError(
            f"{source} holds timm's {name} with {key}={shown(value)}, but fastres runs it only with timm's defaults "
            f"({', '.join(f'{key}={values[0]!r}' for key, values in _SAME.items())})."
        )


def transforms(config: Mapping[str, Any], source: str) -> Transforms:
    """Return the transforms that timm uses for a ``pretrained_cfg``, with its documented defaults for absent fields."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    size = field(config, "input_size", list, source, [3, 224, 224])
    if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise ConfigError(
            f"{source}: input_size is {shown(size)}; fastres supports square RGB images, [3, size, size]."
        )
    _, crop, _ = whole_numbers(size, "input_size", source, MOST_PIXELS)
    mode = field(config, "crop_mode", str, source, "center")
    if mode != "center":
        raise ConfigError(f"{source}: crop_mode is {shown(mode)}; fastres supports only 'center'.")
    crop_pct = field(config, "crop_pct", float, source, 0.875)
    if not 0 < crop_pct <= 1:
        raise ConfigError(f"{source}: crop_pct is {crop_pct}; it must be above 0 and at most 1.")
    return made_transforms(
        source,
        resize=math.floor(crop / max(crop_pct, 1 / MOST_PIXELS)),
        crop=crop,
        mean=tuple(field(config, "mean", list, source, list(IMAGENET_MEAN))),
        std=tuple(field(config, "std", list, source, list(IMAGENET_STD))),
        interpolation=field(config, "interpolation", str, source, "bicubic"),
    )


def _class_names(config: Mapping[str, Any], classes: int, source: str) -> tuple[str, ...] | None:
    """Return the class names in the order of the logits: the file's own, or ImageNet's if the tag ends in in1k.

    A name is replaced by its description if the file has one.
    """
    names = config.get("label_names")
    if names is None:
        tag = str(config.get("tag") or "")
        return categories.load("imagenet") if classes == 1000 and tag.endswith("in1k") else None
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        count = len(names) if isinstance(names, list) else type(names).__name__
        raise ConfigError(
            f"{source}: label_names must be {classes} names, one for each class; the configuration has {count}."
        )
    descriptions = field(config, "label_descriptions", dict, source, {})
    return tuple(str(descriptions.get(name, name)) for name in names)
