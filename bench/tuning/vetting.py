"""Choose and compile the candidates of a quick tuning, on a machine without the GPU: ``python -m bench.vetting``.

For every layer and joined run of a model, it keeps some configurations of each kind of kernel: those with the best
estimates, if their compiled code does not spill registers and fits the GPU. The remaining candidates are few enough to
be timed in minutes on a GPU. It writes ``bench/tuning/candidates/<architecture>.json``, which
``python -m bench.tune --quick`` reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from fastres.bench.measure.environment import commit
from fastres.bench.report.results import read_text, write_whole
from fastres.errors import FastresError
from fastres.kernels.inspection.parallel import in_processes
from fastres.kernels.inspection.tuned_tables import Entry, compilation, compiles_well
from fastres.kernels.routing.cards import CARDS, Gpu, card
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import Block, Layer
from fastres.program import run_program
from fastres.roofline.ceilings import Ceilings, stated

from . import blocks, configurations

FOLDER = Path(__file__).parent / "candidates"
A_LAYER, A_BLOCK = 10, 3
FIELDS = ("kernel", "block_m", "block_n", "block_k", "num_warps", "num_stages", "split")  # of a configuration


@dataclass(frozen=True)
class Vetted:
    """Configurations to time, most promising first."""

    layers: Mapping[Layer, list[ConvConfig]] = field(default_factory=dict)
    blocks: Mapping[Block, list[ConvConfig]] = field(default_factory=dict)


def few(configs: Sequence[ConvConfig], count: int) -> list[ConvConfig]:
    """Return ``count`` configurations, taken in turn from each kernel. Split reductions count as a separate kernel."""
    kinds: dict[tuple[str, bool], list[ConvConfig]] = {}
    for config in configs:
        kinds.setdefault((config.kernel, config.split > 1), []).append(config)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [config for config in rounds if config is not None][:count]


def vet(
    layers: Mapping[Layer, Sequence[ConvConfig]],
    blocks: Mapping[Block, Sequence[ConvConfig]],
    good: Callable[[list[tuple[Layer | Block, ConvConfig]]], list[bool]],
) -> Vetted:
    """Return the few best ``good`` configurations of each list. The lists are sorted, best first."""
    waiting: dict[Layer | Block, list[ConvConfig]] = {}
    waiting.update((key, list(found)) for key, found in layers.items())
    waiting.update((key, list(found)) for key, found in blocks.items())
    kept: dict[Layer | Block, list[ConvConfig]] = {key: [] for key in waiting}
    while True:
        todo: list[tuple[Layer | Block, ConvConfig]] = []
        for key, configs in waiting.items():
            lacking = (A_BLOCK if isinstance(key, Block) else A_LAYER) - len(kept[key])
            chosen = few(configs, lacking)
            waiting[key] = [config for config in configs if config not in chosen]
            todo += [(key, config) for config in chosen]
        if not todo:
            break
        for (key, config), is_good in zip(todo, good(todo), strict=True):
            if is_good:
                kept[key].append(config)
    return Vetted({key: kept[key] for key in layers}, {key: kept[key] for key in blocks})


def for_card(
    gpu: Gpu, models: Sequence[str], batches: Sequence[int], size: int, dtype: torch.dtype, workers: int | None = None
) -> Vetted:
    """Choose candidates for ``gpu`` and compile them for its architecture."""
    limits = stated(gpu.name, dtype)
    if limits is None:
        known_cards = ", ".join(known.name for known in CARDS)
        raise FastresError(f"The rates of {gpu.name} are unknown; choose one of {known_cards}")

    def ranked(layer: Layer, limits: Ceilings = limits) -> list[ConvConfig]:
        configs = configurations.candidates(layer, gpu)
        return sorted(
            configs[1:], key=lambda c: (configurations.conv_seconds(layer, c, gpu, limits), -c.block_m * c.block_n)
        )

    found = {layer: ranked(layer) for layer in configurations.layers_of(models, batches, size, dtype)}
    cases = blocks.cases(models, batches, size, dtype, gpu)
    joined = {case.block: blocks.candidates(case.block, gpu) for case in cases}
    known: dict[Any, bool] = {}

    def good(todo: list[tuple[Layer | Block, ConvConfig]]) -> list[bool]:
        entries = [Entry(gpu, key, config) for key, config in todo]
        new = {compilation(entry): entry for entry in entries if compilation(entry) not in known}
        verdicts = in_processes(compiles_well, list(new.values()), workers=workers, label=f"vet for {gpu.arch}")
        known.update(zip(new, verdicts, strict=True))
        return [known[compilation(entry)] for entry in entries]

    return vet(found, joined, good)


def to_json(vetted: Vetted, facts: Mapping[str, Any]) -> str:
    """Return the candidates as JSON, with one line per layer or run."""
    parts: dict[str, Mapping[Any, list[ConvConfig]]] = {"layers": vetted.layers, "blocks": vetted.blocks}
    lists = []
    for name, part in parts.items():
        rows = [json.dumps({"of": asdict(key), "configs": list(map(_row, found))}) for key, found in part.items()]
        lists.append(f'"{name}": [\n  ' + ",\n  ".join(rows) + "\n ]")
    return ",\n ".join([json.dumps(facts)[:-1], *lists]) + "}\n"


def _row(config: ConvConfig) -> list[Any]:
    return [getattr(config, name) for name in FIELDS]


def from_json(text: str, source: str) -> Vetted:
    """Read candidates from JSON. Raise ``FastresError`` that names ``source`` if the text is not valid."""
    try:
        document = json.loads(text)
        layers = {Layer(**{**row["of"], "shape": _shape(row)}): _configs(row) for row in document["layers"]}
        blocks = {Block(**{**row["of"], "shape": _shape(row)}): _configs(row) for row in document["blocks"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FastresError(
            f"{source} does not hold candidates ({error}); write it again with python -m bench.vetting"
        ) from error
    return Vetted(layers, blocks)


def _shape(row: Mapping[str, Any]) -> ConvShape:
    return ConvShape(**row["of"]["shape"])


def _configs(row: Mapping[str, Any]) -> list[ConvConfig]:
    return [ConvConfig(**dict(zip(FIELDS, given, strict=True))) for given in row["configs"]]


def read(arch: str, folder: Path = FOLDER) -> Vetted:
    """Return the candidates of an architecture, or empty ones if it has no file."""
    path = folder / f"{arch}.json"
    return from_json(read_text(path), str(path)) if path.is_file() else Vetted()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the candidates for a card's architecture."""
    parser = argparse.ArgumentParser(prog="python -m bench.vetting", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--card", default="H100", help="name of a card, or an architecture (default: %(default)s)")
    parser.add_argument("--model", nargs="+", default=["resnet50"], help="models (default: resnet50)")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 64, 8, 1], help="default: 256 64 8 1")
    parser.add_argument("--size", type=int, default=224, help="image height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--out", type=Path, default=FOLDER, help="output folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        gpu = card(options.card)
        vetted = for_card(gpu, options.model, options.batch, options.size, getattr(torch, options.dtype))
    except FastresError as error:
        print(f"vetting: {error}", file=sys.stderr)
        return 2
    facts = {"arch": gpu.arch, "card": gpu.name, "triton": triton.__version__, "commit": commit()}
    path = options.out / f"{gpu.arch}.json"
    write_whole(path, to_json(vetted, facts).encode())
    counts = [sum(map(len, part.values())) for part in (vetted.layers, vetted.blocks)]
    print(
        f"{path}: {len(vetted.layers)} layers with {counts[0]} candidates, {len(vetted.blocks)} runs with {counts[1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, "python -m bench.vetting"))
