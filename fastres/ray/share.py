"""The share of the machine that this process may use: what Ray has assigned to it, or everything outside Ray."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

import torch

from fastres.errors import DeviceError
from fastres.executors.quota import suitable_threads
from fastres.model.loading import parse_device


@dataclass(frozen=True)
class Share:
    """``cpus`` is the number of cores and ``gpus`` that of GPUs, as Ray counts them: 0.5 is half of one."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """The number of threads that suits the cores, at least 1."""
        return max(1, math.floor(self.cpus))


def assigned() -> Share | None:
    """Return what Ray has assigned to the actor or task that this process runs, or ``None`` if it runs none."""
    ray = sys.modules.get("ray")  # if it is not imported, this is no process of Ray's
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None and context.get_task_id() is None:  # a driver
        return None
    resources = context.get_assigned_resources()
    return Share(resources.get("CPU", 0), resources.get("GPU", 0))


def suitable_device(share: Share | None, device: torch.device | str | None) -> torch.device:
    """Return ``device``, or if it is ``None`` the GPU of this process if it has one, else the CPU.

    Raises ``DeviceError`` for a GPU that Ray has not assigned.
    """
    if device is not None:
        device = parse_device(device)
        if device.type == "cuda" and share is not None and not share.gpus:
            raise DeviceError(
                f"device is {str(device)!r}, but Ray has assigned no GPU to this actor. Pass num_gpus=1 to "
                "map_batches, or leave device out to use the CPU"
            )
        return device
    has_gpu = torch.cuda.is_available() if share is None else bool(share.gpus)
    return torch.device("cuda" if has_gpu else "cpu")


def use_threads(share: Share | None) -> int:
    """Make torch use as many threads as Ray has assigned cores, and return this number.

    Outside Ray, torch's threads stay as they are. The same holds if the user has chosen their number by
    ``OMP_NUM_THREADS``, which Ray itself sets to the number of cores.
    """
    if share is None:
        return suitable_threads()
    if os.environ.get("OMP_NUM_THREADS", str(share.threads)) == str(share.threads):
        torch.set_num_threads(share.threads)
    return share.threads
