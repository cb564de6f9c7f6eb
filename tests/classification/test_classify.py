"""fastres.classify: a row for every image, once, whatever happens on the way."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fastres
from fastres.classification import batches, run, tables, work
from fastres.cli import main
from fastres.errors import (
    ClassifierError,
    FastresError,
    InputError,
    MissingDependencyError,
    OutputError,
    ResumeError,
    SourceError,
    WorkerError,
)

from .conftest import ERRORS, encoded


def classify(source: Any, output: Path, model: fastres.Model, **options: Any) -> fastres.classification.Report:
    return fastres.classify(source, output, model=model, **{"batch_size": 5, "workers": 0, "progress": False} | options)


def failed(table: pa.Table) -> list[str]:
    rows = zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True)
    return [Path(path).name for path, error in rows if error is not None]


def left(output: Path) -> list[str]:
    """What is beside the images and the output."""
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
            expected = model.predict(row["path"], top_k=3)[0]
            assert [row[f"label_{rank}"] for rank in (1, 2, 3)] == [prediction.label for prediction in expected]
            assert [row[f"index_{rank}"] for rank in (1, 2, 3)] == [prediction.index for prediction in expected]
            scores = [row[f"score_{rank}"] for rank in (1, 2, 3)]
            assert scores == pytest.approx([prediction.score for prediction in expected], abs=1e-5)
            pixels = model.transforms.batch(row["path"])
            torch.testing.assert_close(torch.tensor(row["embedding"]), model.embed(pixels)[0], rtol=1e-4, atol=1e-4)
        assert len({row["label_1"] for row in table.to_pylist()}) > 5  # the images are told apart

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
        with pytest.raises(ClassifierError, match="classify needs classes"):
            classify(folder, tmp_path / "out.parquet", headless)
        classify(folder, tmp_path / "out.parquet", headless, top_k=0, embed=True)
        table = pq.read_table(tmp_path / "out.parquet")
        assert table.column_names == ["path", "error", "embedding"]
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)


class TestInterruption:
    def test_two_thousand_images_killed_half_way(
        self, digits: list[Image.Image], photos: list[Image.Image], model: fastres.Model, tmp_path: Path
    ) -> None:
        """A run that is killed outright, then resumed, leaves the same rows as one that is left alone."""
        place = tmp_path / "images"
        place.mkdir()
        variants = [photo.resize((300, 200 + 9 * i)) for i, photo in enumerate(photos * 5)]
        for index in range(2000):
            image = digits[index].resize((32, 32)) if index < 1797 else variants[index % 10]
            data = encoded(image, quality=90)
            (place / f"{index:04}.jpg").write_bytes(data[: len(data) // 2] if index % 100 == 50 else data)
        script = (
            "import fastres, fastres.classification.work as work, sys; work.SHARD_ROWS = 100\n"
            "fastres.classify(sys.argv[1], sys.argv[2], model='resnet20_digits', device='cpu', batch_size=20)"
        )
        killed, whole = tmp_path / "killed.parquet", tmp_path / "whole.parquet"
        process = subprocess.Popen([sys.executable, "-c", script, place, killed])
        folder = tmp_path / "killed.parquet.partial"
        while not list(folder.glob("rows-*-000000001000.parquet")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(OutputError, match=r"1,\d00 rows of an interrupted run"):
            classify(place, killed, model)
        report = classify(place, killed, model, resume=True, batch_size=20)
        assert report.resumed >= 1000
        assert (report.rows, report.errors) == (2000, 20)
        classify(place, whole, model, batch_size=20, workers=2)
        resumed, expected = pq.read_table(killed), pq.read_table(whole)
        assert resumed.drop_columns([f"score_{i}" for i in range(1, 6)]) == expected.drop_columns(
            [f"score_{i}" for i in range(1, 6)]
        )
        assert failed(expected) == [f"{index:04}.jpg" for index in range(50, 2000, 100)]
        assert not folder.exists()

    def test_control_c(self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        script = (
            "import os, signal, sys, fastres.classification.run as run, fastres.cli as cli\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's parent may ignore it
            "original, calls = run._outputs, []\n"
            "def outputs(*given):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 3: os.killpg(0, signal.SIGINT)\n"  # the whole group, as a terminal does
            "    return original(*given)\n"
            "run._outputs = outputs\n"
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        output = tmp_path / "out.csv"
        command = ["classify", str(folder), "-o", str(output), "--model", "resnet20_digits", "--batch-size", "5"]
        given = [sys.executable, "-c", script, *command, "--workers", "1", "--quiet", "--device", "cpu"]
        process = subprocess.run(given, capture_output=True, text=True, start_new_session=True)
        assert process.returncode == 130
        assert "10 of 24 rows are kept" in process.stderr
        assert "Traceback" not in process.stderr
        assert not output.exists()
        assert main([*command, "--resume", "--json", "--quiet", "--workers", "0"]) == 0
        report = json.loads(capfd.readouterr().out)
        assert (report["rows"], report["errors"], report["resumed"]) == (24, 3, 10)
        with output.open(newline="") as file:
            assert len({row["path"] for row in csv.DictReader(file)}) == 24

    @pytest.fixture
    def interrupted(self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An output of which 10 rows are kept."""
        output = tmp_path / "out.parquet"
        self.interrupt(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=r"10 of 24 rows"):
            classify(folder, output, model)
        monkeypatch.undo()
        return output

    @staticmethod
    def interrupt(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        """Raise ``error`` in the place of the third batch's results."""
        original, calls = run._outputs, []

        def outputs(*given: Any) -> Any:
            calls.append(given)
            if len(calls) == 3:
                raise error
            return original(*given)

        monkeypatch.setattr(run, "_outputs", outputs)

    def test_resume_with_other_settings(self, interrupted: Path, folder: Path, model: fastres.Model) -> None:
        for options, message in [
            ({"top_k": 2}, "columns was"),
            ({"decoder": "exact"}, "decoder was 'fast' and is 'exact'"),
            ({"embed": True}, "embedding"),
        ]:
            with pytest.raises(ResumeError, match=message):
                classify(folder, interrupted, model, resume=True, **options)
        other = fastres.load("resnet20_digits")
        with torch.no_grad():
            other.fc.bias[0] += 1
        with pytest.raises(ResumeError, match="weights_sha256"):
            classify(folder, interrupted, other, resume=True)
        assert classify(folder, interrupted, model, resume=True).resumed == 10  # and nothing was lost by asking

    @pytest.mark.parametrize("change", ["added", "removed", "rewritten"])
    def test_resume_with_other_images(self, interrupted: Path, folder: Path, model: fastres.Model, change: str) -> None:
        path = folder / "sub" / "x.jpg"
        if change == "added":
            (folder / "zz.jpg").write_bytes(b"")
        elif change == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes())
        with pytest.raises(ResumeError, match=r"saw other images: .*(x|zz)\.jpg"):
            classify(folder, interrupted, model, resume=True)
        assert classify(folder, interrupted, model, overwrite=True).resumed == 0
        assert pq.read_table(interrupted).num_rows == len([*folder.rglob("[!.]*.jpg")])

    def test_missing_shard(self, interrupted: Path, folder: Path, model: fastres.Model) -> None:
        shards = Path(f"{interrupted}.partial")
        (shards / "rows-000000000000-000000000010.parquet").rename(shards / "rows-000000000005-000000000010.parquet")
        with pytest.raises(ResumeError, match="shards are missing"):
            classify(folder, interrupted, model, resume=True)

    def test_worker_that_dies(self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: Any) -> None:
        original = batches.decoder

        def deadly(name: str) -> Any:
            def decode(source: str, transforms: Any) -> torch.Tensor:
                if source.endswith("l.jpg"):
                    os._exit(3)
                return original(name)(source, transforms)

            return decode

        monkeypatch.setattr(batches, "decoder", deadly)
        output = tmp_path / "out.parquet"
        with pytest.raises(WorkerError, match="of 24 rows are kept"):
            classify(folder, output, model, workers=1)
        monkeypatch.undo()
        report = classify(folder, output, model, resume=True)
        assert (report.rows, report.errors) == (24, 3)

    def test_another_error_keeps_the_rows_too(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupt(monkeypatch, ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            classify(folder, tmp_path / "out.parquet", model)
        monkeypatch.undo()
        assert classify(folder, tmp_path / "out.parquet", model, resume=True).resumed == 10


class TestOutput:
    def test_existing_output(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        output = tmp_path / "out.parquet"
        output.write_text("precious")
        for options in ({}, {"resume": True}):
            with pytest.raises(OutputError, match="exists already"):
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
        """A second run on the same output is turned away, from this process and from another; the first goes on."""
        output, ready, go_on = tmp_path / "out.parquet", threading.Event(), threading.Event()
        original = run._outputs

        def outputs(*given: Any) -> Any:
            ready.set()
            assert go_on.wait(60)
            return original(*given)

        monkeypatch.setattr(run, "_outputs", outputs)
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
        assert f"Another run (process {os.getpid()}) writes" in second.stderr
        assert pq.read_table(output).num_rows == 24
        assert left(output) == []

    @pytest.mark.parametrize("moment", ["shard", "output"])
    def test_full_disk(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        output = tmp_path / "out.parquet"
        monkeypatch.setattr(work, "SHARD_ROWS", 10)
        calls: list[Path] = []

        def full(original: Any, at: int) -> Any:
            def write(first: Any, second: Any, *rest: Any) -> Any:
                calls.append(second)
                if len(calls) == at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(first, second, *rest)

            return write

        if moment == "shard":
            monkeypatch.setattr(work, "write_shard", full(tables.write_shard, 2))
        else:
            monkeypatch.setattr(work, "open_writer", full(tables.open_writer, 1))
        kept = 10 if moment == "shard" else 24
        with pytest.raises(OutputError, match=rf"No space left on device. The first {kept} rows are kept"):
            classify(folder, output, model)
        assert not output.exists()
        assert not list(tmp_path.rglob("*.tmp"))
        monkeypatch.undo()
        report = classify(folder, output, model, resume=True)
        assert (report.rows, report.errors, report.resumed) == (24, 3, kept)

    def test_file_size_limit(self, folder: Path, tmp_path: Path) -> None:
        """The system itself refuses to write on, in the middle of pyarrow's writing."""
        output = tmp_path / "out.jsonl"
        command = ["classify", str(folder), "-o", str(output), "--model", "resnet20_digits", "--top-k", "0", "--embed"]
        process = subprocess.run(
            [sys.executable, "-m", "fastres", *command, "--workers", "0", "--device", "cpu"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 2
        assert "File too large. The first 24 rows are kept" in process.stderr
        assert not output.exists()
        assert main([*command, "--resume", "--quiet", "--workers", "0"]) == 0
        assert len(output.read_text().splitlines()) == 24


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
    with pytest.raises(MissingDependencyError, match=r"simplejpeg: pip install 'fastres\[classify\]'"):
        classify(folder, tmp_path / "out.parquet", model)
    classify(folder, tmp_path / "out.parquet", model, decoder="exact")


def test_import_stays_cheap() -> None:
    code = "import sys, fastres; print([name for name in ('pyarrow', 'simplejpeg', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
