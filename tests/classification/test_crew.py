"""Several processes of one machine: they write the table of one, whoever dies on the way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fastres
from fastres.classification import driving, processes
from fastres.classification.driving import Failures
from fastres.classification.places import LocalPlace
from fastres.errors import InputError, OutputError, ResumeError, ShardError, SourceError, WorkerError

from .conftest import encoded
from .test_sharded import sidecar, work_folder

OPTIONS: dict[str, Any] = {
    "model": "resnet20_digits", "batch_size": 2, "workers": 0, "progress": False, "device": "cpu"
}  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, digits: list[Image.Image]) -> Path:
    """120 images, two of them broken."""
    place = tmp_path_factory.mktemp("many")
    for number in range(120):
        (place / f"{number:03}.jpg").write_bytes(b"broken" if number % 60 == 7 else encoded(digits[number]))
    return place


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The output of one process."""
    output = tmp_path_factory.mktemp("whole") / "whole.parquet"
    fastres.classify(many, output, **OPTIONS)
    return output.read_bytes()


def kill_at(monkeypatch: pytest.MonkeyPatch, moments: list[int], also: Any = None) -> None:
    """Kill the process that sends a message, at the messages of rows with these numbers."""
    original, count = processes.Processes._hear, 0

    def hear(self: Any, child: Any, *given: Any) -> None:
        nonlocal count
        before = child.told
        original(self, child, *given)
        if child.told != before:
            count += 1
            if count in moments:
                if also:
                    also()
                child._process.kill()
                child._process.wait()

    monkeypatch.setattr(processes.Processes, "_hear", hear)


