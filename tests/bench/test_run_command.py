"""Test the command ``python -m bench.run``: the files that it writes, its output and its error messages."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastres.bench import run
from fastres.bench.report import results
from fastres.extras import install

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


SMALL_RUN = ("--quick", "--model", "resnet20", "--size", "32", "--device", "cpu")


def test_from_the_checkout_it_writes_every_file(tmp_path: Path) -> None:
    engines = "eager_channels_last,eager_cudagraph"
    done = command("bench.run", *SMALL_RUN, "--batch", "1,2", "--peers", engines, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "layers.png",
        "report.html",
        "results.csv",
        "results.json",
        "throughput.png",
        "throughput_by_batch.png",
    ]
    assert "resnet20, float32, 32×32" in (folder / "report.html").read_text()
    assert (folder / "throughput.png").read_bytes().startswith(b"\x89PNG")

    found = results.read(folder / "results.json")
    statuses = {(row.batch, row.engine): row.status for row in found.rows}
    assert statuses == {
        (batch, engine): "absent" if engine == "eager_cudagraph" else "ok"
        for batch in (1, 2)
        for engine in ("eager", "eager_channels_last", "eager_cudagraph", "fastres")
    }
    assert all(row.note == "CUDA graphs need a CUDA GPU" for row in found.rows if row.status == "absent")
    assert Counter(layer.batch for layer in found.layers) == {1: 22, 2: 22}
    where = found.environment
    assert where["torch"] == torch.__version__
    assert where["gpu"] is None
    assert where["threads"] == 1
    assert where["complete"] is True
    assert where["command"].startswith("python -m bench.run --quick --model resnet20")
    with (folder / "results.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == len(found.rows) == 8
    for said in ("resnet20, float32, 32×32", "fastres", "CUDA graphs need a CUDA GPU", "Ceilings measured in this run"):
        assert said in done.stdout


def test_installed_it_prints_json(tmp_path: Path) -> None:
    folder = ("--only-data", "--out", "data")
    done = command("fastres", "bench", *SMALL_RUN, "--batch", "2", "--peers", "", "--json", *folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"results.json", "results.csv"}
    found = results.from_dict(json.loads(done.stdout))
    assert [(row.engine, row.status) for row in found.rows] == [("eager", "ok"), ("fastres", "ok")]
    assert found.environment["command"].startswith("fastres bench --quick")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet51"], "resnet51"),
        (["--size", "16"], "at least 32×32"),
        (["--dtype", "int4"], "int4"),
        (["--peers", "tensorflow"], "tensorflow"),
        (["--weights", "IMAGENET1K_V9", "--model", "resnet18"], "IMAGENET1K_V9"),
    ],
)
@pytest.mark.usefixtures("small")
def test_what_cannot_be_run_is_said_in_a_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA GPU is available" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("rich", []), ("matplotlib", ["--json", "--out", "somewhere"]), ("jinja2", ["--json", "--out", "somewhere"])],
)
def test_missing_packages_are_named_before_any_work(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it worked before it looked for the package"))
    assert run.main(arguments) == 2
    assert f"not installed: {module}. Install them with {install('bench')}" in capsys.readouterr().err


def test_batches_are_whole_numbers_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "a", "1,,2"):
        with pytest.raises(SystemExit) as stopped:
            run.main(["--batch", text])
        assert stopped.value.code == 2
        assert f"--batch: {text!r} was given; give positive integers" in capsys.readouterr().err
