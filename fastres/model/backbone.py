"""A network as the backbone of another model: feature maps under the names that detectors and segmenters expect.

:class:`Backbone` stands in for torchvision's ``IntermediateLayerGetter``: the same ``return_layers``, the same
``OrderedDict`` of maps, computed by fastres and no further than the deepest map asked for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError
from fastres.network.folding import BATCH_NORM_EPSILON

from .model import Model, parse_dtype
from .outputs import returned_values, strides_and_channels

# Largest relative difference of a map from the module's own; a wrong layer or weight makes it a thousand times larger.
AGREEMENT = 1e-3


class Backbone(nn.Module):
    """Maps images ``[N, 3, H, W]`` to an ``OrderedDict`` of feature maps ``[N, C, h, w]``, channels-last in memory.

    ``return_layers`` are ``IntermediateLayerGetter``'s: layer → the name that its map is returned under, or a list of
    layers that keep their names; see :meth:`fastres.Model.features` for the layers. ``dtype`` is the maps': float32,
    as the surrounding model computes unless it is converted. ``.half()``, ``.bfloat16()`` and ``.to(dtype)`` on the
    surrounding model convert the maps along with what the network computes in.

    The network stays frozen and in inference: ``train()`` reaches only the layers around it, which can be trained.
    ``channels`` and ``strides`` (input pixels from one cell of a map to the next) are by returned name.
    ``out_channels`` is there where all maps have the same number, which is what ``FasterRCNN`` asks of a backbone
    without a feature pyramid.

    >>> backbone = fastres.Backbone(model, {"layer3": "0", "layer4": "1"})
    >>> pyramid = torchvision.ops.FeaturePyramidNetwork(list(backbone.channels.values()), 256)

    Raises ``ArchitectureError`` for what is no fastres model, ``InputError`` for layers that it does not have and
    ``DtypeError``.
    """

    model: Model
    _like: Tensor

    def __init__(
        self,
        model: Model,
        return_layers: Mapping[str, str] | Sequence[str],
        *,
        dtype: torch.dtype | str = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(model, Model):
            raise ArchitectureError(
                f"Backbone takes a fastres model, from fastres.load or fastres.from_module, and was given "
                f"{type(model).__name__}; Backbone.from_module takes torchvision's IntermediateLayerGetter"
            )
        self.return_layers = return_layers
        self._returned = returned_values(model.outline, return_layers)
        self.strides: dict[str, int] = {}
        self.channels: dict[str, int] = {}
        for name, value in self._returned.items():
            self.strides[name], self.channels[name] = strides_and_channels(model.outline, value)
        if len(set(self.channels.values())) == 1:
            self.out_channels = next(iter(self.channels.values()))
        self.model = model
        # Follows .half() and .to(dtype) of the surrounding model, and has the dtype that maps are returned in.
        self.register_buffer("_like", torch.empty(0, dtype=parse_dtype(dtype), device=model.device), persistent=False)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.model.values(x, self._returned)
        return OrderedDict((name, value.to(self._like.dtype)) for name, value in maps.items())

    def train(self, mode: bool = True) -> Backbone:
        """Note the mode; the network stays in inference, so that the layers around it can be trained."""
        self.training = mode
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Backbone:
        self.model.requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {self.channels[name]} channels, stride {self.strides[name]}" for name in self.channels
        )

    @classmethod
    def from_module(cls, module: nn.Module, *, dtype: torch.dtype | str = "auto") -> Backbone:
        """Make a backbone of a live torchvision ``IntermediateLayerGetter`` over a ResNet: its own weights and layers.

        ``detector.backbone.body = fastres.Backbone.from_module(detector.backbone.body)`` speeds a trained detector up.
        ``dtype`` is what the network computes in, as in :func:`fastres.load`; maps are returned in the module's own.
        Frozen batch norm is read too, with any epsilon. Raises ``ArchitectureError`` for networks that fastres does
        not run (dilated ones are among these) and where both, run on a random batch, differ.
        """
        from .loading import default_transforms, infer_architecture

        layers = getattr(module, "return_layers", None)
        if not isinstance(module, nn.ModuleDict) or not isinstance(layers, Mapping):
            raise ArchitectureError(
                "Backbone.from_module takes torchvision's IntermediateLayerGetter, such as detector.backbone.body, and "
                f"was given {type(module).__name__}; for a whole network, Backbone(from_module(network), layers)"
            )
        own = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())
        network = _with_usual_epsilon(copy.deepcopy(module).float())
        network["fc"] = nn.Identity()
        arch = infer_architecture(network)
        state = {key: value.detach() for key, value in network.state_dict().items()}
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        model = Model(state, arch, transforms=default_transforms(arch), dtype=dtype, weights=f"from {name}")
        backbone = cls(model, layers, dtype=own)
        _check_agreement(module, backbone)
        return backbone


@torch.no_grad()
def _with_usual_epsilon(module: nn.ModuleDict) -> nn.ModuleDict:
    """``module``, changed in place to compute the same with the epsilon that fastres folds: ``σ² + ε`` is kept.

    torchvision's frozen batch norm and its detectors have other ones.
    """
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "running_var") and isinstance(getattr(layer, "eps", None), float):
            layer.running_var.add_(layer.eps - BATCH_NORM_EPSILON)
            layer.eps = BATCH_NORM_EPSILON
    return module


@torch.no_grad()
def _check_agreement(module: nn.Module, backbone: Backbone) -> None:
    """Run both on one small random batch, in float32 on the CPU, and raise where they differ."""
    reference, candidate = copy.deepcopy(module).float().cpu().eval(), copy.deepcopy(backbone).float().cpu()
    x = torch.randn(2, 3, 64, 71, generator=torch.Generator().manual_seed(0))
    expected: Mapping[str, Any] = reference(x)
    found = candidate(x)
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        if not error < AGREEMENT:
            raise ArchitectureError(
                f"{type(module).__name__} cannot be run: its {name!r} is something else than a ResNet's (relative "
                f"difference {error:.2g}, random input)"
            )
