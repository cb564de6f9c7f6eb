"""Checks of a model's input. Each error says what was given, what is accepted and what to do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastres.errors import DeviceError, DtypeError, GradientError, InputError
from fastres.network.architectures import Architecture
from fastres.network.plan import check_image_size
from fastres.text import dtype_name

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def check_input(x: Tensor, arch: Architecture, device: torch.device) -> None:
    """Raise an error unless ``x`` is a batch of images ``[N, 3, H, W]`` for a network of ``arch`` on ``device``.

    Raises ``InputError`` for a wrong type, shape or size, ``DtypeError`` for a dtype other than float32, float16,
    bfloat16 and uint8, ``DeviceError`` for another device, and ``GradientError`` if ``x`` requires grad or is being
    differentiated.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"The model takes a tensor [N, 3, H, W] but was given {type(x).__name__}; "
            "model.predict(...) takes paths, PIL images and arrays"
        )
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(_layout_hint(x))
    if is_transformed(x):
        raise GradientError(
            "The input is being differentiated by torch.func or in forward mode, but fastres computes no derivatives "
            "(its kernels are for inference). Use the torchvision model for this"
        )
    shape = tuple(x.shape)
    if x.dim() != 4 or shape[1] != 3:
        raise InputError(f"The model takes images [N, 3, H, W] but was given {list(shape)}. {_shape_hint(shape)}")
    if x.dtype not in INPUT_DTYPES:
        raise DtypeError(
            f"The model takes float32, float16 or bfloat16 (normalised) or uint8 (raw RGB pixels) but was given "
            f"{dtype_name(x.dtype)}; call x.float() for normalised values, x.to(torch.uint8) for pixels"
        )
    if x.device != device:
        raise DeviceError(
            f"The input is on {x.device}, but the model is on {device}; call x.to({str(device)!r}) "
            f"or model.to({str(x.device)!r})"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "The input requires grad, but fastres computes no gradients (its kernels are for inference). "
            "Pass x.detach(), or call inside torch.no_grad()"
        )
    check_image_size(arch, shape[2], shape[3])


def check_traced(x: Tensor) -> None:
    """Raise an error unless ``x``, of any size, can be the input of a recorded program."""
    if x.dim() != 4 or x.dtype not in INPUT_DTYPES:
        raise InputError(
            f"The model takes images [N, 3, H, W] in float32, float16, bfloat16 or uint8 but was given "
            f"{list(x.shape)} in {dtype_name(x.dtype)}"
        )


def is_transformed(tensor: Tensor) -> bool:
    """Return True if ``torch.func`` has wrapped ``tensor``, or if it carries a forward-mode derivative."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _layout_hint(x: Tensor) -> str:
    if x.is_nested:
        return (
            "The model takes a dense tensor [N, 3, H, W] but was given a nested one. Resize the images to one size and "
            "call torch.stack(x.unbind()), or call the model on each of x.unbind()"
        )
    return f"The model takes a dense tensor [N, 3, H, W] but was given {x.layout}; call x.to_dense()"


def _shape_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[0] == 3:
        return "Add a batch dimension: x[None]"
    if len(shape) == 4 and shape[3] == 3:
        return "It looks like NHWC: pass x.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1] == 1:
        return "Repeat the grey channel: x.expand(-1, 3, -1, -1)"
    if len(shape) == 4 and shape[1] == 4:
        return "Drop the alpha channel: x[:, :3]"
    return "model.predict(...) takes single images of any mode"
