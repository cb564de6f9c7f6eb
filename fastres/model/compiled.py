"""Support for ``torch.compile``: the whole network is one registered op, ``fastres::run``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastres.errors import FastresError


class Compilable(Protocol):
    """The methods of :class:`fastres.Model` that compiled code calls."""

    def _run(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]: ...
    def _empty(
        self, shape: Sequence[int], outputs: tuple[str, ...], device: torch.device | None = None
    ) -> list[Tensor]: ...


_models: weakref.WeakValueDictionary[int, Compilable] = weakref.WeakValueDictionary()
_handles = iter(range(1, 1 << 62))

# The tag keeps the op out of Inductor's own CUDA graphs (mode="reduce-overhead"). Inside one, a model's first calls
# would put its weights, or memory that its own graphs read, into a pool that Inductor reuses.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


def register(model: Compilable) -> int:
    """Return a number by which compiled code finds ``model``, as long as the model exists and is unchanged."""
    handle = next(_handles)
    _models[handle] = model
    return handle


def run(x: Tensor, handle: int, outputs: Sequence[str]) -> list[Tensor]:
    """Call the op: run the model of ``handle`` on ``x``. Raise ``FastresError`` if that model no longer exists."""
    return torch.ops.fastres.run(x, handle, ",".join(outputs))


def _find(handle: int) -> Compilable:
    try:
        return _models[handle]
    except KeyError:
        raise FastresError(
            "Compiled code calls a fastres model that no longer exists or was changed; compile again after loading, "
            "moving or replacing the model"
        ) from None


@torch.library.custom_op("fastres::run", mutates_args=(), tags=_TAGS)
def _run_op(x: Tensor, handle: int, outputs: str) -> list[Tensor]:
    return _find(handle)._run(x, tuple(outputs.split(",")))


@_run_op.register_fake
def _(x: Tensor, handle: int, outputs: str) -> list[Tensor]:
    return _find(handle)._empty(x.shape, tuple(outputs.split(",")), x.device)
