"""Tune joined convolutions: find out if one kernel for a run of convolutions is faster than separate kernels.

Before a candidate is timed, its result is compared with the separate convolutions in float32. The baseline is the same
convolutions one after another, each with its tuned kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from fastres.bench.measure.timing import launch_microseconds
from fastres.executors.gpu import block_of, run_joined
from fastres.folding.build import outline
from fastres.folding.fusion import joinable, joined
from fastres.kernels import conv_tma, dispatch, fused, gemm, reference
from fastres.kernels.inspection import tuned_tables
from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import ConvConfig
from fastres.kernels.routing.tables import Block, TunedBlock
from fastres.kernels.tma import tma_fits
from fastres.network.architectures import Architecture, get_architecture
from fastres.network.plan import Conv, Joined, Shape

from .progress import Progress, runs_right


@dataclass(frozen=True)
class Case:
    """A run of convolutions with the shapes of its values (NHWC), without weight data."""

    block: Block
    run: Joined
    shapes: dict[str, Shape]  # of the values that the run reads and writes


@dataclass(frozen=True)
class BlockTools:
    """The search's operations that need a GPU, separate so that its logic can be tested without one."""

    compiles_well: Callable[[Block, Sequence[ConvConfig]], list[ConvConfig]]
    is_right: Callable[[Case, ConvConfig], bool]
    microseconds: Callable[[Case, ConvConfig | None], float]  # None: the convolutions one by one


def cases(models: Iterable[str], batches: Iterable[int], size: int, dtype: torch.dtype, gpu: Gpu) -> list[Case]:
    """Return the distinct runs of the models that at least one kernel supports."""
    found: dict[Block, Case] = {}
    for name, batch in itertools.product(models, batches):
        for case in cases_of(get_architecture(name), batch, size, dtype, gpu):
            found.setdefault(case.block, case)
    return list(found.values())


def cases_of(arch: Architecture, batch: int, size: int, dtype: torch.dtype, gpu: Gpu) -> list[Case]:
    """Return the distinct runs of one network that at least one kernel supports."""
    plan = outline(arch, dtype)
    shapes = plan.shapes(batch, size, size)
    found: dict[Block, Case] = {}
    for run in itertools.chain.from_iterable(joinable(plan.steps).values()):
        block = block_of(run, shapes[run.input], dtype)
        if block not in found and candidates(block, gpu):
            values = {part.output for part in run.parts} | set(run.reads)
            found[block] = Case(block, run, {value: shapes[value] for value in values})
    return list(found.values())


def candidates(block: Block, gpu: Gpu) -> list[ConvConfig]:
    """Return every configuration, of every kernel that supports the run, that fits the GPU."""
    dtype = getattr(torch, block.dtype)
    sizes = {"shortcut_channels": block.shortcut_channels, "next_channels": block.next_channels}
    widest = max(64, triton.next_power_of_2(block.channels))
    found = []
    for config in (*fused.CANDIDATES, *gemm.CANDIDATES, *conv_tma.CANDIDATES):
        if dispatch.why_not_block(config.kernel, block, dtype, gpu) or config.block_n > widest:
            continue
        if block.fused:
            fits = fused.fused_fits(block.shape, config, gpu, **sizes)
        else:
            fits = tma_fits(config, gpu, residual=False)
        if fits:
            found.append(config)
    return found


def tune_block(case: Case, configs: Sequence[ConvConfig], tools: BlockTools) -> TunedBlock | None:
    """Return the fastest of ``configs`` that compiles well and is correct, or ``None`` if there is none.

    It is returned even if the separate convolutions are faster.
    """
    good = [config for config in tools.compiles_well(case.block, configs) if tools.is_right(case, config)]
    if not good:
        return None
    times = {config: tools.microseconds(case, config) for config in good}
    best = min(times, key=lambda config: times[config])
    return TunedBlock(case.block, best, times[best], tools.microseconds(case, None))


def block_tools(gpu: Gpu, pool: ProcessPoolExecutor, progress: Progress) -> BlockTools:
    """Return tools that compile in ``pool``, and check and time on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())

    def compiles_well(block: Block, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        return tuned_tables.compiling_well(pool, gpu, block, configs)

    def microseconds(case: Case, config: ConvConfig | None) -> float:
        run, values = with_data(case, device)

        def launch() -> None:
            run_apart(run, values) if config is None else run_joined(run, values, config)

        if config is None:
            return launch_microseconds(launch)
        with progress.trying(case.block, config):
            return launch_microseconds(launch)

    def is_right(case: Case, config: ConvConfig) -> bool:
        with progress.trying(case.block, config):
            what = f"{config.kernel} {config} for {case.run.name}"
            return runs_right(lambda: errors(case, config, device), case.block.dtype, what, progress)

    return BlockTools(compiles_well, is_right, microseconds)


@torch.no_grad()
def with_data(case: Case, device: torch.device) -> tuple[Joined, dict[str, Tensor]]:
    """Return the run with random weights, and its values: random inputs, and NaN for everything that is written."""
    dtype = getattr(torch, case.block.dtype)

    def drawn(part: Conv | None) -> Conv | None:
        if part is None:
            return None
        weight = torch.randn(part.weight.shape, device=device) / part.weight[0].numel() ** 0.5
        return replace(part, weight=weight.to(dtype), bias=torch.randn(part.bias.shape, device=device))

    last = drawn(case.run.last)
    assert last is not None
    run = joined(last, drawn(case.run.first), drawn(case.run.shortcut), drawn(case.run.following))
    values = {
        value: torch.randn(shape, device=device).to(dtype)
        if value in run.reads
        else torch.full(shape, float("nan"), dtype=dtype, device=device)
        for value, shape in case.shapes.items()
    }
    return run, values


def run_apart(run: Joined, values: dict[str, Tensor]) -> None:
    """Run the convolutions one by one, each with its routed kernel."""
    for part in run.parts:
        dispatch.convolve_into(
            values[part.output], values[part.input], part.weight, part.bias,
            None if part.residual is None else values[part.residual],
            stride=part.stride, padding=part.padding, groups=part.groups, relu=part.relu,
        )  # fmt: skip


@torch.no_grad()
def errors(case: Case, config: ConvConfig, device: torch.device) -> float:
    """Return the largest relative error of the kernel's outputs against float32 convolutions with the same rounding."""
    run, values = with_data(case, device)
    run_joined(run, values, config)
    exact = in_float32(run, values)
    return max(float((values[value].float() - exact[value]).norm() / exact[value].norm()) for value in run.writes)


def in_float32(run: Joined, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute every value of the run in float32 from its inputs, rounded where the kernel rounds."""
    exact = {value: values[value].float() for value in run.reads}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for part in run.parts:
            y = reference.conv2d(
                exact[part.input], part.weight.float(), part.bias,
                None if part.residual is None else exact[part.residual],
                stride=part.stride, padding=part.padding, groups=part.groups, relu=part.relu,
            )  # fmt: skip
            # The kernel also rounds values that it multiplies next. It adds a shortcut before it rounds.
            exact[part.output] = y if part is run.shortcut else y.to(values[part.output].dtype).float()
    return exact
