"""Damaged files of our own: each is read, or refused with a FastresError that names it. Nothing else happens."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres
from fastres.bench.report import results
from fastres.bench.study import report, training
from fastres.bench.tuning import vetting
from fastres.bench.tuning.progress import DROPPED, Progress
from fastres.bench.visit import home, state
from fastres.bench.visit.running import Outcome
from fastres.errors import FastresError
from fastres.export.metadata import inspect
from fastres.export.onnx import export
from fastres.kernels.routing import tables
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.weights.folders import read_json

ROOT = Path(__file__).parents[2]
TRIES = 40
SHAPE = ConvShape(N=1, H=7, W=7, C=64, K=64, R=3, S=3, stride=1, padding=1, groups=1)
LAYER = tables.Layer(SHAPE, "float16", False)


def table() -> bytes:
    entry = tables.Tuned(LAYER, ConvConfig("conv", 16, 32, 32, 4, 2), 1.5, 2.5)
    return tables.to_json(tables.Table((entry,), (), ()), {"gpu": "H100", "arch": "sm_90"}).encode()


def visit() -> bytes:
    outcome = Outcome("passed", 1.5, "", "ab", "cd", "2026-11-01")
    return json.dumps({"card": "H100", "pieces": {"smoke conv": vars(outcome)}}).encode()


def candidates() -> bytes:
    config = ConvConfig("conv", 16, 32, 32, 4, 2)
    return vetting.to_json(vetting.Vetted({LAYER: [config]}, {}), {"arch": "sm_90"}).encode()


def benchmark() -> bytes:
    data = json.loads((ROOT / "bench/results/cpu-amd-epyc-2-threads/results.json").read_text())
    return json.dumps({key: value if isinstance(value, dict) else value[:2] for key, value in data.items()}).encode()


def study() -> bytes:
    data = {"study": "noise", "fingerprint": "0", "environment": {"size": 8}, "data": {"rows": [[1, 2.5]]}}
    return json.dumps(data).encode()


def dropped() -> bytes:
    return json.dumps([{"layer": {"dtype": "float16"}, "config": {"kernel": "conv"}}]).encode()


def model_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        export(fastres.load("resnet20_digits"), target, verify=False, progress=False)
        return target.read_bytes()


def resumed(path: Path) -> Any:
    table_path = path.with_name("conv.json")
    return Progress.resume(table_path, {})


def runs(path: Path) -> Any:
    return home._has_rows(path)


FILES: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], Any]]] = {
    "tuned table": ("conv.json", table, tables.read_table),
    "table to resume": ("conv.json", table, resumed),
    "dropped configurations": (DROPPED, dropped, resumed),
    "candidates": ("sm_90.json", candidates, lambda path: vetting.read("sm_90", path.parent)),
    "record of a visit": ("visit.json", visit, lambda path: (state.read(path), state.read(path, path))),
    "results": ("results.json", benchmark, results.read),
    "runs of a visit": ("run.json", benchmark, runs),
    "study": ("noise.json", study, report.read),
    "configuration": (
        "config.json",
        lambda: b'{"model_type": "resnet", "depths": [2, 2]}',
        lambda p: read_json(p, "x"),
    ),
    "exported file": ("model.onnx", model_file, lambda path: str(inspect(path))),
}


def damaged(content: bytes, generator: random.Random) -> Iterator[bytes]:
    """Yield an empty file, other kinds of content, and the content with cuts and changed bytes."""
    yield from (b"", b"\0" * 64, b"\xff\xfe", b"null", b"[]", b"{}", b'"x"', b"[" * 100_000, b"5")
    for _ in range(TRIES):
        changed = bytearray(content)
        kind = generator.randrange(3)
        if kind == 0:
            del changed[generator.randrange(len(changed)) :]
        for _ in range(generator.choice((1, 4))) if kind else ():
            changed[generator.randrange(min(len(changed), 4096))] = generator.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    file, make, read = FILES[name]
    path, content = tmp_path / file, make()
    path.write_bytes(content)
    read(path)  # intact
    refused = []
    for variant in damaged(content, random.Random(name)):
        path.write_bytes(variant)
        try:
            read(path)
        except FastresError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert [message for message in refused if file not in message] == []


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    file, _, read = FILES[name]
    os.mkfifo(tmp_path / file)
    if name not in ("table to resume", "dropped configurations", "candidates", "record of a visit"):
        with pytest.raises(FastresError, match="named pipe"):
            read(tmp_path / file)
    else:  # only a regular file counts as there
        read(tmp_path / file)


def test_a_damaged_network_of_a_study_is_trained_again(tmp_path: Path) -> None:
    job = training.Job("resnet20", 0, training.Recipe(1))
    trained = training.Trained(job, {"w": torch.zeros(2, dtype=torch.float32)}, [])
    training._write(trained, tmp_path)
    (path,) = tmp_path.iterdir()
    assert training.read(job, tmp_path) is not None
    path.write_bytes(path.read_bytes()[:30])
    with pytest.warns(UserWarning, match="is damaged"):
        assert training.read(job, tmp_path) is None
