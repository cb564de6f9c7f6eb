"""Runs in shards: whatever happens to their processes, they give the table of one process, byte for byte."""

from __future__ import annotations

import base64
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastres
from fastres.classification import parts, places
from fastres.commands.cli import main
from fastres.errors import OutputError, ResumeError, ResumeWarning, SourceError

from .conftest import classify
from .test_interruption import interrupt


@pytest.fixture
def whole(folder: Path, model: fastres.Model, tmp_path: Path) -> bytes:
    """The output of one process."""
    classify(folder, tmp_path / "whole.parquet", model)
    return (tmp_path / "whole.parquet").read_bytes()


def work_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def sidecar(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_joined_shards_are_the_table_of_one_process(
    folder: Path, model: fastres.Model, tmp_path: Path, suffix: str, count: int
) -> None:
    one, output = tmp_path / f"one{suffix}", tmp_path / f"out{suffix}"
    expected = classify(folder, one, model)
    numbers = list(range(1, count + 1))
    random.Random(count).shuffle(numbers)
    reports = [classify(folder, output, model, shard=(number, count)) for number in numbers]
    assert [report.missing for report in reports][-1] == 0
    assert sum(report.rows for report in reports) == 24
    assert not output.exists()
    report = fastres.join_shards(output, progress=False)
    assert output.read_bytes() == one.read_bytes()
    assert (report.rows, report.errors, report.skipped) == (24, expected.errors, expected.skipped)
    assert not work_folder(output).exists()
    manifest = json.loads(sidecar(output).read_text())
    assert (manifest["images"], manifest["errors"], manifest["bytes"]) == (24, 3, output.stat().st_size)


def test_shards_run_again_and_late_change_nothing(
    folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
) -> None:
    output = tmp_path / "out.parquet"
    for number in (1, 2, 2, 1):
        classify(folder, output, model, shard=(number, 2))
    report = classify(folder, output, model, shard=(1, 1))
    assert (report.rows, report.resumed, report.errors) == (24, 24, 3)
    fastres.join_shards(output, progress=False)
    assert output.read_bytes() == whole
    again = fastres.join_shards(output, progress=False)
    assert (again.rows, again.errors) == (24, 3)
    late = classify(folder, output, model, shard=(1, 2))
    assert (late.rows, late.resumed, late.errors, late.shard) == (24, 24, 3, None)
    assert output.read_bytes() == whole
    assert not work_folder(output).exists()


def test_any_number_of_shards_can_complete_a_run(
    folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"
    monkeypatch.setattr(parts, "PART_ROWS", 5)
    classify(folder, output, model, shard="2/3")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, KeyboardInterrupt(), batch=2)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted: 5 of 24 rows are kept in .*; run the command again"):
            classify(folder, output, model, shard="1/1")
    missing = r"9 of 24 rows of .* are missing: rows 15 to 24\. Run these shards again: --shard 3/3\. Rows that"
    with pytest.raises(ResumeError, match=missing):
        fastres.join_shards(output, progress=False)
    assert not output.exists()
    report = classify(folder, output, model, shard="2/2")
    assert (report.rows, report.resumed) == (14, 5)
    fastres.join_shards(output, progress=False)
    assert output.read_bytes() == whole


def test_damaged_parts_are_never_used(
    folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 5)
    output = tmp_path / "out.parquet"
    classify(folder, output, model, shard="1/1")
    broken = sorted(work_folder(output).glob("rows-*-000000000005-*"))[0]
    content = broken.read_bytes()
    broken.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    (work_folder(output) / "rows-0123456789abcdef-000000000000-000000000024.parquet").write_bytes(whole)
    with pytest.raises(ResumeError, match=r"5 of 24 rows .*: rows 5 to 10 \(2 parts are damaged: .*--shard 1/1"):
        fastres.join_shards(output, progress=False)
    with pytest.warns(ResumeWarning, match="5 rows in .* are damaged, and are computed again"):
        report = classify(folder, output, model, shard="1/1")
    assert (report.recomputed, report.resumed) == (5, 19)
    with pytest.warns(ResumeWarning, match="were not used, because others have the same rows"):
        fastres.join_shards(output, progress=False)
    assert output.read_bytes() == whole
    assert not work_folder(output).exists()


class TestOneRun:
    """All processes of a run must mean the same one."""

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"top_k": 2}, r"columns was \["),
            ({"decoder": "exact"}, "decoder was 'fast' and is now 'exact'"),
            ({"batch_size": 6}, "batch_size was 5 and is now 6"),
        ],
        ids=lambda value: str(value)[:12],
    )
    def test_other_settings_are_refused(
        self, folder: Path, model: fastres.Model, tmp_path: Path, options: dict[str, Any], what: str
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/2")
        with pytest.raises(ResumeError, match=f"belongs to a run with other settings .*{what}"):
            classify(folder, output, model, shard="2/2", **options)
        with pytest.raises(ResumeError, match="source was"):
            classify([folder, folder / "sub"], output, model, shard="2/2")

    def test_the_batch_size_of_the_first_process_holds_for_all(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/2")
        classify(folder, output, model, shard="2/2", batch_size=None)
        fastres.join_shards(output, progress=False)
        assert output.read_bytes() == whole

    def test_images_are_listed_once(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/2")
        (folder / "new.jpg").write_bytes((folder / "a.jpg").read_bytes())
        (folder / "v.jpg").unlink()
        assert classify(folder, output, model, shard="2/2").rows == 14
        report = fastres.join_shards(output, progress=False)
        table = pq.read_table(output)
        assert (report.rows, report.errors) == (24, 4)
        assert (
            "changed after it was listed"
            in dict(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))[str(folder / "v.jpg")]
        )

    def test_a_machine_without_the_images_or_with_others_makes_no_errors_of_them(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/2")
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(SourceError, match=r"does not have the images that were listed, such as .*k\.jpg"):
            classify(folder, output, model, shard="2/2")
        shutil.copytree(tmp_path / "elsewhere", folder, copy_function=shutil.copyfile)  # without the times
        with pytest.raises(SourceError, match=r"not those that were listed, such as .*k\.jpg.*rsync -a"):
            classify(folder, output, model, shard="2/2")
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "elsewhere", folder)
        classify(folder, output, model, shard="2/2")
        fastres.join_shards(output, progress=False)
        assert output.read_bytes() == whole

    def test_a_run_of_one_process_is_left_alone(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                classify(folder, output, model)
        with pytest.raises(OutputError, match="rows of an interrupted run that has no shards"):
            classify(folder, output, model, shard="1/2")
        with pytest.raises(OutputError, match="rows of an interrupted run that has no shards"):
            fastres.join_shards(output, progress=False)
        classify(folder, output, model, resume=True)
        assert output.read_bytes() == whole

    def test_one_process_leaves_a_run_in_shards_alone(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/2")
        for options in ({}, {"resume": True}):
            with pytest.raises(OutputError, match="rows of a run in shards; continue it with --shard"):
                classify(folder, output, model, **options)
        classify(folder, output, model, overwrite=True)
        assert output.read_bytes() == whole
        assert not work_folder(output).exists()

    def test_somebody_elses_folder_is_refused(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        output = tmp_path / "out.parquet"
        work_folder(output).mkdir()
        (work_folder(output) / "diary.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"holds 'diary.txt', which fastres has not written"):
            classify(folder, output, model, shard="1/2")

    def test_a_failed_start_leaves_nothing_behind(self, model: fastres.Model, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(SourceError, match="There are no images"):
            classify(tmp_path / "empty", tmp_path / "out.parquet", model, shard="1/2")
        (tmp_path / "out.parquet").write_bytes(b"")
        with pytest.raises(OutputError, match="is the input"):
            classify(tmp_path / "out.parquet", tmp_path / "out.parquet", model, shard="1/2", overwrite=True)
        assert {path.name for path in tmp_path.iterdir()} == {"empty", "out.parquet"}


class TestOutput:
    def test_an_existing_table_is_replaced_only_on_request(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        output.write_bytes(b"precious")
        with pytest.raises(OutputError, match="already exists; use another output, or --overwrite"):
            classify(folder, output, model, shard="1/1")
        classify(folder, output, model, shard="1/1", overwrite=True)
        with pytest.raises(OutputError, match="already exists and is another table; use --overwrite"):
            fastres.join_shards(output, progress=False)
        assert output.read_bytes() == b"precious"
        fastres.join_shards(output, overwrite=True, progress=False)
        assert output.read_bytes() == whole

    def test_a_table_from_a_killed_join_is_recognised(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/1")

        def killed(self: places.LocalPlace, content: bytes) -> None:
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(places.LocalPlace, "write_sidecar", killed)
            with pytest.raises(SystemExit):
                fastres.join_shards(output, progress=False)
        assert output.read_bytes() == whole
        assert not sidecar(output).exists()
        fastres.join_shards(output, progress=False)
        assert output.read_bytes() == whole
        assert sidecar(output).exists()
        assert not work_folder(output).exists()

    def test_the_manifest_never_describes_another_table(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/1", top_k=1)
        fastres.join_shards(output, progress=False)
        assert sidecar(output).exists()
        classify(folder, output, model, overwrite=True)
        assert output.read_bytes() == whole
        assert not sidecar(output).exists()
        with pytest.raises(OutputError, match="already exists"):
            classify(folder, output, model, shard="1/1", top_k=1)

    def test_a_table_that_another_program_has_replaced_is_not_taken_for_ours(
        self, folder: Path, model: fastres.Model, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/1")
        fastres.join_shards(output, progress=False)
        output.write_bytes(b"another table")
        with pytest.raises(OutputError, match="already exists"):
            classify(folder, output, model, shard="1/1")
        with pytest.raises(OutputError, match="has no run in shards to join"):
            fastres.join_shards(output, progress=False)

    def test_somebody_elses_manifest_is_left_alone(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes
    ) -> None:
        output = tmp_path / "out.parquet"
        classify(folder, output, model, shard="1/1")
        sidecar(output).write_text('{"mine": true}')
        for run in (lambda: classify(folder, output, model, shard="1/1"), lambda: fastres.join_shards(output)):
            with pytest.raises(OutputError, match="is a file that fastres has not written"):
                run()
        classify(folder, output, model, overwrite=True)
        assert sidecar(output).read_text() == '{"mine": true}'
        assert output.read_bytes() == whole

    def test_nothing_to_join(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"has no run in shards to join; begin one with"):
            fastres.join_shards(tmp_path / "out.parquet")
        with pytest.raises(OutputError, match=r"use a name that ends in \.parquet"):
            fastres.join_shards(tmp_path / "out.txt")
        assert not list(tmp_path.iterdir())


def test_shards_and_joins_at_once(folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes) -> None:
    """Several threads compute and join the same shards, until each has seen the table complete."""
    output = tmp_path / "out.parquet"
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(3):
                classify(folder, output, model, shard=((number + first) % 3 + 1, 3))
            assert fastres.join_shards(output, progress=False).rows == 24
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert output.read_bytes() == whole
    assert sidecar(output).exists()
    assert not work_folder(output).exists()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.csv"
    common = ["--model", "resnet20_digits", "--quiet", "--workers", "0"]
    for number in (2, 1):
        assert main(["classify", str(folder), "-o", str(output), *common, "--shard", f"{number}/2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"shard 2/2 of {output}: 8 rows")
    assert "16 rows of other shards are missing" in said[0]
    assert said[1].startswith(f"shard 1/2 of {output}: 16 rows")
    assert "the rows of all shards are finished" in said[1]
    assert main(["classify", "--join", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 24
    assert len(output.read_text().splitlines()) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures"], "the following arguments are required: -o/--output"),
        (["-o", "out.csv"], "the following arguments are required: SOURCE"),
        (["--join", "out.csv", "pictures", "-o", "out.csv"], "leave out SOURCE, -o"),
        (["--join", "out.csv", "--dry-run", "--top-k", "0"], "leave out --top-k, --dry-run"),
        (["--join", "out.csv", "--shard", "1/2", "--ray"], "leave out --ray, --shard"),
        (["pictures", "-o", "out.csv", "--ray", "--shard", "1/2"], "leave out --shard, --processes and --dry-run"),
        (["pictures", "-o", "out.csv", "--dry-run", "--processes", "2"], "leave out --processes"),
        (["pictures", "-o", "out.csv", "--num-gpus", "2"], "--num-gpus works only with --ray"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["classify", *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shards_of_an_earlier_version(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    """It kept the rows of CSV and JSON Lines in Parquet files, and the Arrow schema in the manifest."""
    output = tmp_path / "out.csv"
    classify(folder, output, model, shard="1/2")
    path = work_folder(output) / "manifest.json"
    schema = base64.b64encode(pa.schema([("path", pa.string())]).serialize().to_pybytes()).decode()
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": schema}))
    for call in (
        lambda: fastres.join_shards(output, progress=False),
        lambda: classify(folder, output, model, shard="2/2"),
    ):
        with pytest.raises(ResumeError, match=r"in an earlier form; join them with that version, or delete the folder"):
            call()
    assert not output.exists()