def test_processes_that_are_killed_are_replaced(
    many: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    kill_at(monkeypatch, [3, 40])
    report = fastres.classify(many, output, processes=2, **OPTIONS)
    assert (report.rows, report.errors, report.resumed) == (120, 2, 0)
    assert output.read_bytes() == whole
    assert sidecar(output).exists()
    assert not work_folder(output).exists()


def test_an_interrupted_run_goes_on(many: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.parquet"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        kill_at(patch, [30], interrupt)
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted: \d+ of 120 rows are kept in .*; run the command again"
        ):
            fastres.classify(many, output, processes=2, **OPTIONS)
    assert not output.exists()
    assert list(work_folder(output).glob("rows-*"))  # the processes have written what they had
    with pytest.raises(OutputError, match="rows of a run in shards"):
        fastres.classify(many, output, **OPTIONS)
    report = fastres.classify(many, output, processes=2, **OPTIONS)
    assert 30 <= report.resumed < 120
    assert output.read_bytes() == whole
    with pytest.raises(OutputError, match="already exists"):
        fastres.classify(many, output, processes=2, **OPTIONS)
    assert fastres.classify(many, output, processes=2, resume=True, **OPTIONS).resumed == 120


def test_changed_images_are_noticed_when_a_run_goes_on(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    fastres.classify(many, output, shard="1/2", **OPTIONS)
    (many / "new.jpg").write_bytes((many / "001.jpg").read_bytes())
    try:
        with pytest.raises(ResumeError, match=r"over other images .* 120 entries then, 121 now"):
            fastres.classify(many, output, processes=2, **OPTIONS)
    finally:
        (many / "new.jpg").unlink()


PROGRAM = """
import sys, fastres
options = {"model": "resnet20_digits", "batch_size": 2, "workers": 0, "progress": False, "device": "cpu"}
print(fastres.classify(sys.argv[1], sys.argv[2], processes=2, **options))
"""


def test_a_killed_program_leaves_no_process_and_no_damage(many: Path, tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "out.parquet"
    program = [sys.executable, "-c", PROGRAM, str(many), str(output)]
    with subprocess.Popen(program) as running:
        while not (children := children_of(running.pid)) or not (work_folder(output) / "manifest.json").exists():
            assert running.poll() is None
            time.sleep(0.05)
        running.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not output.exists()
    with subprocess.Popen(program) as one, subprocess.Popen(program) as two:  # two at once
        assert {one.wait(), two.wait()} == {0}
    assert output.read_bytes() == whole
    assert not work_folder(output).exists()


def children_of(process: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process:
            found.append(int(folder.name))
    return found


class TestFailures:
    def test_a_shard_is_tried_three_times_and_then_named(self, tmp_path: Path) -> None:
        failures = Failures(LocalPlace(tmp_path / "out.csv"))
        error = SourceError("'a.tar' cannot be read: Input/output error")
        assert failures.again(range(5, 10), error, "on node 1") == 1
        assert failures.again(range(5, 10), error, "on node 2") == 2
        failures.check()
        assert failures.again(range(5, 10), error, "on node 1") is None
        with pytest.raises(ShardError, match=r"5 rows .* in 3 tries \(rows 5 to 10\)\. .*on node 1: 'a\.tar' cannot"):
            failures.check()

    def test_after_three_shards_nothing_else_is_tried(self) -> None:
        failures = Failures(LocalPlace(Path("out.csv")))
        for first in (0, 10):
            failures.again(range(first, first + 5), WorkerError("died"), "")
            failures.again(range(first, first + 5), WorkerError("died"), "")
            assert failures.again(range(first, first + 5), WorkerError("died"), "") is None
        for _ in range(2):
            failures.again(range(20, 25), WorkerError("died"), "")
        with pytest.raises(ShardError, match="15 rows"):
            failures.again(range(20, 25), WorkerError("died"), "")

    def test_what_no_repetition_mends_is_raised_at_once(self) -> None:
        with pytest.raises(InputError, match="wrong"):
            Failures(LocalPlace(Path("out.csv"))).again(range(5), InputError("wrong"), "")


def test_a_process_that_always_dies_ends_the_run(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "TRIES", 1)
    monkeypatch.setattr(driving, "FAILED_SHARDS", 1)
    kill_at(monkeypatch, list(range(1000)))
    with pytest.raises(ShardError, match=r"in 1 tries .* process on cpu: The process was killed by signal 9"):
        fastres.classify(many, tmp_path / "out.parquet", processes=2, **OPTIONS)


def test_errors_of_the_processes_are_raised_here(many: Path, tmp_path: Path, model: fastres.Model) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="There are no images"):
        fastres.classify(tmp_path / "empty", tmp_path / "out.parquet", processes=2, **OPTIONS)
    with pytest.raises(InputError, match="a loaded model was given; pass the model's name"):
        fastres.classify(many, tmp_path / "out.parquet", model=model, processes=2)
    with pytest.raises(InputError, match="shard and processes"):
        fastres.classify(many, tmp_path / "out.parquet", processes=2, shard="1/2")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_each_gpu_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert processes.devices("cuda", None) == processes.devices(None, None) == ["cuda:0", "cuda:1", "cuda:2"]
    assert processes.devices("cuda:1", None) == ["cuda:1"]
    assert processes.devices("cuda", 1) == ["cuda:0"]
    assert processes.devices("cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert processes.devices("cpu", None) == ["cpu"]
    assert processes.devices("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert processes.devices("cuda", None) == processes.devices(None, None) == ["cuda"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert processes.devices(None, 2) == ["cpu", "cpu"]


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent may ignore SIGINT
from fastres.classification import processes
from fastres.commands.cli import main

original, pressed = processes.Processes._hear, []

def hear(self, child, *given):
    original(self, child, *given)
    if child.told != (0, 0) and not pressed:
        pressed.append(True)
        os.killpg(os.getpgrp(), signal.SIGINT)  # as a terminal does

processes.Processes._hear = hear
sys.exit(main())
"""


def test_ctrl_c_reaches_all_processes(many: Path, tmp_path: Path, whole: bytes) -> None:
    output = tmp_path / "out.parquet"
    arguments = ["classify", str(many), "-o", str(output), "--processes", "2", "--model", "resnet20_digits"]
    arguments += ["--batch-size", "2", "--workers", "0", "--device", "cpu"]
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments],
        check=False, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert ended.returncode == 130
    assert "fastres: interrupted: " in ended.stderr
    assert "of 120 rows are kept" in ended.stderr
    assert "Traceback" not in ended.stderr
    report = fastres.classify(many, output, processes=2, **OPTIONS)
    assert 0 < report.resumed < 120
    assert output.read_bytes() == whole
