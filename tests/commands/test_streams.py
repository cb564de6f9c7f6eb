"""Every command with a standard output that is closed, full, a pipe without a reader, in ASCII, or 40 columns wide.

Each case runs in a fork of this process, which has imported torch already, with real files for its streams.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastres
from fastres.commands.cli import main
from fastres.export.onnx import export

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "fastres" / "data" / "resnet20_digits.safetensors"
DIGITS = ["--model", "resnet20_digits"]

TEXTS = {
    "help": ["--help"],
    "version": ["--version"],
    "list": ["list"],
    "list --json": ["list", "--json"],
    "predict": ["predict", "é.png", *DIGITS],
    "predict --json": ["predict", "é.png", *DIGITS, "--json"],
    "inspect": ["inspect", str(WEIGHTS)],
    "inspect --json": ["inspect", str(WEIGHTS), "--json"],
    "env": ["env"],
    "env --json": ["env", "--json"],
    "export --inspect": ["export", "--inspect", "digits.onnx"],
    "bench --help": ["bench", "--help"],
}
CLASSIFY = ["classify", "é.png", "-o", "new.csv", *DIGITS, "--workers", "0", "--decoder", "exact"]
EXPORT = ["export", "resnet20_digits", "new.onnx", "--no-verify"]
FILES = {  # with the file that each command writes
    "classify": (CLASSIFY, "new.csv"),
    "classify --json": ([*CLASSIFY, "--json"], "new.csv"),
    "export": (EXPORT, "new.onnx"),
    "export --json": ([*EXPORT, "--json"], "new.onnx"),
    "look": (["look", "é.png", *DIGITS, "-o", "new.svg"], "new.svg"),
}


@dataclass(frozen=True)
class Done:
    status: int
    out: bytes
    err: str


def run(arguments: list[str], folder: Path, out: int | None, encoding: str = "utf-8", err: int | None = 2) -> Done:
    """Run the command as a process would, in a fork. ``out`` and ``err`` are files, or ``None`` for a closed stream."""
    with tempfile.TemporaryFile() as shown, tempfile.TemporaryFile() as said:
        out, err = (place.fileno() if number == usual else number
                    for number, usual, place in ((out, 1, shown), (err, 2, said)))  # fmt: skip
        child = os.fork()
        if not child:
            status = 99
            try:
                status = _in_child(arguments, folder, out, encoding, err)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shown.seek(0)
        said.seek(0)
        return Done(status, shown.read(), said.read().decode())


def _in_child(arguments: list[str], folder: Path, out: int | None, encoding: str, err: int | None) -> int:
    os.chdir(folder)
    torch.set_num_threads(1)
    for number, place in ((1, out), (2, err)):
        if place is None:
            os.close(number)
        else:
            os.dup2(place, number)
    sys.stdout = sys.__stdout__ = None if out is None else open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = None if err is None else open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["fastres", *arguments]
    try:
        status = main()
    except SystemExit as end:
        status = int(end.code or 0)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # as Python does at its end; a failure is status 99 here
    return status


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    Image.new("RGB", (40, 40), (200, 90, 10)).save(folder / "é.png")
    export(fastres.load("resnet20_digits"), folder / "digits.onnx", verify=False, progress=False)
    return folder


@pytest.fixture
def place(shared: Path) -> Path:
    for path in shared.glob("new*"):
        path.unlink()
    return shared


def no_reader() -> int:
    """Return the writing end of a pipe whose reader has ended, as ``head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def with_output(arguments: list[str], place: Path, opened: Callable[[], int]) -> Done:
    out = opened()
    try:
        return run(arguments, place, out)
    finally:
        os.close(out)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_nobody_gets_is_a_failure(name: str, place: Path) -> None:
    done = with_output(TEXTS[name], place, full)
    assert (done.status, done.err) == (2, "fastres: standard output cannot be written: No space left on device\n")
    done = run(TEXTS[name], place, None)
    assert done.status == 2
    assert done.err.startswith("fastres: standard output is closed")
    assert done.err.count("\n") == 1
    done = with_output(TEXTS[name], place, no_reader)
    assert (done.status, done.err) == (141, "")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_there_if_nobody_gets_the_text(name: str, place: Path) -> None:
    arguments, file = FILES[name]
    for out, status in ((None, 0), (full, 2), (no_reader, 141)):
        (place / file).unlink(missing_ok=True)
        done = run(arguments, place, None) if out is None else with_output(arguments, place, out)
        assert done.status == status, done
        assert (place / file).stat().st_size
        assert "Traceback" not in done.err
        assert (f"No space left on device; {file} is complete" in done.err) == (out is full)


@pytest.mark.parametrize("name", [*TEXTS, *FILES])
def test_ascii_and_40_columns(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    arguments = TEXTS.get(name) or FILES[name][0]
    done = run(arguments, place, 1, "ascii")
    assert done.status == 0, done
    assert done.out.isascii()
    assert done.out.endswith(b"\n")
    if "--json" in arguments:
        json.loads(done.out)
    if name == "predict":
        assert done.out.startswith(rb"\xe9.png")


@pytest.mark.parametrize("name", ["classify", "predict", "inspect"])
def test_messages_without_a_place_cost_nothing(name: str, place: Path) -> None:
    arguments = TEXTS.get(name) or FILES[name][0]
    for err in (None, full(), no_reader()):
        for path in place.glob("new*"):
            path.unlink()
        done = run(arguments, place, 1, err=err)
        assert done.status == 0
        assert done.out
        assert run(["predict", "none.png", *DIGITS], place, 1, err=err).status == 1


def test_json_with_a_name_that_is_not_utf_8(place: Path) -> None:
    name = os.fsdecode(b"new\xe9.png")
    (place / name).write_bytes((place / "é.png").read_bytes())
    for encoding in ("utf-8", "ascii", "latin-1"):
        done = run(["predict", name, "é.png", *DIGITS, "--json"], place, 1, encoding)
        assert done.status == 0
        assert [row["image"] for row in json.loads(done.out.decode(encoding))] == [r"new\xe9.png", "é.png"]
        assert run(["predict", name, *DIGITS], place, 1, encoding).out.startswith(rb"new\xe9.png")


@pytest.mark.parametrize("module", ["fastres", "bench.run", "fastres.kernels.inspection"])
def test_a_process_ends_with_its_status(module: str) -> None:
    """The interpreter's own last flush neither fails nor complains."""
    for shell, status, said in (
        (">/dev/full", 2, "standard output cannot be written: No space left on device"),
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        ("2>&- >&-", 2, ""),
    ):
        if module != "fastres" and status != 2:
            continue
        command = f"'{sys.executable}' -m {module} --help {shell}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == status, done
        assert done.stderr.count("\n") == bool(said)
        assert said in done.stderr
        if module != "fastres":
            break
