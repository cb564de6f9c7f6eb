"""fastres.classify: exactly one row for every image, whatever fails."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fastres
from fastres.classification import job, parts, work
from fastres.commands.cli import main
from fastres.errors import (
    ClassifierError,
    FastresError,
    InputError,
    MissingDependencyError,
    OutputError,
    SourceError,
)

from .conftest import ERRORS, classify, failed


def left(output: Path) -> list[str]:
    """The files other than the images and the output."""
    return sorted(path.name for path in output.parent.iterdir() if path.name not in (output.name, "images"))


class TestRows:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_what_predict_says(self, folder: Path, model: fastres.Model, tmp_path: Path, workers: int) -> None:
        output = tmp_path / "out.parquet"
        report = classify(folder, output, model, decoder="exact", top_k=3, embed=True, workers=workers)
        table = pq.read_table(output)
        assert (report.rows, report.errors, report.resumed) == (table.num_rows, 3, 0) == (24, 3, 0)
        assert failed(table) == ERRORS
        assert left(output) == []
        for row in table.to_pylist():
            if row["error"] is not None:
                assert all(value is None for name, value in row.items() if name not in ("path", "error"))
                assert Path(row["path"]).name in row["error"]
                continue
            expected = model.predict(row["path"], top_k=3)
            assert [row[f"label_{rank}"] for rank in (1, 2, 3)] == [prediction.label for prediction in expected]
            assert [row[f"index_{rank}"] for rank in (1, 2, 3)] == [prediction.index for prediction in expected]
            scores = [row[f"score_{rank}"] for rank in (1, 2, 3)]
            assert scores == pytest.approx([prediction.score for prediction in expected], abs=1e-5)
            pixels = model.transforms.batch(row["path"])
            torch.testing.assert_close(torch.tensor(row["embedding"]), model.embed(pixels)[0], rtol=1e-4, atol=1e-4)
        assert len({row["label_1"] for row in table.to_pylist()}) > 5  # the model distinguishes the images

    def test_fast_decoder_agrees(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        found = []
        for decoder in ("exact", "fast"):
            classify(folder, tmp_path / f"{decoder}.parquet", model, decoder=decoder)
            found.append(pq.read_table(tmp_path / f"{decoder}.parquet"))
        assert found[0]["label_1"] == found[1]["label_1"]
        assert found[0]["error"] == found[1]["error"]

    def test_csv_and_json_lines_hold_the_same(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        for suffix in ("parquet", "csv", "jsonl"):
            classify(folder, tmp_path / f"out.{suffix}", model, top_k=2)
        rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert lines == rows
        with (tmp_path / "out.csv").open(newline="") as file:
            texts = list(csv.DictReader(file))
        assert [text["label_1"] for text in texts] == [row["label_1"] or "" for row in rows]
        assert [text["error"] for text in texts] == [row["error"] or "" for row in rows]
        assert float(texts[0]["score_1"]) == pytest.approx(rows[0]["score_1"])

    def test_metadata_says_what_made_them(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        classify(folder, tmp_path / "out.parquet", model)
        noted = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"fastres"])
        assert noted["model"] == "resnet20_digits"
        assert noted["weights"] == model.weights
        assert noted["version"] == fastres.__version__
        assert noted["decoder"] == "fast"

    def test_tar_and_parquet(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        classify(folder, tmp_path / "files.parquet", model)
        files = pq.read_table(tmp_path / "files.parquet")
        contents = [Path(path).read_bytes() for path in files["path"].to_pylist()]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for index, content in enumerate(contents):
                member = tarfile.TarInfo(f"{index:03}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        columns = {"image": contents, "id": [f"n{i}" for i in range(24)], "tags": [["a"]] * 24}
        pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=7)
        classify(tmp_path / "x.tar", tmp_path / "tar.parquet", model, workers=2)
        classify(tmp_path / "x.parquet", tmp_path / "rows.parquet", model, columns=["id", "tags"], workers=2)
        tar, rows = pq.read_table(tmp_path / "tar.parquet"), pq.read_table(tmp_path / "rows.parquet")
        assert tar["key"].to_pylist() == [f"{i:03}" for i in range(24)]
        assert rows["id"].to_pylist() == columns["id"]
        assert rows["tags"].to_pylist() == columns["tags"]
        for table in (tar, rows):
            assert table["label_1"] == files["label_1"]
            assert table["error"].is_null() == files["error"].is_null()

    def test_embeddings_alone(self, folder: Path, tmp_path: Path) -> None:
        headless = fastres.load("resnet20_digits", num_classes=0)
        with pytest.raises(ClassifierError, match="classify needs a classifier"):
            classify(folder, tmp_path / "out.parquet", headless)
        classify(folder, tmp_path / "out.parquet", headless, top_k=0, embed=True)
        table = pq.read_table(tmp_path / "out.parquet")
        assert table.column_names == ["path", "error", "embedding"]
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)


class TestOutput:
    def test_existing_output(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        output = tmp_path / "out.parquet"
        output.write_text("precious")
        for options in ({}, {"resume": True}):
            with pytest.raises(OutputError, match="already exists"):
                classify(folder, output, model, **options)
        assert output.read_text() == "precious"
        assert left(output) == []
        classify(folder, output, model, overwrite=True)
        assert pq.read_table(output).num_rows == 24

    @pytest.mark.parametrize(("name", "message"), [("out.txt", r"\.parquet"), ("no/out.csv", "No such file")])
    def test_unwritable(self, folder: Path, model: fastres.Model, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(OutputError, match=message):
            classify(folder, tmp_path / name, model)

    def test_refused_source_leaves_nothing(self, model: fastres.Model, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        with pytest.raises(SourceError, match="no images"):
            classify(tmp_path / "images", tmp_path / "out.parquet", model)
        assert left(tmp_path / "out.parquet") == []

    def test_two_runs(self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: Any) -> None:
        """A second run on the same output is refused, in this process and in another one. The first run continues."""
        output, ready, go_on = tmp_path / "out.parquet", threading.Event(), threading.Event()
        original = job.classified

        def outputs(*given: Any) -> Any:
            ready.set()
            assert go_on.wait(60)
            return original(*given)

        monkeypatch.setattr(job, "classified", outputs)
        first = threading.Thread(target=classify, args=(folder, output, model))
        first.start()
        assert ready.wait(60)
        try:
            with pytest.raises(OutputError, match="Another run in this process"):
                classify(folder, output, model, overwrite=True)
            command = [sys.executable, "-m", "fastres", "classify", folder, "-o", output, "--model", "resnet20_digits"]
            second = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
        finally:
            go_on.set()
            first.join()
        assert second.returncode == 2
        assert f"Another run (process {os.getpid()}) is writing" in second.stderr
        assert pq.read_table(output).num_rows == 24
        assert left(output) == []

    @pytest.mark.parametrize("moment", ["part", "output"])
    def test_full_disk(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        output = tmp_path / "out.parquet"
        monkeypatch.setattr(parts, "PART_ROWS", 10)
        original = work.Work.writing

        @contextmanager
        def full(self: work.Work, target: Path) -> Iterator[BinaryIO]:
            with original(self, target) as file:
                yield file
                if target.name == "output" or target.name.endswith("-000000000020.parquet"):
                    raise OSError(errno.ENOSPC, "No space left on device")

        if moment == "output":
            monkeypatch.setattr(parts, "PART_ROWS", 1000)
        monkeypatch.setattr(work.Work, "writing", full)
        kept = 10 if moment == "part" else 24
        with pytest.raises(OutputError, match=rf"No space left on device. {kept} rows are kept"):
            classify(folder, output, model)
        assert not output.exists()
        assert not list(tmp_path.rglob("*.tmp"))
        monkeypatch.undo()
        report = classify(folder, output, model, resume=True)
        assert (report.rows, report.errors, report.resumed) == (24, 3, kept)

    def test_file_size_limit(self, folder: Path, tmp_path: Path) -> None:
        """The operating system refuses to write more while pyarrow writes the output, longer than its part."""
        output = tmp_path / "out.parquet"
        options = ["--model", "resnet20_digits", "--top-k", "0", "--embed", "--workers", "0", "--device", "cpu"]
        assert main(["classify", str(folder), "-o", str(tmp_path / "whole.parquet"), *options, "--quiet"]) == 0
        whole = (tmp_path / "whole.parquet").read_bytes()
        command = ["classify", str(folder), "-o", str(output), *options]
        process = subprocess.run(
            [sys.executable, "-m", "fastres", *command],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 300,) * 2),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 2
        assert "File too large. 24 rows are kept" in process.stderr
        assert not output.exists()
        assert main([*command, "--resume", "--quiet"]) == 0
        assert output.read_bytes() == whole

    def test_parts_are_read_without_threads_that_outlive_the_program(self, folder: Path, tmp_path: Path) -> None:
        """Those of ``pyarrow.dataset`` aborted one program in fifty that ended soon after."""
        code = (
            "import sys, fastres\n"
            "fastres.classify(*sys.argv[1:], model='resnet20_digits', workers=0, device='cpu', progress=False)\n"
            "print('pyarrow.dataset' in sys.modules)"
        )
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out.jsonl")]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, InputError, "top_k"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"workers": -1}, InputError, "workers"),
        ({"decoder": "quick"}, InputError, "'exact' or 'fast'"),
        ({"device": "cpu"}, InputError, "loaded model"),
        ({"output": "out.csv", "embed": True}, InputError, "CSV"),
        ({"columns": ["id"]}, SourceError, "Parquet"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], error: type[FastresError], message: str, folder: Path, model: fastres.Model, tmp_path: Path
) -> None:
    output = tmp_path / options.pop("output", "out.parquet")
    with pytest.raises(error, match=message):
        classify(folder, output, model, **options)
    assert left(output) == []


def test_missing_package(folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "simplejpeg" else name)
    with pytest.raises(MissingDependencyError, match=r"simplejpeg.*\[classify\]'\. Or use decoder='exact'"):
        classify(folder, tmp_path / "out.parquet", model)
    classify(folder, tmp_path / "out.parquet", model, decoder="exact")


def test_import_stays_cheap() -> None:
    code = "import sys, fastres; print([name for name in ('pyarrow', 'simplejpeg', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
