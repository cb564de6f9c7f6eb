"""Check what :func:`fastres.from_module` is given before anything runs: its kind, wrappers, hooks and tensors.

Everything here looks at objects only. :mod:`fastres.model.tracing` looks at what the module computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, WeightsError
from fastres.text import article, dtype_name

ACCEPTED = (
    "fastres.from_module takes the ResNets, ResNeXts and Wide ResNets of torchvision.models and timm, and "
    "transformers' ResNetForImageClassification"
)
# If the user knows that the forward is a ResNet's, the tensors alone are enough.
VOUCH = "If you know that it computes an ordinary ResNet, load its tensors: fastres.load(name, weights=state_dict)"

# Wrappers that call the wrapped module and return its result, by class name, with the attribute that holds it.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
}
_ORIGINAL = "pass the module that it was made from, or load its weights:"
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def refusal(module: object, reason: str, advice: str = "") -> ArchitectureError:
    """Return the error for a module that fastres cannot run."""
    return ArchitectureError(f"{type(module).__name__} cannot be run: {reason}. {ACCEPTED}{advice and f'. {advice}'}")


def unwrapped(module: Any) -> nn.Module:
    """Return the module inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or ``AveragedModel``.

    Raises ``ArchitectureError`` for anything that is not a live module, and for wrappers with hooks of their own.
    """
    while True:
        _check_kind(module)
        kind = type(module)
        inner = _WRAPPERS.get(kind.__name__) if kind.__module__.startswith("torch.") else None
        if inner is None:
            live: nn.Module = module
            return live
        _check_hooks(module, "", module)
        module = getattr(module, inner)


def _check_kind(module: Any) -> None:
    """Raise ``ArchitectureError`` unless ``module`` is a live module that runs as Python code."""
    if isinstance(module, type) and issubclass(module, nn.Module):
        raise _wrong_kind(f"the class {module.__name__}", f"create an instance of it: {module.__name__}(…)")
    if isinstance(module, (str, bytes)) or hasattr(module, "__fspath__"):
        raise _wrong_kind(repr(module), "names, paths and hub ids are for fastres.load")
    if isinstance(module, Mapping):
        raise _wrong_kind(article(module), "load a state dict with fastres.load(name, weights=state_dict)")
    if type(module).__name__ == "ExportedProgram":
        raise _wrong_kind(article(module), f"{_ORIGINAL} fastres.load(name, weights=program.state_dict)")
    if isinstance(module, torch.jit.ScriptModule):
        raise _wrong_kind("a TorchScript module", f"{_ORIGINAL} fastres.load(name, weights=module.state_dict())")
    if isinstance(getattr(module, "model", None), nn.Module):
        processor = ", transforms=pipe.image_processor" if getattr(module, "image_processor", None) is not None else ""
        raise _wrong_kind(article(module), f"pass the module in it: fastres.from_module(pipe.model{processor})")
    if not isinstance(module, nn.Module):
        raise _wrong_kind("None" if module is None else article(module), "pass a module, an nn.Module")
    if any("fsdp" in kind.__module__ for kind in type(module).__mro__):
        raise _wrong_kind("a sharded module (FSDP)", "gather its full state dict and load that with fastres.load")


def _wrong_kind(given: str, advice: str) -> ArchitectureError:
    return ArchitectureError(f"from_module was given {given}, but takes a live ResNet; {advice}")


def check_layers(module: nn.Module) -> None:
    """Raise ``ArchitectureError`` if a layer of ``module`` is not run as its class says, or holds no usable tensors.

    That is the case for hooks, for a ``forward`` that was set on an object, and for weights that are computed from
    others (parametrizations, pruning), scripted, quantised or not initialised yet. Raises ``WeightsError`` for weights
    that are not finite.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise refusal(module, f"{name} is not initialised yet; run the module once on a batch of images")
    for name, layer in module.named_modules():
        _check_layer(module, name, layer)
    try:
        state: dict[str, Any] = module.state_dict(keep_vars=True)
    except Exception as error:  # whatever a state_dict of the module's own raises
        raise refusal(module, f"its state dict cannot be read ({type(error).__name__}: {error})") from error
    for name, tensor in state.items():
        _check_tensor(module, name, tensor)
    devices = {tensor.device for tensor in state.values()}
    if not devices:
        raise refusal(module, "it has no parameters, so it is not a ResNet")
    if torch.device("meta") in devices:
        raise refusal(module, "its tensors are on the meta device, without data; load its weights first")
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise refusal(module, f"its tensors are on several devices ({names}); move it to one: module.to('cpu')")
    for name, tensor in state.items():
        bad = 0 if torch.isfinite(tensor).all() else int((~torch.isfinite(tensor)).sum())
        if bad:
            raise WeightsError(
                f"{type(module).__name__} has {bad} of {tensor.numel()} values in {name} that are NaN or infinite, so "
                "its logits mean nothing. Give it finite weights"
            )
        if name.endswith("running_var") and (tensor < 0).any():
            raise WeightsError(
                f"{type(module).__name__} has negative variances in {name}, so its logits would be NaN. Give it "
                "variances of at least 0"
            )


def _check_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    where = _where(name, layer)
    if isinstance(layer, torch.jit.ScriptModule):
        raise refusal(module, f"{where} is a TorchScript module; pass the model before it was scripted")
    quantized = any("quantized" in kind.__module__.split(".") for kind in type(layer).__mro__)
    if quantized and type(layer).__name__ != "FloatFunctional":  # additions of a network that may be quantized later
        raise refusal(module, f"{where} is quantized; pass the model in floating point, before it was quantized")
    if torch.nn.utils.parametrize.is_parametrized(layer):
        raise refusal(
            module,
            f"{where} computes its weights by a parametrization; bake it in with "
            "torch.nn.utils.parametrize.remove_parametrizations",
        )
    _check_hooks(module, name, layer)
    for attribute, value in vars(layer).items():
        if isinstance(value, (FunctionType, MethodType, partial)) and callable(getattr(type(layer), attribute, None)):
            raise refusal(
                module, f"{where} has its own {attribute}, set on the object: {_name(value)}. Delete it first", VOUCH
            )


def _check_hooks(module: nn.Module, name: str, layer: nn.Module) -> None:
    where = _where(name, layer)
    for attribute, kind in _HOOKS.items():
        hooks = getattr(layer, attribute, None)
        if hooks:
            called = ", ".join(_name(hook) for hook in hooks.values())
            raise refusal(
                module,
                f"{where} has a {kind} ({called}), which can change the result and which fastres would not call. "
                "Remove it first, with handle.remove() or, for pruning and weight norm, with their remove functions",
            )


def _where(name: str, layer: nn.Module) -> str:
    return f"{name or 'the module itself'} ({type(layer).__name__})"


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _check_tensor(module: nn.Module, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise refusal(module, f"its state dict has {article(tensor)} at {name}, but fastres reads only tensors")
    if type(tensor) not in _PLAIN_TENSORS:
        raise refusal(module, f"{name} is a {type(tensor).__name__}, but fastres reads plain tensors")
    if tensor.layout is not torch.strided:
        raise refusal(module, f"{name} is {tensor.layout}; fastres reads dense tensors: tensor.to_dense()")
    if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
        raise refusal(module, f"{name} is {dtype_name(tensor.dtype)}, but fastres reads floating-point weights")
