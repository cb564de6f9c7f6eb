"""How a model appears to PyTorch's compilers and tracers.

``torch.compile`` records one op, ``fastres::run``, which finds its model by a key. Keys are random: in another process
a key finds no model, and the op raises an error instead of running some other model. ``torch.vmap`` maps the same op
over one larger batch. Programs that leave the process (``torch.export``, ``torch.jit.trace``, ``torch.fx``,
``make_fx``) hold the network in PyTorch's own operations instead, see :mod:`fastres.model.plain`.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastres.errors import FastresError, GradientError


class Compilable(Protocol):
    """The methods of :class:`fastres.Model` that compiled code calls."""

    def _run(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]: ...
    def _empty(
        self, shape: Sequence[int], outputs: tuple[str, ...], device: torch.device | None = None
    ) -> list[Tensor]: ...


_models: weakref.WeakValueDictionary[str, Compilable] = weakref.WeakValueDictionary()

# The tag keeps the op out of Inductor's own CUDA graphs (mode="reduce-overhead"). Inside one, a model's first calls
# would put its weights, or memory that its own graphs read, into a pool that Inductor reuses.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def register(model: Compilable) -> str:
    """Return a key by which compiled code finds ``model``, as long as the model exists, in this process alone."""
    key = secrets.token_hex(16)
    _models[key] = model
    return key


def run(x: Tensor, key: str, outputs: Sequence[str]) -> list[Tensor]:
    """Call the op: run the model of ``key`` on ``x``. Raise ``FastresError`` if there is no such model."""
    return torch.ops.fastres.run(x, key, ",".join(outputs))


def without_gradient(x: Tensor) -> Tensor:
    """Return ``x``. If it requires grad, compiled code raises ``GradientError`` when it runs."""
    if x.requires_grad and torch.is_grad_enabled():
        return torch.ops.fastres.refuse_gradient(x).detach()
    return x


def is_recorded(x: Any) -> bool:
    """Return True if ``torch.jit.trace``, ``torch.fx`` or ``make_fx`` is recording the call on ``x``."""
    if torch._C._is_tracing() or isinstance(x, fx.Proxy):
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None


def needs_op(x: Any) -> bool:
    """Return True if the call on ``x`` must be one op: under ``torch.vmap``, and for tensors without data."""
    return isinstance(x, Tensor) and (torch._C._functorch.is_batchedtensor(x) or isinstance(x, FakeTensor))


def _find(key: str) -> Compilable:
    try:
        return _models[key]
    except KeyError:
        raise FastresError(
            "Compiled code calls a fastres model that no longer exists, was moved or replaced, or belongs to another "
            "process; compile again with this process's model. torch.export.export(model, …) makes a program that "
            "holds its own weights"
        ) from None


@torch.library.custom_op("fastres::run", mutates_args=(), tags=_TAGS)
def _run_op(x: Tensor, key: str, outputs: str) -> list[Tensor]:
    return _find(key)._run(x, tuple(outputs.split(",")))


@_run_op.register_fake
def _(x: Tensor, key: str, outputs: str) -> list[Tensor]:
    return _find(key)._empty(x.shape, tuple(outputs.split(",")), x.device)


@_run_op.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, key: str, outputs: str) -> tuple[list[Tensor], list[int]]:
    """Run a batch of batches as one batch."""
    x = x.movedim(in_dims[0], 0)  # type: ignore[arg-type]
    results = torch.ops.fastres.run(x.flatten(0, 1), key, outputs)
    return [result.unflatten(0, x.shape[:2]) for result in results], [0] * len(results)


@torch.library.custom_op("fastres::refuse_gradient", mutates_args=(), tags=_TAGS)
def _refuse_gradient(x: Tensor) -> Tensor:
    raise GradientError(
        "The input requires grad, but fastres computes no gradients (its kernels are for inference). "
        "Pass x.detach(), or call inside torch.no_grad()"
    )


@_refuse_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_refuse_gradient.register_autograd(lambda context, gradient: gradient)
