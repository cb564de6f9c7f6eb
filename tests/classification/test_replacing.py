"""Runs in shards that replace a table, or whose table is there without its manifest, and rows that come too late."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import fastres
from fastres.classification import folder as folders
from fastres.classification import formats, parts, processes, shared
from fastres.classification.outputs import place_of
from fastres.classification.places import LocalPlace
from fastres.errors import OutputError, ResumeError, SourceError

from .conftest import classify
from .test_sharded import sidecar, work_folder

OPTIONS: dict[str, Any] = {
    "model": "resnet20_digits",
    "batch_size": 5,
    "workers": 0,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture
def output(folder: Path, model: fastres.Model, tmp_path: Path) -> Path:
    """A complete table of a run in shards, in which the same run will find an older one."""
    output = tmp_path / "out.csv"
    classify(folder, output, model, shard="1/1")
    fastres.join_shards(output, progress=False)
    return output


def spoiled(output: Path) -> bytes:
    """Change a byte of the table, but not its size: the manifest still describes it."""
    content = output.read_bytes()
    output.write_bytes(content[:-2] + b"#" + content[-1:])
    return content


def stop(*given: object, **options: object) -> None:
    raise KeyboardInterrupt


class TestReplacing:
    """The old table is of the same run, and so is its manifest."""

    def test_shards_and_join(self, output: Path, folder: Path, model: fastres.Model) -> None:
        whole = spoiled(output)
        assert classify(folder, output, model, shard="1/2", overwrite=True).missing == 14
        with pytest.raises(ResumeError, match="14 of 24 rows"):
            fastres.join_shards(output, overwrite=True, progress=False)
        assert output.read_bytes() != whole
        classify(folder, output, model, shard="2/2", overwrite=True)
        fastres.join_shards(output, overwrite=True, progress=False)
        assert output.read_bytes() == whole
        assert not work_folder(output).exists()
        assert fastres.join_shards(output, overwrite=True, progress=False).rows == 24

    def test_a_failure_is_no_success(self, output: Path, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        classify(folder, output, model, shard="1/2", overwrite=True)
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(SourceError, match="does not have the images"):
            classify(folder, output, model, shard="2/2", overwrite=True)

    def test_several_processes(self, output: Path, folder: Path) -> None:
        whole = spoiled(output)
        report = fastres.classify(folder, output, **OPTIONS, processes=2, overwrite=True)
        assert (report.rows, report.resumed) == (24, 0)
        assert output.read_bytes() == whole

    def test_an_interrupted_run_is_continued_if_asked(
        self, output: Path, folder: Path, model: fastres.Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = spoiled(output)
        classify(folder, output, model, shard="1/2", overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr(processes.Processes, "compute", stop)
            with pytest.raises(KeyboardInterrupt, match=r"10 of 24 rows are kept .* again with --resume to go on"):
                fastres.classify(folder, output, **OPTIONS, processes=2, overwrite=True, resume=True)
        report = fastres.classify(folder, output, **OPTIONS, processes=2, overwrite=True, resume=True)
        assert (report.rows, report.resumed) == (24, 10)
        assert output.read_bytes() == whole


class TestTableWithoutManifest:
    """A join was killed after the table had its name."""

    @pytest.fixture
    def output(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        output = tmp_path / "out.csv"
        fastres.classify(folder, output, **OPTIONS, shard="1/1")
        with monkeypatch.context() as patch:
            patch.setattr(LocalPlace, "write_sidecar", stop)
            with pytest.raises(KeyboardInterrupt):
                fastres.join_shards(output, progress=False)
        assert output.exists()
        assert not sidecar(output).exists()
        return output

    def test_the_same_command_completes_it(self, output: Path, folder: Path) -> None:
        before = output.stat().st_size
        report = fastres.classify(folder, output, **OPTIONS, processes=2, resume=True)
        assert (report.rows, report.resumed) == (24, 24)
        assert json.loads(sidecar(output).read_text())["bytes"] == before
        assert not work_folder(output).exists()

    def test_a_shard_has_nothing_to_do(self, output: Path, folder: Path) -> None:
        """As one that starts while the table is being joined."""
        report = fastres.classify(folder, output, **OPTIONS, shard="1/2")
        assert (report.rows, report.resumed, report.missing) == (10, 10, 0)
        fastres.join_shards(output, progress=False)
        assert fastres.classify(folder, output, **OPTIONS, shard="1/2").rows == 24

    def test_another_table_is_left_alone(self, output: Path, folder: Path) -> None:
        output.write_text("somebody's")
        with pytest.raises(OutputError, match="already exists and is another table"):
            fastres.classify(folder, output, **OPTIONS, processes=2)
        assert output.read_text() == "somebody's"


def test_rows_that_come_too_late_are_deleted(
    folder: Path, model: fastres.Model, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an object store a late process could write on: there is no folder that has gone."""
    output = f"{memory}/out.csv"
    compute = shared.compute

    def overtaken(*given: Any) -> int:
        monkeypatch.setattr(shared, "compute", compute)
        classify(folder, output, model, shard="1/1")
        fastres.join_shards(output, progress=False)
        return compute(*given)

    monkeypatch.setattr(shared, "compute", overtaken)
    assert classify(folder, output, model, shard="1/2").rows == 24, "the report of the complete table"
    place = place_of(output)
    assert place.names() == []
    assert place.finished()["images"] == 24


def test_files_that_others_rename_do_no_harm(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    """A process that opens the work folder may see temporary files of others, which have gone a moment later."""
    place, ended = tmp_path / "out.csv.partial", threading.Event()
    place.mkdir()
    (place / folders.LOCK).touch()

    def rename() -> None:
        while not ended.is_set():
            for number in range(50):
                (place / f"output.{number:012x}.tmp").touch()
            for number in range(50):
                (place / f"output.{number:012x}.tmp").unlink()

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        for _ in range(300):
            with folders.shared(place):
                pass
    finally:
        ended.set()
        thread.join()


def texts() -> pa.Array:
    random.seed(0)
    return pa.array([f"{random.randrange(10**9):0600}" for _ in range(6000)])


def embeddings() -> pa.Array:
    values = np.random.default_rng(0).random((6000, 512), dtype=np.float32)
    return pa.array([None if row == 5 else each for row, each in enumerate(values)], pa.list_(pa.float32(), 512))


@pytest.mark.parametrize("column", [texts, embeddings])
def test_the_bytes_do_not_depend_on_the_parts(column: Callable[[], pa.Array], tmp_path: Path) -> None:
    """Rows get into parts by the clock, and Parquet's pages may end where pieces of a column do."""
    table, written = pa.table({"column": column()}), set()
    for cuts in ([], [320], [16, 592, 4096], [640, 2688, 4100]):
        place: dict[str, bytes] = {}
        for start, stop in zip([0, *cuts], [*cuts, len(table)], strict=True):
            part, content = parts.packed(table.slice(start, stop - start).combine_chunks().to_batches(), "run", start)
            place[part] = content
        slices, _ = parts.cover(parts.named_parts(place), range(len(table)))
        path = tmp_path / "out.parquet"
        with path.open("wb") as file, formats.open_writer(file, ".parquet", table.schema, {}) as writer:
            for piece in parts.merged(slices, "run", place.__getitem__):
                writer.write_table(piece)
        written.add(path.read_bytes())
    assert len(written) == 1
