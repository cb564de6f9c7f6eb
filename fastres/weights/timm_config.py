"""timm's ``config.json``: which network it is, its preprocessing and its class names.

Facts about timm (1.0): the plain ResNets, ResNeXts and Wide ResNets have torchvision's names and function; the variants
with anti-aliasing (``resnetaa…``, ``resnetblur…``) have the same names and shapes as well, and another function.
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
from fastres.network.folding import IMAGENET_MEAN, IMAGENET_STD

from .config_fields import field

# What a checkpoint's tensors do not show: anti-aliasing filters before strides (Zhang, ICML 2019) have no parameters.
_ANTI_ALIASED = re.compile(r"(?:^|[^a-z])(?:se|eca)?resne(?:x)?t(aa|blur)\d+", re.IGNORECASE)
_OLD_NAME = re.compile(r"(?:tv|ssl|swsl|ig|gluon)_(?P<name>.+?)(?:_v1(?P<variant>[bcds]))?")
# Arguments of the model that change how it is trained or saved, not what it computes.
_NEUTRAL = {"num_classes", "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last", "pretrained"}
_SAME = {"in_chans": (3,), "output_stride": (32,), "global_pool": ("avg",)}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's, as timm itself or transformers' TimmWrapper wrote it."""
    return "architecture" in config


def anti_aliasing(name: str) -> str | None:
    """What stands before the strides of the network called ``name``, where it is one that fastres must not run."""
    found = _ANTI_ALIASED.search(name)
    if found is None:
        return None
    return "an average pool" if found[1].lower() == "aa" else "a blur filter"


def refuse_anti_aliasing(name: str, source: str) -> None:
    """Raise ``ArchitectureError`` where ``name`` is that of a network whose tensors are a plain ResNet's."""
    filter_ = anti_aliasing(name)
    if filter_ is not None:
        raise ArchitectureError(
            f"{source} holds timm's {name}: the names and shapes of its tensors are a plain ResNet's, but it has "
            f"{filter_} before each stride, so that its logits are others. fastres does not run it; timm does."
        )


def parse(config: Mapping[str, Any], source: str) -> tuple[Architecture, Transforms, tuple[str, ...] | None]:
    """Architecture, transforms (timm's own for its default, not its test, size) and class names.

    Raises ``ArchitectureError`` for a network that fastres does not run, ``ConfigError`` for a contradictory file.
    """
    name = field(config, "architecture", str, source)
    pretrained = field(config, "pretrained_cfg", dict, source, dict(config))
    arch = architecture(name, source)
    _check_arguments(config, name, source)
    classes = field(config, "num_classes", int, source, field(pretrained, "num_classes", int, source, 1000))
    if classes < 0:
        raise ConfigError(f"{source}: num_classes is {classes} in its configuration.")
    arch = arch.with_classes(classes)
    return arch, transforms(pretrained, source), _class_names({**pretrained, **config}, arch.num_classes, source)


def architecture(name: str, source: str) -> Architecture:
    """fastres's row for timm's model ``name``, with or without its tag (``"resnet50.a1_in1k"``)."""
    plain = name.partition(".")[0]
    refuse_anti_aliasing(plain, source)
    old = _OLD_NAME.fullmatch(plain)
    if old is not None:
        plain = old["name"] + (old["variant"] or "").replace("b", "")
    if plain not in ARCHITECTURES:
        raise ArchitectureError(
            f"{source} holds timm's {name}, which fastres does not run.{near_matches(plain, ARCHITECTURES)} "
            "fastres.list_models() lists what it runs."
        )
    return ARCHITECTURES[plain]


def _check_arguments(config: Mapping[str, Any], name: str, source: str) -> None:
    arguments = list(field(config, "model_args", dict, source, {}).items())
    for key, value in (*arguments, ("global_pool", config.get("global_pool"))):
        if key in _NEUTRAL or value is None or value in _SAME.get(key, ()):
            continue
        raise ArchitectureError(
            f"{source} holds timm's {name} made with {key}={value!r}, and fastres runs it with timm's defaults only "
            f"({', '.join(f'{key}={values[0]!r}' for key, values in _SAME.items())})."
        )


def transforms(config: Mapping[str, Any], source: str) -> Transforms:
    """What timm makes of a ``pretrained_cfg``: its documented defaults where a field is absent."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    size = field(config, "input_size", list, source, [3, 224, 224])
    if len(size) != 3 or size[0] != 3 or size[1] != size[2]:
        raise ConfigError(f"{source}: input_size is {size!r}; fastres takes square RGB images, [3, size, size].")
    mode = field(config, "crop_mode", str, source, "center")
    if mode != "center":
        raise ConfigError(f"{source}: crop_mode is {mode!r}; fastres crops the centre of images, 'center'.")
    crop_pct = field(config, "crop_pct", float, source, 0.875)
    if not 0 < crop_pct <= 1:
        raise ConfigError(f"{source}: crop_pct is {crop_pct}; a share above 0 and up to 1 is expected.")
    return Transforms(
        resize=math.floor(size[1] / crop_pct),
        crop=size[1],
        mean=tuple(field(config, "mean", list, source, list(IMAGENET_MEAN))),
        std=tuple(field(config, "std", list, source, list(IMAGENET_STD))),
        interpolation=field(config, "interpolation", str, source, "bicubic"),  # type: ignore[arg-type]
    )


def _class_names(config: Mapping[str, Any], classes: int, source: str) -> tuple[str, ...] | None:
    """Names in the order of the logits: the file's own, with its descriptions, or ImageNet's where its tag says so."""
    names = config.get("label_names")
    if names is None:
        tag = str(config.get("tag") or "")
        return categories.load("imagenet") if classes == 1000 and tag.endswith("in1k") else None
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        count = len(names) if isinstance(names, list) else type(names).__name__
        raise ConfigError(f"{source}: label_names are not {classes} names, one for each class, but {count}.")
    descriptions = field(config, "label_descriptions", dict, source, {})
    return tuple(str(descriptions.get(name, name)) for name in names)
