"""``fastres predict``: folders, globs, standard input, and images that cannot be read among others."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastres
from fastres.commands.cli import main
from fastres.commands.predict import Text
from fastres.images.transforms import Transforms

DIGITS = ["--model", "resnet20_digits", "--top-k", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("b.png", "a.png", "deep/c.jpg", "deep/d.PNG")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path


def predicted(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]], str]:
    status = main(["predict", *arguments, *DIGITS, "--json"])
    shown = capsys.readouterr()
    return status, json.loads(shown.out), shown.err


def test_a_folder_and_a_glob(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows, said = predicted(["photos"], capsys)
    assert (status, said) == (0, "")
    assert [row["image"] for row in rows] == [
        f"photos/{name}" for name in ("a.png", "b.png", "deep/c.jpg", "deep/d.PNG")
    ]
    paths = [row["image"] for row in rows]
    model = fastres.load("resnet20_digits")
    known = [ranked[0] for ranked in model.predict(paths, top_k=1)]
    assert [row["predictions"] for row in rows] == [
        [{"label": one.label, "index": one.index, "score": pytest.approx(one.score, abs=1e-5)}] for one in known
    ]
    _, rows, _ = predicted(["photos/*.png", "photos/deep/c.jpg"], capsys)
    assert [row["image"] for row in rows] == ["photos/a.png", "photos/b.png", "photos/deep/c.jpg"]


def test_one_bad_image_among_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos" / "aa.jpg").write_bytes(b"nothing")
    os.mkfifo(folder / "pipe.png")
    given = ["https://example.com/cat.jpg", "photos", "none.jpg", "pipe.png", "x*.png", "photos/a.png"]
    status, rows, said = predicted([*given, "--batch-size", "2"], capsys)
    assert status == 1
    assert [row["image"] for row in rows if "error" not in row] == [
        "photos/a.png", "photos/b.png", "photos/deep/c.jpg", "photos/deep/d.PNG", "photos/a.png",
    ]  # fmt: skip
    errors = {row["image"]: row["error"] for row in rows if "error" in row}
    words = {
        given[0]: "is a URL; add --allow-urls to download it",
        "photos/aa.jpg": "is not an image",
        "none.jpg": "does not exist",
        "pipe.png": "is a named pipe",
        "x*.png": "No file matches",
    }
    assert errors.keys() == words.keys()
    assert all(words[name] in error for name, error in errors.items())
    assert said == "".join(f"fastres: {error}\n" for error in errors.values())
    assert main(["predict", *given, *DIGITS]) == 1
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line[0] != " "] == [
        row["image"] for row in rows if row["predictions"]
    ]
    assert shown.err == said


def test_csv_has_a_row_for_each_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos" / 'a "quoted", name.png').write_bytes(b"")
    two = ["photos", "--model", "resnet20_digits", "--top-k", "2"]
    assert main(["predict", *two, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert main(["predict", *two, "--csv"]) == 1
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["image", "error", "label_1", "index_1", "score_1", "label_2", "index_2", "score_2"]
    assert [line[0] for line in lines] == [row["image"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        flat = [str(p[key]) for p in row["predictions"] for key in ("label", "index", "score")]
        assert line[1:] == [row.get("error", ""), *(flat or [""] * 6)]
    with pytest.raises(SystemExit):
        main(["predict", "photos", *DIGITS, "--csv", "--json"])


def test_csv_of_more_classes_than_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "photos/a.png", *DIGITS, "--top-k", "50", "--csv"]) == 0
    header, line = csv.reader(io.StringIO(capsys.readouterr().out))
    assert len(header) == len(line) == 2 + 3 * 10


def test_nothing_but_bad_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    status, rows, said = predicted(["none.jpg", "empty"], capsys)
    assert status == 1
    assert [row["predictions"] for row in rows] == [[], []]
    assert said.count("fastres: ") == said.count("\n") == 2
    assert "glob" not in said


def test_each_image_is_read_once_and_few_at_a_time(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    ahead: list[int] = []
    usual, shown = Transforms.pixels, Text.image

    def pixels(self: Transforms, image: Any) -> Any:
        read.append(image)
        return usual(self, image)

    def show(self: Text, name: str, found: Any) -> None:
        ahead.append(len(read) - len(ahead))
        shown(self, name, found)

    monkeypatch.setattr(Transforms, "pixels", pixels)
    monkeypatch.setattr(Text, "image", show)
    (folder / "photos" / "bad.png").write_bytes(b"")
    assert main(["predict", "photos", "photos/b.png", *DIGITS, "--batch-size", "2"]) == 1
    assert len(read) == 6
    assert max(ahead) == 2


def test_standard_input(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / "photos" / "a.png").read_bytes()
    for content, status, words in (
        (data, 0, ""),
        (b"", 1, "Standard input is empty"),
        (b"x", 1, "'standard input' is not"),
    ):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        found, rows, said = predicted(["-"], capsys)
        assert (found, len(rows), rows[0]["image"]) == (status, 1, "-")
        assert words in said
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    status, rows, said = predicted(["-", "-", "photos/a.png"], capsys)
    assert status == 1
    assert rows[0]["predictions"] == rows[2]["predictions"]
    assert "twice" in rows[1]["error"]
    monkeypatch.setattr(sys, "stdin", None)
    assert predicted(["-"], capsys)[0] == 1


def test_pyarrow_is_not_needed(folder: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\nfrom fastres.commands.cli import main\n"
        f"print(main(['predict', 'photos/a.png', *{DIGITS}]), main(['predict', 'photos', *{DIGITS}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 0"


def test_a_similar_model_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "x.jpg", "--model", "resnext50"]) == 2
    assert "Did you mean 'resnext50_32x4d' or" in capsys.readouterr().err
