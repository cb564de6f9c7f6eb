"""``python -m fastres.bench.tune``: find the fastest configuration of each layer on this machine's GPU.

For every distinct convolution of the given models and batches: list what could run it, drop what the roofline says
cannot be good, compile the rest in parallel with no launch and drop what spills or does not fit, check each result
against float32, and time those that are right. The table is written after every layer, so that an interrupted run
continues where it stopped; ``make gpu`` copies it to ``kernels/configs/<gpu>/``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastres.architectures import get_architecture
from fastres.ceilings import Ceilings
from fastres.errors import DeviceError
from fastres.folding import outline
from fastres.gpu import conv_shape
from fastres.kernels import conv_tma, dispatch, gemm, reference
from fastres.kernels.routing import ConvConfig, Gpu, gpu_of, route_conv
from fastres.kernels.tables import Layer, Tuned, from_json, table_path, to_json
from fastres.plan import Conv
from fastres.prediction import conv_seconds
from fastres.text import text_table

from .ceilings import measure
from .results import write_whole

# A candidate is not tried where its predicted time is more than this many times the best prediction. The model knows
# waves, arithmetic and tile traffic, not latency or pipelining, so it only rules out what is far off.
FAR_OFF = 1.6

GENERAL = [
    ConvConfig("conv", m, n, k, warps, stages)
    for (m, n), k, warps, stages in itertools.product(
        ((64, 32), (64, 64), (128, 32), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128)),
        (32, 64, 128), (4, 8), (3, 4, 5),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Tools:
    """What the search does on a GPU, so that its logic can be tested without one."""

    compiles_well: Callable[[Layer, Sequence[ConvConfig]], list[ConvConfig]]
    is_right: Callable[[Layer, ConvConfig], bool]
    microseconds: Callable[[Layer, ConvConfig], float]


def layers(models: Iterable[str], batches: Iterable[int], size: int, dtype: torch.dtype) -> list[Layer]:
    """The distinct convolutions that the models run at these batches."""
    found: dict[Layer, None] = {}
    for name, batch in itertools.product(models, batches):
        plan = outline(get_architecture(name), dtype)
        shapes = plan.shapes(batch, size, size)
        for step in plan:
            if isinstance(step, Conv):
                found[Layer.of(conv_shape(step, shapes[step.input]), dtype, step.residual is not None)] = None
    return list(found)


def candidates(layer: Layer, gpu: Gpu) -> list[ConvConfig]:
    """Configurations of every kernel that takes the layer; the rules' own choice first."""
    shape, dtype = layer.shape, getattr(torch, layer.dtype)
    found = [route_conv(shape, dtype, gpu)]
    for config in [*GENERAL, *gemm.CANDIDATES, *conv_tma.CANDIDATES]:
        too_wide = config.block_n > max(32, triton.next_power_of_2(shape.K))
        too_deep = config.block_k > max(16, triton.next_power_of_2(shape.C))
        if not too_wide and not too_deep and not dispatch.why_not(config.kernel, shape, dtype, gpu):
            found.append(config)
    return list(dict.fromkeys(found))


def promising(layer: Layer, configs: Sequence[ConvConfig], gpu: Gpu, limits: Ceilings) -> list[ConvConfig]:
    """The rules' own choice, and whatever is predicted to come near the best."""
    times = {config: conv_seconds(layer, config, gpu, limits) for config in configs}
    best = min(times.values())
    return [config for config in configs if config == configs[0] or times[config] <= FAR_OFF * best]


def tune_layer(layer: Layer, configs: Sequence[ConvConfig], tools: Tools) -> Tuned:
    """The fastest of ``configs`` (the rules' own choice first) among those that compile well and are right."""
    rules = configs[0]
    good = tools.compiles_well(layer, configs)
    times = {config: tools.microseconds(layer, config) for config in good if tools.is_right(layer, config)}
    if rules not in times:
        raise DeviceError(f"The rules' own configuration {rules} is wrong or does not compile for {layer}")
    best = min(times, key=lambda config: times[config])
    return Tuned(layer, best, times[best], times[rules])


def tune(
    todo: Sequence[Layer], gpu: Gpu, limits: Ceilings, tools: Tools, path: Path, facts: dict[str, object]
) -> list[Tuned]:
    """Tune the layers that ``path`` does not hold yet, writing it after each one."""
    from tqdm import tqdm

    done = from_json(path.read_text(), str(path)) if path.is_file() else []
    known = {entry.layer for entry in done}
    for layer in tqdm([layer for layer in todo if layer not in known], desc=f"tune {gpu.name}", unit="layer"):
        configs = promising(layer, candidates(layer, gpu), gpu, limits)
        done.append(tune_layer(layer, configs, tools))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_json(done, facts).encode())
    return done


