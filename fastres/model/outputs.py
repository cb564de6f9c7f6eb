"""Map layer names to values of a plan. The names are those of ``IntermediateLayerGetter``, if the layer exists here.

The stem's convolution, batch norm, ReLU and max-pool are one step, so only the output of the last of them has a name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from fastres.errors import InputError, near_matches
from fastres.network.plan import POOLED, Plan

_INSIDE_THE_STEM = ("conv1", "bn1", "relu", "maxpool")
_PROBE = 256  # pixels; a multiple of every stride, so that sizes divide exactly


def layer_values(plan: Plan) -> dict[str, str]:
    """Return a dictionary from layer names to values of the plan, in the network's order.

    torchvision calls the stem's output ``maxpool`` or ``relu``.
    """
    last = "relu" if plan.architecture.stem == "cifar" else "maxpool"
    return {last: plan.features["stem"], **plan.features, "avgpool": POOLED}


def returned_values(plan: Plan, return_layers: Mapping[str, str] | Sequence[str] | None) -> OrderedDict[str, str]:
    """Return a dictionary from returned names to values of the plan, in the network's order.

    ``None`` selects the stem and each stage. Raises ``InputError`` if ``return_layers`` is empty, names an unknown
    layer, or gives two layers the same returned name.
    """
    if return_layers is None:
        return OrderedDict(plan.features)
    if isinstance(return_layers, str):
        return_layers = [return_layers]
    names = return_layers if isinstance(return_layers, Mapping) else {layer: layer for layer in return_layers}
    known = layer_values(plan)
    for layer in names:
        if layer not in known:
            raise InputError(_unknown(plan, str(layer), list(known)))
    returned = OrderedDict((names[layer], value) for layer, value in known.items() if layer in names)
    if not names or len(returned) < len(names):
        problem = "names no layer" if not names else f"returns two layers under one name: {dict(names)}"
        raise InputError(f"return_layers {problem}; pass a mapping from layers to names, such as {{'layer4': 'out'}}")
    return returned


def strides_and_channels(plan: Plan, value: str) -> tuple[int, int]:
    """Return the stride of a value (input pixels from one cell to the next) and its number of channels.

    The pooled value has a single cell and stride 0.
    """
    if value == POOLED:
        return 0, plan.architecture.features
    _, height, _, channels = plan.shapes(1, _PROBE, _PROBE)[value]
    return _PROBE // height, channels


def _unknown(plan: Plan, layer: str, known: Sequence[str]) -> str:
    accepted = f"{plan.architecture.name} has {', '.join(known)}"
    if layer in _INSIDE_THE_STEM:
        return f"{layer!r} is computed inside the stem's kernel and cannot be returned; {accepted}"
    return f"No layer is called {layer!r}.{near_matches(layer, known)} {accepted}"
