"""``fastres.from_module``: create a model from a live module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import DtypeError
from fastres.network.plan import LOGITS, POOLED
from fastres.text import dtype_name
from fastres.weights import timm_config
from fastres.weights.layouts import to_torchvision

from .agreement import check, reference_copy, undisturbed
from .loading import default_transforms
from .model import COMPUTE_DTYPES, Model
from .modules import VOUCH, check_layers, refusal, unwrapped
from .reading import read


def from_module(module: nn.Module, *, dtype: torch.dtype | str = "auto") -> Model:
    """Convert a live ResNet from torchvision, timm or transformers, with its weights, number of classes and device.

    The structure is read from the module's layers, or from a transformers model's configuration, so custom depths,
    widths and classifiers work. Then a copy of the module runs on a few random batches. The operations that it runs
    must be exactly those of the network, on its own tensors, and its results must agree with fastres's. A module in
    training mode is converted as it would be after ``eval()``, and does not change. ``torch.compile``,
    ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel`` around it are taken off.

    ``dtype`` is the dtype of the computation. ``"auto"`` is that of :func:`fastres.load` for a float32 module, and
    otherwise the module's own. The preprocessing of a timm model and the class names of a transformers model are kept.

    Raises ``ArchitectureError``, with the reason, if fastres cannot run the module: another network, another
    ``forward``, hooks, a ``forward`` set on an object, parametrized or quantized layers, branches that depend on the
    values of the image, tensors on several devices or on the meta device, and things that are no live module. Raises
    ``WeightsError`` for weights that are not finite, and ``DtypeError``.
    """
    module = unwrapped(module)
    if isinstance(module, Model):
        return module
    with undisturbed():
        check_layers(module)
        arch, labels = read(module)
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        state = {key: value.detach().clone() for key, value in module.state_dict().items()}
        floats = {k: v.float() if v.is_floating_point() else v for k, v in to_torchvision(state, arch).items()}
        config = getattr(module, "pretrained_cfg", None)
        transforms = timm_config.transforms(config, name) if isinstance(config, dict) else default_transforms(arch)
        model = Model(
            floats,
            arch,
            transforms=transforms,
            categories=labels,
            dtype=_dtype(module, dtype),
            weights=f"from {name}",
        )
        _check_agreement(module, model)
    return model


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
