"""The processes that read images: they end with the main one, whatever ends it, and need no /dev/shm."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tqdm import tqdm

import fastres
from fastres.classification import batches, parcels, parts
from fastres.errors import InputError, OutputError, WorkerError
from fastres.images import jpeg, opening

from .conftest import classify

Start = Callable[[Callable[[], Any]], int]  # runs a function in a forked child and returns its process id


def in_group(group: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            except OSError:
                continue
            if int(of) == group and state != "Z":
                found.append(int(entry.name))
    return found


def all_ended(group: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while in_group(group):
        if time.monotonic() > end:
            os.killpg(group, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def started() -> Iterator[Start]:
    """A function that runs another one in a forked child, the leader of a process group of its own."""
    groups = []

    def start(function: Callable[[], Any]) -> int:
        child = os.fork()
        if not child:
            status = 1
            try:
                tqdm.set_lock(threading.RLock())  # forks share tqdm's own, and this one may be killed with it
                os.setpgid(0, 0)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                function()
                status = 0
            finally:
                os._exit(status)
        groups.append(child)
        while os.getpgid(child) != child:
            time.sleep(0.001)
        return child

    yield start
    for group in groups:
        if in_group(group):
            os.killpg(group, signal.SIGKILL)


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1]


def test_killed_at_any_moment_and_resumed(
    folder: Path,
    model: fastres.Model,
    tmp_path: Path,
    started: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output is the same, byte for byte, as without an interruption, and no process is left."""
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    options: dict[str, Any] = {"batch_size": 2, "workers": 2}
    began = time.monotonic()
    classify(folder, tmp_path / "whole.jsonl", model, **options)
    seconds = time.monotonic() - began
    generator, output, killed, resumed = random.Random(14), tmp_path / "out.jsonl", 0, 0
    for trial in range(21):
        child = started(lambda: classify(folder, output, model, resume=True, **options))
        time.sleep(generator.uniform(0, 0.8 * seconds))
        os.kill(child, SIGNALS[trial % len(SIGNALS)])
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        assert all_ended(child)
        if generator.random() < 0.5 and not output.exists():
            resumed += classify(folder, output, model, resume=True, **options).resumed
        if output.exists():
            assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
            output.unlink()
            for path in output.parent.glob("out.jsonl.partial/*"):
                path.unlink()
    assert killed > 4
    assert resumed > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_waits_for_ever_ends_with_the_main_process(
    number: int,
    folder: Path,
    model: fastres.Model,
    tmp_path: Path,
    started: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.mkfifo(tmp_path / "pipe")

    def blocked(name: str) -> Any:
        return lambda source, transforms: open(tmp_path / "pipe", "rb")

    monkeypatch.setattr(batches, "decoder", blocked)
    child = started(lambda: classify(folder, tmp_path / "out.csv", model, workers=2))
    while len(in_group(child)) < 3:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(child, number)
    os.waitpid(child, 0)
    assert all_ended(child)


def test_killed_as_the_workers_start(
    folder: Path,
    model: fastres.Model,
    tmp_path: Path,
    started: Start,
) -> None:
    for trial in range(6):
        child = started(partial(classify, folder, tmp_path / f"{trial}.csv", model, workers=4))
        while len(in_group(child)) < 2 + trial % 4:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert all_ended(child)


def test_a_signal_to_all_processes_is_the_main_ones_to_report(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor's SIGTERM reaches workers first: they leave, and the main process does not blame them."""
    original = batches.decoder
    main = os.getpid()

    def signalled(name: str) -> Any:
        def decode(source: str, transforms: Any) -> torch.Tensor:
            if source.endswith("l.jpg") and os.getpid() != main:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return original(name)(source, transforms)

        return decode

    monkeypatch.setattr(batches, "decoder", signalled)
    monkeypatch.setattr("torch.utils.data.dataloader._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(WorkerError, match="A process that reads images died"):
        classify(folder, tmp_path / "out.parquet", model, workers=1)
    monkeypatch.undo()
    assert classify(folder, tmp_path / "out.parquet", model, resume=True).rows == 24


@pytest.mark.parametrize("workers", [0, 1])
def test_too_few_file_descriptors_are_no_fault_of_the_images(
    folder: Path, model: fastres.Model, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = opening.open_regular

    def refuse(path: Any) -> Any:
        if str(path).endswith("l.jpg"):
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path)

    for module in (opening, jpeg):
        monkeypatch.setattr(module, "open_regular", refuse)
    with pytest.raises(WorkerError, match="no file can be opened: Too many open files"):
        classify(folder, tmp_path / "out.parquet", model, workers=workers)
    monkeypatch.undo()
    assert classify(folder, tmp_path / "out.parquet", model, resume=True).errors == 3


def in_a_pool(arguments: tuple[Path, Path, dict[str, Any]]) -> str:
    source, output, options = arguments
    try:
        report = fastres.classify(source, output, model=fastres.load("resnet20_digits"), progress=False, **options)
    except InputError as error:
        return str(error)
    return f"{report.rows} rows"


def test_in_a_daemonic_process(folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        given = [(folder, tmp_path / f"{index}.csv", options) for index, options in enumerate(({}, {"workers": 2}))]
        results = pool.map(in_a_pool, given)
    assert results[0] == "24 rows"
    assert "workers is 2, but this process is daemonic" in results[1]


def test_an_error_about_the_run_is_not_blamed_on_the_workers(model: fastres.Model) -> None:
    class Images:
        identity = (("path", str),)

        def __len__(self) -> int:
            return 5

        def read(self, start: int, stop: int) -> Any:
            raise OutputError("the list cannot be read")

    reading = batches.Reading(5, 1, model.transforms, "fast")
    with pytest.raises(OutputError, match="the list cannot be read"):
        list(reading.batches(Images(), [range(5)], model.device))


def test_workers_that_cannot_start(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(WorkerError, match="Resource temporarily unavailable"):
        classify(folder, tmp_path / "out.csv", model, workers=2)


@pytest.mark.parametrize("shared", [True, False])
def test_pixels_arrive_as_they_were_sent(
    folder: Path, model: fastres.Model, tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (parcels, batches):
        monkeypatch.setattr(module, "can_share", lambda: shared)
    classify(folder, tmp_path / "workers.parquet", model, workers=2)
    classify(folder, tmp_path / "main.parquet", model, workers=0)
    assert pq.read_table(tmp_path / "workers.parquet") == pq.read_table(tmp_path / "main.parquet")


def test_without_shared_memory_of_the_system(folder: Path, tmp_path: Path) -> None:
    """A container's /dev/shm may be smaller than a batch."""
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow to mount a file system")
    command = ["classify", folder, "-o", tmp_path / "out.csv", "--model", "resnet20_digits", "--workers", "2"]
    result = subprocess.run(
        [*mount, sys.executable, "-m", "fastres", *command], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "24 rows" in result.stdout
