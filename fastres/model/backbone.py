"""A network as the backbone of another model: feature maps under the names that detectors and segmenters expect.

:class:`Backbone` replaces torchvision's ``IntermediateLayerGetter``. It takes the same ``return_layers`` and returns
the same ``OrderedDict`` of maps. fastres computes them and stops after the deepest requested map.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError
from fastres.folding.build import BATCH_NORM_EPSILON

from .agreement import check, reference_copy, undisturbed
from .loading import default_transforms
from .model import Model, parse_dtype
from .modules import VOUCH, check_layers, refusal
from .outputs import returned_values, strides_and_channels
from .reading import infer_architecture


class Backbone(nn.Module):
    """Maps images ``[N, 3, H, W]`` to an ``OrderedDict`` of feature maps ``[N, C, h, w]``, channels-last in memory.

    ``return_layers`` works as in ``IntermediateLayerGetter``: a mapping from layers to the names of the returned maps,
    or a list of layers, which keep their names. :meth:`fastres.Model.features` lists the layers. ``dtype`` is the dtype
    of the maps. The default is float32, the usual dtype of the surrounding model. ``.half()``, ``.bfloat16()`` and
    ``.to(dtype)`` on the surrounding model change both the dtype of the maps and the dtype of the computation.

    The network stays frozen and in inference mode. ``train()`` affects only the layers around it, which can be trained.
    ``channels`` and ``strides`` (input pixels from one cell of a map to the next) are keyed by returned name.
    ``out_channels`` exists if all maps have the same number of channels. ``FasterRCNN`` needs it from a backbone
    without a feature pyramid.

    >>> backbone = fastres.Backbone(model, {"layer3": "0", "layer4": "1"})
    >>> pyramid = torchvision.ops.FeaturePyramidNetwork(list(backbone.channels.values()), 256)

    Raises ``ArchitectureError`` if ``model`` is not a fastres model, ``InputError`` for layers that it does not have,
    and ``DtypeError`` for an unsupported dtype.
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
                "Backbone takes a fastres model, from fastres.load or fastres.from_module, but was given "
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
        # This buffer follows .half() and .to(dtype) of the surrounding model. Its dtype is the dtype of the maps.
        self.register_buffer("_like", torch.empty(0, dtype=parse_dtype(dtype), device=model.device), persistent=False)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.model.values(x, self._returned)
        return OrderedDict((name, value.to(self._like.dtype)) for name, value in maps.items())

    def train(self, mode: bool = True) -> Backbone:
        """Store the mode. The network stays in inference mode, so the layers around it can be trained."""
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
        """Convert a torchvision ``IntermediateLayerGetter`` over a ResNet, with its weights and layers.

        ``detector.backbone.body = fastres.Backbone.from_module(detector.backbone.body)`` speeds up a trained detector.
        ``dtype`` is the dtype of the computation, as in :func:`fastres.load`. The maps have the module's dtype.
        Frozen batch norm is supported, with any epsilon. Raises ``ArchitectureError`` for networks that fastres does
        not run, such as dilated ones, and if the results of the two differ on a random batch.
        """
        layers = getattr(module, "return_layers", None)
        if not isinstance(module, nn.ModuleDict) or not isinstance(layers, Mapping):
            raise ArchitectureError(
                "Backbone.from_module takes torchvision's IntermediateLayerGetter, such as detector.backbone.body, but "
                f"was given {type(module).__name__}; for a whole network use Backbone(from_module(network), layers)"
            )
        with undisturbed():
            check_layers(module)
            own = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())
            network = _with_usual_epsilon(copy.deepcopy(module).float())
            network["fc"] = nn.Identity()
            arch = infer_architecture(network)
            state = {key: value.detach() for key, value in network.state_dict().items()}
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            model = Model(state, arch, transforms=default_transforms(arch), dtype=dtype, weights=f"from {name}")
            backbone = cls(model, layers, dtype=own)
            _check_agreement(module, network, backbone)
        return backbone


@torch.no_grad()
def _with_usual_epsilon(module: nn.ModuleDict) -> nn.ModuleDict:
    """Give the batch norms of ``module`` the epsilon that fastres folds, in place, and return it.

    The variances change so that ``σ² + ε``, and with it the result, stays the same. torchvision's frozen batch norm and
    its detectors use other epsilons.
    """
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "running_var") and isinstance(getattr(layer, "eps", None), float):
            layer.running_var.add_(layer.eps - BATCH_NORM_EPSILON)
            layer.eps = BATCH_NORM_EPSILON
    return module


def _check_agreement(module: nn.Module, network: nn.ModuleDict, backbone: Backbone) -> None:
    """Raise ``ArchitectureError`` unless ``network``, which is ``module`` with the usual epsilon, gives the same maps.

    The scales of the copy that become one (:func:`reference_copy`) become one in fastres's too.
    """
    twin = reference_copy(network)
    candidate = copy.deepcopy(backbone).float().cpu()
    candidate.model.load_state_dict(twin.state_dict(), strict=False)
    values = backbone._returned

    def results(output: Any) -> Mapping[str, Tensor]:
        if not isinstance(output, Mapping) or set(output) != set(values):
            raise refusal(module, f"its forward returns a {type(output).__name__} instead of its maps", VOUCH)
        return {values[name]: output[name] for name in values}

    def ours(x: Tensor) -> Mapping[str, Tensor]:
        return {values[name]: value for name, value in candidate(x).items()}

    check(module, twin, backbone.model.architecture, results, ours)
