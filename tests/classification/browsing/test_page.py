"""The page of a table: self-contained, escaped, and complete about what it leaves out."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fastres
from fastres.classification.browsing import browse, page, rereading
from fastres.commands.cli import main
from fastres.errors import InputError, OutputError
from tests import html_page
from tests.classification.conftest import BROKEN, ERRORS, classify, encoded
from tests.object_store import upload


class Page(html_page.Page):
    """Also collect the text, and what ``figure`` elements hold: text and picture. Refuse scripts in attributes."""

    def __init__(self, text: str) -> None:
        self.figures: list[tuple[str, str | None]] = []
        self._texts: list[str] = []
        super().__init__(text)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.figures += [("", None)] if tag == "figure" else []
        if tag == "img":
            self.figures[-1] = self.figures[-1][0], dict(attrs)["src"]
        if tag == "input":
            return
        super().handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "title"} & set(self.open):
            self._texts.append(data)
        if "figure" in self.open:
            self.figures[-1] = self.figures[-1][0] + data, self.figures[-1][1]
        super().handle_data(data)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def picture(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))).convert("RGB")


def is_like(uri: str | None, path: Path) -> bool:
    """Return True if a thumbnail shows the image in ``path``."""
    shown = picture(uri)
    expected = Image.open(path).convert("RGB").resize(shown.size)
    pairs = zip(shown.resize((8, 8)).tobytes(), expected.resize((8, 8)).tobytes(), strict=True)
    return sum(abs(one - other) for one, other in pairs) / 192 < 16


def test_the_page_of_a_run(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    report = classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html")
    assert report.html == tmp_path / "t.html"
    assert str(report).endswith(f"the page is {tmp_path / 't.html'}")
    found = read(tmp_path / "t.html")
    table = pq.read_table(tmp_path / "t.parquet").to_pylist()
    sound = {row["path"]: row for row in table if row["error"] is None}
    assert "This page shows 21 images of 24." in found.text
    assert "images per second" in found.text
    assert "resnet20_digits DIGITS_V1" in found.text
    shown = {next(path for path in sound if path in text): (text, uri) for text, uri in found.figures}
    assert shown.keys() == sound.keys()
    for path, (text, uri) in shown.items():
        assert sound[path]["label_1"] in text
        assert max(picture(uri).size) == 160
        assert is_like(uri, Path(path))
    errors = {row["path"]: row["error"] for row in table if row["error"]}
    assert {row[0]: row[1] for row in found.rows if row[0] in errors} == errors
    assert {Path(path).name for path in errors} == set(ERRORS)
    assert not [link for link in found.links if not link.startswith("#")]
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)


def test_only_its_own_script_can_run(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(policy).startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in html.unescape(policy)
    assert "http" not in re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text).replace("http-equiv", "")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("kind", ["glob", "tar", "parquet"])
def test_thumbnails_from_every_source(
    folder: Path, model: fastres.Model, tmp_path: Path, kind: str, suffix: str
) -> None:
    files = sorted(path for path in folder.glob("?.jpg") if path.name not in BROKEN)
    source: Any = f"{folder}/?.jpg"
    options: dict[str, Any] = {}
    if kind == "tar":
        source = [tmp_path / "0.tar", tmp_path / "1.tar"]
        for number, name in enumerate(source):
            with tarfile.open(name, "w") as tar:
                for path in files[number::2]:
                    tar.add(path, path.name)
    elif kind == "parquet":
        source = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
        options = {"image_column": "b"}
        for number, name in enumerate(source):
            content = [path.read_bytes() for path in files[number::2]]
            pq.write_table(pa.table({"a": content[::-1], "b": content}), name, row_group_size=3)
    classify(source, tmp_path / f"t{suffix}", model, **options)
    made = browse(tmp_path / f"t{suffix}", progress=False, **options)
    assert (made.html, made.unread) == (tmp_path / "t.html", 0)
    places = {str(path): path for path in files}
    if kind != "glob":
        sides = [(str(name), files[number::2]) for number, name in enumerate(source)]
        inside = [(name, row, path) for name, side in sides for row, path in enumerate(side)]
        places = {f"{name} › {path.stem if kind == 'tar' else f'row {row}'}": path for name, row, path in inside}
    for text, uri in read(made.html).figures:
        (path,) = [path for name, path in places.items() if re.search(re.escape(name) + r"(?!\d)", text)]
        assert is_like(uri, path), text


def test_thumbnails_from_an_object_store(
    folder: Path, model: fastres.Model, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(folder / "a.jpg", "a.jpg")
    upload(folder, f"{bucket}/images")
    upload(tmp_path, bucket, "0.tar")
    for source in (f"{bucket}/images/", f"{bucket}/0.tar"):
        classify(source, f"{bucket}/t.parquet", model, overwrite=True)
        made = browse(f"{bucket}/t.parquet", tmp_path / "t.html", overwrite=True, progress=False)
        assert made.unread == 0
        for text, uri in read(made.html).figures:
            (name,) = [path.name for path in folder.rglob("*.jpg") if path.name in text or f"› {path.stem}" in text]
            assert is_like(uri, next(folder.rglob(name)))
    with pytest.raises(InputError, match="name the page as well"):
        browse(f"{bucket}/t.parquet")
    monkeypatch.setattr(rereading, "STORED_TARS", 0)
    made = browse(f"{bucket}/t.parquet", tmp_path / "t.html", overwrite=True, progress=False)
    assert made.unread == 1
    assert "of which only 0 are searched for a page" in read(made.html).text


def test_what_cannot_be_read_again_says_why(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.jpg"):
            tar.add(folder / name, name)
    classify(folder, tmp_path / "files.parquet", model)
    classify(tmp_path / "0.tar", tmp_path / "tar.parquet", model)
    (folder / "a.jpg").unlink()
    (folder / "b.jpg").write_bytes(b"damaged")
    (folder / "c.jpg").unlink()
    os.mkfifo(folder / "c.jpg")
    made = browse(tmp_path / "files.parquet", progress=False)
    found = read(made.html)
    assert (made.rows, made.pictures, made.unread, made.errors) == (24, 21, 3, 3)
    assert "3 of them could not be read again" in found.text
    reasons = {name: text for text, uri in found.figures for name in "abc" if uri is None and f"/{name}.jpg" in text}
    assert "No such file or directory" in reasons["a"]
    assert "not an image" in reasons["b"]
    assert "named pipe" in reasons["c"]
    twice = read(browse(tmp_path / "tar.parquet", progress=False).html)
    assert sum("several samples with this key" in text for text, _ in twice.figures) == 2 * 2  # in both views
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(folder / "d.jpg", "z.jpg")
    gone = browse(tmp_path / "tar.parquet", overwrite=True, progress=False)
    assert gone.unread == 3
    (tmp_path / "0.tar").unlink()
    assert (
        "No such file or directory" in read(browse(tmp_path / "tar.parquet", overwrite=True, progress=False).html).text
    )


HOSTILE = [
    "</script><script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "new\nline\r",
    "x" * 10_000,
    "{{ 7*7 }}{% raw %}",
    "--><!--",
    "\x1b[31m nul\x00",
    "\u202e right to left",
]


def test_hostile_names(tmp_path: Path) -> None:
    count = len(HOSTILE)
    table = pa.table(
        {
            "path": HOSTILE * 2,
            "error": pa.array([None] * count + HOSTILE, pa.string()),
            "label_1": pa.array(HOSTILE + [None] * count, pa.string()),
            "index_1": pa.array([*range(count), *[None] * count], pa.int32()),
            "score_1": pa.array([0.5] * count + [None] * count, pa.float32()),
        }
    )
    facts = {"model": HOSTILE[0], "weights": HOSTILE[1], "source": HOSTILE, "image_column": 7}
    pq.write_table(table.replace_schema_metadata({"fastres": json.dumps(facts)}), tmp_path / "t.parquet")
    made = browse(tmp_path / "t.parquet", progress=False)
    assert made.unread == count
    text = made.html.read_text(encoding="utf-8")
    found = Page(text)
    assert text.count("<script>") == 1
    assert "img" not in found.tags
    assert "49" not in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    for name in HOSTILE[:2] + HOSTILE[3:6]:
        assert any(name in each for each, _ in found.figures)
        assert any(row[0] == name for row in found.rows)


def test_names_that_are_not_utf8(model: fastres.Model, digits: list[Image.Image], tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.mkdir()
    for name in (b"caf\xe9.jpg", rb"caf\xe9.jpg", "café.jpg".encode()):
        path = source / os.fsdecode(name)
        path.write_bytes(encoded(digits[0]))
    classify(source, tmp_path / "t.parquet", model)
    made = browse(tmp_path / "t.parquet", progress=False)
    assert (made.pictures, made.unread) == (3, 0)


def test_what_is_left_out_is_said(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastres.classification.browsing.choosing.ERRORS", 2)
    monkeypatch.setattr(page, "CLASSES", 3)
    classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html", html_pictures=4)
    found = read(tmp_path / "t.html")
    classes = len({row["index_1"] for row in pq.read_table(tmp_path / "t.parquet").to_pylist()} - {None})
    assert len(found.sources) == 4
    assert "This page shows 4 images of 24. The filter finds only these" in found.text
    assert "--html-pictures 40 --overwrite" in found.text
    assert f"of {classes}." in found.text
    assert f"The 3 largest of {classes}; the others are in the table." in found.text
    assert "The first 2 of 3; the others are the rows of the table" in found.text


def test_shards_have_a_page_when_they_are_joined(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="a shard, which has no table"):
        classify(folder, tmp_path / "t.parquet", model, shard="1/1", html=tmp_path / "t.html")
    classify(folder, tmp_path / "t.parquet", model, shard="1/1")
    monkeypatch.chdir(tmp_path)
    assert main(["classify", "--join", "t.parquet", "--html", "t.html", "--quiet"]) == 0
    assert len(read(tmp_path / "t.html").sources) >= 21


def test_the_command(folder: Path, model: fastres.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, made = str(tmp_path / "t.csv"), str(tmp_path / "t.html")
    classify(folder, Path(table), model)
    assert main(["classify", "--browse", table, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{made}: 21 of 24 images, 3 errors\n"
    assert main(["classify", "--browse", table, "--quiet"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["classify", "--browse", table, "--overwrite", "--html-pictures", "4", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == {"html": made, "rows": 24, "errors": 3, "pictures": 4, "unread": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--browse", "t.csv", "-o", "x.csv"], "leave out -o"),
        (["--browse", "t.csv", "--resume"], "leave out --resume"),
        (["images", "-o", "t.csv", "--html-pictures", "3"], "works only with --html or --browse"),
        (["images", "-o", "t.csv", "--html", "t.html", "--dry-run"], "--dry-run writes nothing"),
        (["images", "-o", "t.csv", "--html", "t.html", "--top-k", "0", "--embed"], "--top-k is 0"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["classify", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, model: fastres.Model, tmp_path: Path
) -> None:
    (tmp_path / "there.html").write_text("mine")
    source = folder / "a.html"
    source.write_bytes((folder / "a.jpg").read_bytes())
    refused = {
        "there.html": (OutputError, "already exists"),
        "t.txt": (InputError, "ends in .html"),
        "s3://bucket/t.html": (InputError, "a local file"),
        "no folder/t.html": (OutputError, "does not exist"),
    }
    for name, (error, message) in refused.items():
        with pytest.raises(error, match=message):
            classify(folder, tmp_path / "t.parquet", model, html=name if "://" in name else tmp_path / name)
    with pytest.raises(OutputError, match="is the input"):
        classify(source, tmp_path / "t.parquet", model, html=source, overwrite=True)
    with pytest.raises(InputError, match="top_k=0"):
        classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html", top_k=0, embed=True)
    with pytest.raises(InputError, match="pictures is 0"):
        classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html", html_pictures=0)
    assert not (tmp_path / "t.parquet").exists()
    assert (tmp_path / "there.html").read_text() == "mine"


def test_the_table_stays_if_the_page_fails(
    folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(Path, "write_text", fail)
    for raised in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        kind = KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else OutputError
        with pytest.raises(kind, match=r"table is complete.* fastres classify --browse .*t\.parquet"):
            classify(folder, tmp_path / "t.parquet", model, html=tmp_path / "t.html", overwrite=True)
        assert pq.read_table(tmp_path / "t.parquet").num_rows == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "t.parquet"]
