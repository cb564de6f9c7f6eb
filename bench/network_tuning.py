"""Tuning of whole networks: joined or one by one, and the first stages in micro-batches or not.

What layers and runs measured alone do not show, such as what one kernel leaves in the L2 cache for the next, decides
here: each way of running is timed on the whole network, interleaved with the plain one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from fastres.kernels.tables import Network
from fastres.text import dtype_name

# Batches under this fit the L2 cache as they are, and their launches cost more than they would save.
LEAST_BATCH = 64
MICRO_BATCHES = (16, 32, 64, 128)
ROUNDS = 15


def ways(plain: Network, *, has_blocks: bool) -> Iterator[Network]:
    """Ways to run a network, besides the plain one (one by one, the batch whole)."""
    for joined in (False, True) if has_blocks else (False,):
        if joined:
            yield replace(plain, joined=True)
        for through in ("layer1", "layer2"):
            for images in MICRO_BATCHES:
                if images < plain.batch:
                    yield replace(plain, joined=joined, through=through, images=images)


def tune_network(
    plain: Network, has_blocks: bool, is_right: Callable[[Network], bool], time_ms: Callable[[Network], float]
) -> Network:
    """The fastest way that is right. ``time_ms`` runs the network once in a way."""
    tried = [plain, *(way for way in ways(plain, has_blocks=has_blocks) if is_right(way))]
    for way in tried:
        time_ms(way)  # compiles and allocates
    samples: dict[Network, list[float]] = {way: [] for way in tried}
    for _ in range(ROUNDS):
        for way in tried:
            samples[way].append(time_ms(way))
    medians = {way: 1000 * statistics.median(times) for way, times in samples.items()}
    best = min(medians, key=lambda way: medians[way])
    return replace(best, microseconds=round(medians[best], 1), plain_microseconds=round(medians[plain], 1))


def on_gpu(name: str, batch: int, size: int, dtype: torch.dtype, has_blocks: bool) -> Network:
    """Tune ``name`` on the current GPU, with random calibrated weights."""
    from fastres.architectures import get_architecture
    from fastres.folding import build_plan
    from fastres.gpu import GpuExecutor

    from .calibration import calibrated

    device = torch.device("cuda", torch.cuda.current_device())
    arch = get_architecture(name)
    state = {key: value.to(device) for key, value in calibrated(arch).state_dict().items()}
    executor = GpuExecutor(build_plan(state, arch, dtype=dtype))
    x = torch.randn(batch, 3, size, size, device=device).to(dtype)
    plain = Network(name, batch, size, size, dtype_name(dtype), joined=False)

    def run(way: Network) -> torch.Tensor:
        return executor.run_as(x, ("logits",), way)[0]

    truth = run(plain)

    def is_right(way: Network) -> bool:
        return float((run(way) - truth).norm() / truth.norm()) < 16 * torch.finfo(dtype).eps

    def time_ms(way: Network) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(way)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return tune_network(plain, has_blocks, is_right, time_ms)


def todo(models: Sequence[str], batches: Sequence[int], size: int, dtype: torch.dtype) -> list[Network]:
    """The cases worth tuning."""
    name = dtype_name(dtype)
    return [
        Network(model, batch, size, size, name)
        for model in models for batch in batches if batch >= LEAST_BATCH
    ]  # fmt: skip
