"""Outputs in object stores: the table of one process, complete or not there at all, whatever the network does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fastres
from fastres.classification import parts
from fastres.classification.requests import Request
from fastres.commands.cli import main
from fastres.errors import InputError, OutputError, ResumeError, StorageError
from fastres.storage import objects
from tests.object_store import CUT, RESET, UNAVAILABLE, Faults, upload

from .conftest import classify, encoded
from .test_interruption import interrupt


@pytest.fixture
def whole(folder: Path, model: fastres.Model, tmp_path: Path) -> bytes:
    """The output of one process, as a local file."""
    classify(folder, tmp_path / "whole.parquet", model)
    return (tmp_path / "whole.parquet").read_bytes()


def content(url: str) -> bytes:
    data = objects.read_many([(url, 0, 1 << 30)])[0]
    assert isinstance(data, bytes)
    return data


def names(bucket: str) -> list[str]:
    return sorted(found.url.removeprefix(f"{bucket}/") for found in objects.listed(f"{bucket}/"))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_one_process_writes_the_same_table(
    folder: Path, model: fastres.Model, tmp_path: Path, bucket: str, suffix: str
) -> None:
    classify(folder, tmp_path / f"one{suffix}", model)
    report = classify(folder, f"{bucket}/out/table{suffix}", model)
    assert str(report).startswith(f"{bucket}/out/table{suffix}: 24 rows, 3 with errors, 1 images skipped")
    table = content(f"{bucket}/out/table{suffix}")
    assert table == (tmp_path / f"one{suffix}").read_bytes()
    assert names(bucket) == [f"out/table{suffix}", f"out/table{suffix}.manifest.json"]
    assert json.loads(content(f"{bucket}/out/table{suffix}.manifest.json"))["bytes"] == len(table)
    with pytest.raises(OutputError, match="already exists; use another output, or --overwrite"):
        classify(folder, f"{bucket}/out/table{suffix}", model)
    assert classify(folder, f"{bucket}/out/table{suffix}", model, resume=True).resumed == 24
    assert classify(folder, f"{bucket}/out/table{suffix}", model, overwrite=True).resumed == 0
    assert content(f"{bucket}/out/table{suffix}") == table


def test_shards_from_and_to_a_store(
    folder: Path, model: fastres.Model, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(folder, f"{bucket}/images")
    expected = classify(f"{bucket}/images", f"{bucket}/one.csv", model)
    common = [f"{bucket}/images", "-o", f"{bucket}/out.csv", "--model", "resnet20_digits", "--quiet"]
    common += ["--batch-size", "5", "--workers", "0"]
    assert main(["classify", *common, "--shard", "2/2"]) == 0
    assert main(["classify", "--join", f"{bucket}/out.csv"]) == 2
    said = capsys.readouterr()
    assert f"shard 2/2 of {bucket}/out.csv: 14 rows" in said.out
    assert "10 of 24 rows" in said.err
    assert "Run these shards again: --shard 1/2." in said.err
    assert main(["classify", *common, "--dry-run", "--shard", "1/2"]) == 0
    assert "2/2    10 to 24      14        14" in capsys.readouterr().out
    assert main(["classify", *common, "--shard", "1/2"]) == 0
    assert main(["classify", "--join", f"{bucket}/out.csv"]) == 0
    assert f"{bucket}/out.csv: 24 rows" in capsys.readouterr().out
    assert content(f"{bucket}/out.csv") == content(f"{bucket}/one.csv")
    assert not [name for name in names(bucket) if ".partial" in name]
    assert expected.errors == 3


def test_an_interrupted_run_goes_on(
    folder: Path, model: fastres.Model, bucket: str, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = f"{bucket}/out.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", 5)
        interrupt(patch, KeyboardInterrupt())
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted: 10 of 24 rows are kept in .*; run the command again"
        ):
            classify(folder, output, model)
    assert len([name for name in names(bucket) if "/rows-" in name]) == 2
    assert classify(folder, output, model).resumed == 10
    assert content(output) == whole
    assert names(bucket) == ["out.parquet", "out.parquet.manifest.json"]


@pytest.mark.parametrize("kind", [UNAVAILABLE, RESET, CUT])
def test_a_network_that_fails_for_a_moment_changes_nothing(
    folder: Path, model: fastres.Model, bucket: str, whole: bytes, faults: Faults, kind: str
) -> None:
    for method in ("GET", "PUT", "POST"):
        if kind == CUT and method != "GET":
            continue
        faults.first(1, kind, method)
        classify(folder, f"{bucket}/{method}.parquet", model)
        assert content(f"{bucket}/{method}.parquet") == whole


def test_a_network_that_fails_for_good_leaves_no_output(
    folder: Path, model: fastres.Model, bucket: str, whole: bytes, faults: Faults
) -> None:
    output = f"{bucket}/out.parquet"
    classify(folder, output, model, shard="1/1")
    faults.fault = lambda method, path: UNAVAILABLE if method in ("PUT", "POST") and "partial" not in path else None
    with pytest.raises(StorageError, match=r"out\.parquet' cannot be written"):
        fastres.join_shards(output, progress=False)
    faults.fault = lambda method, path: UNAVAILABLE if method == "GET" and "rows-" in path else None
    with pytest.raises(StorageError, match=r"rows-.* cannot be read"):
        fastres.join_shards(output, progress=False)
    faults.fault = lambda method, path: None
    assert "out.parquet" not in names(bucket)
    fastres.join_shards(output, progress=False)
    assert content(output) == whole


def test_several_processes(tmp_path: Path, digits: list[Image.Image], bucket: str) -> None:
    """Processes of their own list, read and write in the store."""
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(digits[number]))
    upload(tmp_path, f"{bucket}/images")
    options: dict[str, Any] = {"model": "resnet20_digits", "batch_size": 2, "workers": 0, "progress": False}
    fastres.classify(f"{bucket}/images", tmp_path / "one.parquet", device="cpu", **options)
    report = fastres.classify(f"{bucket}/images", f"{bucket}/two.parquet", processes=2, device="cpu", **options)
    assert report.rows == 40
    assert content(f"{bucket}/two.parquet") == (tmp_path / "one.parquet").read_bytes()


class TestErrors:
    def test_bad_urls(self, folder: Path, model: fastres.Model) -> None:
        with pytest.raises(OutputError, match="use a name that ends in"):
            classify(folder, "s3://bucket/out.txt", model)
        with pytest.raises(OutputError, match=r"is a bucket; write bucket and name, such as 's3://bucket/photos"):
            classify(folder, "S3://out.parquet", model)
        with pytest.raises(OutputError, match="is on a web server"):
            classify(folder, "https://host/out.parquet", model, processes=2)
        for options in ({}, {"shard": "1/2"}):
            with pytest.raises(OutputError, match="neither a file nor a URL; a URL has two slashes"):
                classify(folder, Path("s3://bucket/out.parquet"), model, **options)
        with pytest.raises(InputError, match="is incomplete"):
            classify(folder, "s3://", model, shard="1/2")
        with pytest.raises(InputError, match="has a password in it"):
            fastres.join_shards("s3://key:secret@bucket/out.parquet")

    def test_a_secret_in_a_source_is_not_written_down(self) -> None:
        request = Request(["https://host/x.tar?token=abc", "photos"], ".csv")
        assert request.source_texts == ["https://host/x.tar?token=…", "photos"]
        assert "abc" not in str(request.arguments)

    def test_a_missing_bucket(self, folder: Path, model: fastres.Model, bucket: str) -> None:
        with pytest.raises(StorageError, match="nowhere"):
            classify(folder, "s3://nowhere/out.parquet", model)

    def test_somebody_elses_objects_are_left_alone(self, folder: Path, model: fastres.Model, bucket: str) -> None:
        objects.write(f"{bucket}/out.parquet.partial/diary.txt", b"mine")
        with pytest.raises(OutputError, match=r"holds 'diary\.txt', which fastres has not written"):
            classify(folder, f"{bucket}/out.parquet", model)
        assert names(bucket) == ["out.parquet.partial/diary.txt"]

    def test_an_input_is_no_output(self, model: fastres.Model, tmp_path: Path, bucket: str) -> None:
        pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "x.parquet")
        upload(tmp_path, bucket)
        for source in ("x.parquet", "*.parquet"):
            with pytest.raises(OutputError, match=r"The output 's3://photographs/x\.parquet' is the input"):
                classify(f"{bucket}/{source}", f"{bucket}/x.parquet", model, overwrite=True)
        assert content(f"{bucket}/x.parquet") == (tmp_path / "x.parquet").read_bytes()
        assert names(bucket) == ["x.parquet"]

    def test_other_settings(self, folder: Path, model: fastres.Model, bucket: str) -> None:
        classify(folder, f"{bucket}/out.parquet", model, shard="1/2")
        with pytest.raises(ResumeError, match="decoder was 'fast' and is now 'exact'"):
            classify(folder, f"{bucket}/out.parquet", model, decoder="exact")
        classify(folder, f"{bucket}/out.parquet", model, decoder="exact", overwrite=True)
        assert names(bucket) == ["out.parquet", "out.parquet.manifest.json"]
