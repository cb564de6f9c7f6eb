"""Translate other libraries' names in a flat state dict (:mod:`fastres.weights.wrapping`) to torchvision's.

This module does not look at tensor values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor

from fastres.network.architectures import Architecture, state_dict_shapes

from .wrapping import renamed


@dataclass(frozen=True)
class Layout:
    """A naming scheme: regular expressions that turn its keys into torchvision's names, applied in order."""

    name: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

    def rename(self, key: str) -> str:
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def _transformers_conv(match: re.Match[str]) -> str:
    """Rename ``stages.S.layers.L.layer.I.convolution``; stages and convolutions count from 0, torchvision's from 1."""
    kind = "conv" if match["part"] == "convolution" else "bn"
    return f"layer{int(match['stage']) + 1}.{match['block']}.{kind}{int(match['index']) + 1}."


# The enclosing modules' names are optional: headless models have no "resnet.", and "encoder." is stripped as a prefix.
_STAGE = r"^(?:resnet\.)?(?:encoder\.)?stages\.(?P<stage>\d{1,3})\.layers\.(?P<block>\d{1,4})\."
_TRANSFORMERS = (
    (r"^(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"^(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (_STAGE + r"layer\.(?P<index>\d{1,3})\.(?P<part>convolution|normalization)\.", _transformers_conv),
    (_STAGE + r"shortcut\.convolution\.", lambda m: f"layer{int(m['stage']) + 1}.{m['block']}.downsample.0."),
    (_STAGE + r"shortcut\.normalization\.", lambda m: f"layer{int(m['stage']) + 1}.{m['block']}.downsample.1."),
    (r"^classifier\.1\.", "fc."),
)

LAYOUTS = (
    Layout("torchvision", ()),
    Layout("transformers", _TRANSFORMERS),
    Layout("CIFAR training codes", ((r"^linear\.", "fc."), (r"\.shortcut\.(\d+)\.", r".downsample.\1."))),
    Layout("pretrainedmodels", ((r"^last_linear\.", "fc."),)),
)


def to_torchvision(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Return ``state`` under torchvision's names, using the layout that explains most of ``arch``'s parameters.

    Unknown keys are kept, so that the check against the architecture can name them.
    """
    return recognise(state, state_dict_shapes(arch).keys())[1]


def recognise(state: Mapping[str, Tensor], wanted: Set[str]) -> tuple[Layout, dict[str, Tensor]]:
    """Return the layout that turns the names in ``state`` into most of ``wanted``, and ``state`` renamed by it."""
    candidates = [(layout, renamed(state, layout.rename)) for layout in LAYOUTS]
    possible = [(layout, names) for layout, names in candidates if names is not None]
    return max(possible, key=lambda candidate: len(wanted & candidate[1].keys()))
