"""Everything works without standard error and standard output: if they are missing, closed, or can only be written."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastres
from fastres.commands.cli import main
from fastres.export.onnx import export
from fastres.terminal import is_terminal, progress_bar
from fastres.weights.fitting import FreshHeadWarning

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


class OnlyWrites:
    """What some wrappers and services put in place of a stream."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def closed() -> io.StringIO:
    stream = Terminal()
    stream.close()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {"missing": lambda: None, "closed": closed, "only writes": OnlyWrites}
every_stream = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((40, 40, 3), 80 * index, np.uint8)).save(folder / f"{index}.png")
    return folder


def test_what_is_a_terminal() -> None:
    assert is_terminal(Terminal())
    for stream in (None, closed(), OnlyWrites(), io.StringIO(), object()):
        assert not is_terminal(stream)


def test_bars_are_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, disable, shown in (
        (Terminal(), False, True), (Terminal(), None, True), (Terminal(), True, False),
        (io.StringIO(), False, True), (io.StringIO(), None, False),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar([1, 2], desc="counting", disable=disable)) == [1, 2]
        assert ("counting" in stream.getvalue()) == shown


@every_stream
def test_without_a_terminal(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    for disable in (None, False, True):
        with progress_bar(total=2, desc="counting", disable=disable) as bar:
            bar.set_postfix(errors=0)
            bar.update()


def test_warnings() -> None:
    """In a process of its own, because pytest records warnings instead of printing them."""
    code = (
        "import io, sys; from fastres.terminal import warn; usual, closed = sys.stderr, io.StringIO(); closed.close()\n"
        "for sys.stderr in (None, closed): warn('not shown', UserWarning)\n"
        "sys.stderr = usual; warn('look out', UserWarning); print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout == "done\n", result.stderr
    assert "<string>:3: UserWarning: look out" in result.stderr
    assert "not shown" not in result.stderr


@every_stream
def test_the_library(make: Callable[[], Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastres.load("resnet20_digits")
    images = sorted(pictures.iterdir())
    monkeypatch.setattr(sys, "stderr", make())
    monkeypatch.setattr(sys, "stdout", make())
    for progress in (None, True):
        assert len(model.predict(images, batch_size=1, progress=progress)) == 3
        options: dict[str, Any] = {"workers": 0, "decoder": "exact", "overwrite": True, "progress": progress}
        assert fastres.classify(pictures, tmp_path / "a.csv", model=model, **options).rows == 3
    assert model.transforms.batch(images, progress=True).shape[0] == 3
    export(model, tmp_path / "a.onnx", verify=False)
    with pytest.warns(FreshHeadWarning):
        fastres.load("resnet20_digits", num_classes=3)


@every_stream
def test_the_commands(make: Callable[[], Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = str(pictures / "0.png")
    with_model = ["--model", "resnet20_digits"]
    shown = 0 if make is OnlyWrites else 2  # the text is all that predict has
    for arguments, status in (
        (["predict", photo, *with_model], shown),
        (["predict", photo, *with_model, "--top-k", "0"], 2),
        (["predict", "nowhere.png", *with_model], 1 if make is OnlyWrites else 2),
        (["look", photo, *with_model, "-o", str(tmp_path / "a.svg")], 0),
        (["classify", str(pictures), *with_model, "-o", str(tmp_path / "a.csv"), "--workers", "0"], 0),
        (["export", "resnet20_digits", str(tmp_path / "a.onnx"), "--no-verify"], 0),
    ):
        monkeypatch.setattr(sys, "stderr", make())
        monkeypatch.setattr(sys, "stdout", make())
        assert main(arguments) == status


def test_a_stream_that_only_writes_gets_the_text(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", OnlyWrites())
    assert main(["predict", str(pictures / "0.png"), "--top-k", "0"]) == 2
    assert sys.stderr.text == "fastres: --top-k is 0; give a whole number of at least 1\n"  # type: ignore[attr-defined]


def test_no_other_file_asks_a_stream_or_makes_a_bar() -> None:
    """One place decides where bars appear. bench/visit sets tqdm's lock; comparison.py only names the type."""
    for folder in ("fastres", "kernels", "export", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name != "terminal.py":
                assert not re.search(r"\.isatty\(|\btqdm\(|warnings\.warn\(", text), path
