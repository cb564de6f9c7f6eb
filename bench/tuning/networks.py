"""Tune whole networks: choose whether to join convolutions, run micro-batches in the first stages, start kernels early.

Timing layers and runs alone misses some effects, such as data that one kernel leaves in the L2 cache for the next, or
the time that the next kernel takes to start. So each way of running is timed on the whole network, interleaved with the
plain way. As in real use, it is captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from fastres.kernels.routing.tables import Network
from fastres.kernels.routing.without import left_out
from fastres.text import dtype_name

# Smaller batches fit in the L2 cache, and micro-batches would cost more in launches than they save. From this size on,
# kernels take so long that an early start saves nothing.
LARGE_BATCH = 64
MICRO_BATCHES: tuple[int, ...] = (16, 32, 64, 128)
QUICK_MICRO_BATCHES: tuple[int, ...] = (32, 64)
ROUNDS = 15
REPLAYS = 4  # per sample
CHECKS = 8  # replays whose results are compared, because race conditions do not show in every replay


def ways(
    plain: Network, *, has_blocks: bool, starts_early: bool, sizes: Sequence[int] = MICRO_BATCHES
) -> Iterator[Network]:
    """Yield ways to run a network other than the plain one, which runs kernels one by one on the whole batch."""
    for joined in (False, True) if has_blocks else (False,):
        if joined:
            yield replace(plain, joined=True)
        if plain.batch < LARGE_BATCH:
            if starts_early:
                yield replace(plain, joined=joined, early=True)
            continue
        for through, images in itertools.product(("layer1", "layer2"), sizes):
            if images < plain.batch:
                yield replace(plain, joined=joined, through=through, images=images)


def tune_network(
    plain: Network, others: Iterable[Network], is_right: Callable[[Network], bool], time_ms: Callable[[Network], float]
) -> Network:
    """Return the fastest correct way. ``time_ms`` runs the network in a given way and returns milliseconds."""
    tried = [plain, *(way for way in others if is_right(way))]
    for way in tried:
        time_ms(way)  # compiles and allocates
    samples: dict[Network, list[float]] = {way: [] for way in tried}
    for _ in range(ROUNDS):
        for way in tried:
            samples[way].append(time_ms(way))
    medians = {way: 1000 * statistics.median(times) for way, times in samples.items()}
    best = min(medians, key=lambda way: medians[way])
    return replace(best, microseconds=round(medians[best], 1), plain_microseconds=round(medians[plain], 1))


def on_gpu(name: str, batch: int, size: int, dtype: torch.dtype, has_blocks: bool, quick: bool = False) -> Network:
    """Tune ``name`` on the current GPU with calibrated random weights. ``quick`` tries fewer micro-batches."""
    from fastres.bench.measure.calibration import calibrated
    from fastres.executors.gpu import GpuExecutor
    from fastres.folding.build import build_plan
    from fastres.network.architectures import get_architecture

    device = torch.device("cuda", torch.cuda.current_device())
    arch = get_architecture(name)
    state = {key: value.to(device) for key, value in calibrated(arch).state_dict().items()}
    executor = GpuExecutor(build_plan(state, arch, dtype=dtype))
    x = torch.randn(batch, 3, size, size, device=device).to(dtype)
    plain = Network(name, batch, size, size, dtype_name(dtype), joined=False)

    pool = torch.cuda.graph_pool_handle()  # graphs that run one after another may share memory

    def run(way: Network) -> torch.Tensor:
        return executor.run_as(x, ("logits",), way)[0]

    @functools.cache
    def captured(way: Network) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        run(way)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = run(way)
        return graph, logits

    truth = run(plain)

    def is_right(way: Network) -> bool:
        graph, logits = captured(way)
        for _ in range(CHECKS):
            logits.fill_(torch.nan)
            graph.replay()
            if not float((logits - truth).norm() / truth.norm()) < 16 * torch.finfo(dtype).eps:
                return False
        return True

    def time_ms(way: Network) -> float:
        graph, _ = captured(way)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / REPLAYS

    starts_early = (
        "early" not in left_out() and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    sizes = QUICK_MICRO_BATCHES if quick else MICRO_BATCHES
    others = ways(plain, has_blocks=has_blocks, starts_early=starts_early, sizes=sizes)
    return tune_network(plain, others, is_right, time_ms)


def todo(models: Sequence[str], batches: Sequence[int], size: int, dtype: torch.dtype) -> list[Network]:
    """Return the networks to tune."""
    return [Network(model, batch, size, size, dtype_name(dtype)) for model in models for batch in batches]