def gpu_tools(gpu: Gpu, pool: ProcessPoolExecutor) -> Tools:
    """Compile in ``pool``; check and time on the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())

    def compiles_well(layer: Layer, configs: Sequence[ConvConfig]) -> list[ConvConfig]:
        jobs = [(layer, config, gpu.arch) for config in configs]
        return [config for config, good in zip(configs, pool.map(_compiles_well, jobs), strict=True) if good]

    @torch.no_grad()
    def is_right(layer: Layer, config: ConvConfig) -> bool:
        x, weight, bias, residual = make_tensors(layer, device)
        shape = layer.shape
        y = torch.full((shape.N, shape.P, shape.Q, weight.shape[0]), float("nan"), dtype=x.dtype, device=device)
        _launch(layer, config, y, x, weight, bias, residual)
        with torch.backends.cudnn.flags(allow_tf32=False):
            truth = reference.conv2d(
                x.float(), weight.float(), bias, None if residual is None else residual.float(),
                stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=True,
            )  # fmt: skip
        error = float((y.float() - truth).norm() / truth.norm())
        return error < 2 * torch.finfo(x.dtype).eps

    def microseconds(layer: Layer, config: ConvConfig) -> float:
        x, weight, bias, residual = make_tensors(layer, device)
        shape = layer.shape
        y = torch.empty((shape.N, shape.P, shape.Q, weight.shape[0]), dtype=x.dtype, device=device)
        milliseconds = triton.testing.do_bench(
            lambda: _launch(layer, config, y, x, weight, bias, residual), warmup=10, rep=40, return_mode="median"
        )
        return round(1000 * milliseconds, 2)

    return Tools(compiles_well, is_right, microseconds)


def make_tensors(
    layer: Layer, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Random input, weight, bias and residual of a layer."""
    shape, dtype = layer.shape, getattr(torch, layer.dtype)
    x = torch.randn(shape.N, shape.H, shape.W, shape.C * shape.groups, device=device, dtype=dtype)
    weight = torch.randn(shape.K * shape.groups, shape.R, shape.S, shape.C, device=device)
    weight = (weight / (shape.R * shape.S * shape.C) ** 0.5).to(dtype)
    bias = torch.randn(shape.K * shape.groups, device=device)
    size = (shape.N, shape.P, shape.Q, shape.K * shape.groups)
    return x, weight, bias, torch.randn(size, device=device, dtype=dtype) if layer.residual else None


def _launch(layer: Layer, config: ConvConfig, y: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    shape = layer.shape
    x, weight, bias, residual = tensors
    assert x is not None
    assert weight is not None
    assert bias is not None
    dispatch.convolve_into(
        y, x, weight, bias, residual, stride=shape.stride, padding=shape.padding, groups=shape.groups, relu=True,
        config=config,
    )  # fmt: skip


def _compiles_well(job: tuple[Layer, ConvConfig, str]) -> bool:
    """Compile one candidate ahead of time, in a worker process: it fits and does not spill in its main loop."""
    from fastres.kernels.inspection import compile_conv, inspect
    from fastres.kernels.inspection_tma import compile_tma, inspect_tma

    layer, config, arch = job
    facts = (layer.shape, getattr(torch, layer.dtype), config)
    try:
        if config.kernel != "conv":
            return inspect_tma(compile_tma(*facts, residual=layer.residual, relu=True)).good
        report = inspect(compile_conv(*facts, residual=layer.residual, relu=True), arch)
    except (RuntimeError, triton.CompilationError):
        return False
    return report.fits and not report.loop_spills


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and print a short table, slowest layers first; exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m fastres.bench.tune", description="Tune the layers of models.")
    parser.add_argument("--model", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, default=Path("out/configs"), help="folder of tables (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("fastres: tuning needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, dtype = gpu_of(device), getattr(torch, options.dtype)
    todo = layers(options.model, options.batch, options.size, dtype)
    path = table_path(gpu.name, options.out)
    facts: dict[str, object] = {"gpu": gpu.name, "torch": torch.__version__, "triton": triton.__version__}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        done = tune(todo, gpu, measure(device, dtype), gpu_tools(gpu, pool), path, facts)
    print(table(done))
    print(f"{len(done)} layers in {path}; FASTRES_CONFIGS={options.out} uses it")
    return 0


def table(entries: Sequence[Tuned], rows: int = 20) -> str:
    """The slowest layers: what was chosen and what the rules' own choice took."""
    lines = [("layer", "kernel", "configuration", "µs", "rules µs")]
    for entry in sorted(entries, key=lambda entry: -entry.microseconds)[:rows]:
        shape = entry.layer.shape
        name = f"N{shape.N} {shape.H}×{shape.W} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K}"
        name += f" g{shape.groups}" * (shape.groups > 1) + " +res" * entry.layer.residual
        times = (f"{entry.microseconds:.1f}", f"{entry.rules_microseconds:.1f}")
        lines.append((name, entry.config.kernel, str(entry.config), *times))
    return text_table(lines, right=(3, 4))


if __name__ == "__main__":
    sys.exit(main())
