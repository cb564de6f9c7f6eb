"""What a model derives from its tensors: the device, the outline of its plan, and the executor with folded weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, DeviceError, GradientError, MissingDependencyError
from fastres.executors import cpu, cpu_int8
from fastres.extras import install
from fastres.forks import Guard
from fastres.network.architectures import Architecture
from fastres.network.plan import LOGITS, Plan
from fastres.weights.fitting import COUNTER, misfits

from .changes import Stamp
from .inputs import is_transformed
from .parameters import Parameters

_LISTED = 4  # names in a message, of each kind


class Executor(Protocol):
    """Runs a plan: one of the executors of :mod:`fastres.executors`."""

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]: ...


@dataclass(eq=False)
class Derived:
    """What belongs to the tensors that a model had at ``stamp``. ``executor`` is built when it is first needed."""

    stamp: Stamp
    device: torch.device
    dtype: torch.dtype
    outline: Plan
    executor: Executor | None = None
    guard: Guard = field(default_factory=Guard)


def check_device(device: torch.device) -> None:
    """Raise ``DeviceError`` if fastres has no executor for this type of device.

    Raise ``MissingDependencyError`` if its kernels cannot be compiled.
    """
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(
            f"The device is {str(device)!r}, but fastres runs only on 'cpu' and 'cuda' devices; use one of these"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MissingDependencyError(
            "Kernels for a GPU need Triton, which is not installed. CUDA builds of torch bring it; otherwise: "
            f"{install('triton')}"
        )


def make_executor(plan: Plan, device: torch.device) -> Executor:
    """Return the executor of ``plan``, whose weights are on ``device``."""
    if plan.quantisation is not None:
        return cpu_int8.Int8Executor(plan)
    if device.type == "cpu":
        return cpu.CpuExecutor(plan)
    from fastres.executors.gpu import GpuExecutor
    from fastres.executors.graphs import GraphExecutor, Pool
    from fastres.kernels.routing.without import left_out

    runner = GpuExecutor(plan)
    torch.cuda.current_stream(device).synchronize()  # other streams may now read the weights
    return runner if "graphs" in left_out() else GraphExecutor(runner, Pool(device))


def check_can_fold(device: torch.device, dtype: torch.dtype) -> None:
    """Raise an error if weights on ``device`` cannot be folded and run in ``dtype`` now."""
    check_device(device)
    if device.type == "cpu":
        cpu.check_dtype(torch.float32 if dtype == torch.int8 else dtype)
    elif torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            "A model's first call folds and packs its weights, which a CUDA graph cannot capture: call "
            "model.warmup(...), or the model on a batch of this shape, before the capture, and again after a change of "
            "the weights"
        )


def check_tensors(module: nn.Module, state: Mapping[str, Tensor], arch: Architecture, device: torch.device) -> None:
    """Raise an error unless ``state``, of a model ``module``, holds the tensors of ``arch`` on ``device``.

    Raises ``ArchitectureError`` for missing, additional or wrongly shaped tensors and for layers of other classes,
    ``DeviceError`` for tensors on other devices, and ``GradientError`` for tensors that ``torch.func`` or forward-mode
    differentiation has wrapped.
    """
    tensors = {key: tensor for key, tensor in state.items() if not key.endswith(COUNTER)}
    for key, tensor in tensors.items():
        if tensor.device != device:
            raise DeviceError(
                f"The model's tensors are on several devices: {key} is on {tensor.device}, others on {device}. "
                f"Move the whole model: model.to({str(device)!r})"
            )
    foreign = [name for name, node in module.named_modules() if name and not isinstance(node, Parameters)]
    wrong = {"of another class": foreign, **misfits(tensors, arch)}
    wrong["additional"] = wrong.pop("unexpected", [])  # the user added them
    problems = [_listed(kind, names) for kind, names in wrong.items() if names]
    if problems:
        raise ArchitectureError(
            f"The model's tensors are no longer those of {arch.name}: {'; '.join(problems)}. fastres runs a fixed "
            "plan. Undo the change, or change the torchvision model (make pruning and parametrisations permanent) and "
            "use fastres.from_module"
        )
    for key, tensor in tensors.items():
        if is_transformed(tensor):
            raise GradientError(
                f"torch.func or forward-mode differentiation has wrapped {key}, but fastres computes no derivatives "
                "and runs one set of weights at a time. Use the torchvision model for this"
            )


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{more})"
