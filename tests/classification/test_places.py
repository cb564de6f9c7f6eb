"""Runs in shards on disks that are full and in folders that cannot be read: named errors, and no row is lost."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastres
from fastres.classification import places
from fastres.errors import OutputError, ResumeError

from .conftest import classify


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the context, a write beyond ``size`` bytes of a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failure_of(step: Callable[[], object], size: int, folder: Path) -> set[str]:
    """Return the beginning of the error of ``step`` where no file may be larger, if there is one."""
    try:
        with largest_file(size):
            step()
    except (OutputError, ResumeError) as error:
        return {str(error).partition(":")[0].replace(str(folder), "")}
    return set()


def test_a_full_disk_is_named_whichever_file_meets_it(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    one, output = tmp_path / "one.parquet", tmp_path / "out.parquet"
    classify(folder, one, model)
    sizes = (0, 3, *range(500, one.stat().st_size, 500))
    said: set[str] = set()
    for size in sizes:
        for step in (
            lambda: fastres.plan_shards(folder, output, model=model, batch_size=5, workers=0, progress=False),
            lambda: classify(folder, output, model, shard="1/1"),
            lambda: fastres.join_shards(output, progress=False),
        ):
            said |= failure_of(step, size, tmp_path)
    assert not output.exists(), "it is larger than all sizes"
    assert any("The list of images cannot be written in '/out.parquet.partial'" in text for text in said), said
    assert any("The list of images cannot be written in '/tmp" in text for text in said), said
    assert any(text.startswith("'/out.parquet.partial/rows-") for text in said), said
    assert "'/out.parquet' cannot be written" in said, said
    fastres.join_shards(output, progress=False)
    assert output.read_bytes() == one.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.parquet", "out.parquet.manifest.json"]


@pytest.mark.parametrize("name", ["out.csv.partial/manifest.json", "out.csv.manifest.json"])
def test_a_manifest_that_cannot_be_read_is_named(
    name: str, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.csv"
    classify(folder, output, model, shard="1/2")
    read = places.read_regular

    def refuse(path: Any) -> bytes:
        if Path(path) == tmp_path / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(places, "read_regular", refuse)
        for step in (
            lambda: classify(folder, output, model, shard="2/2"),
            lambda: fastres.join_shards(output, progress=False),
        ):
            with pytest.raises(OutputError, match=rf"{name}' cannot be read: Permission denied"):
                step()
    classify(folder, output, model, shard="2/2")
    assert fastres.join_shards(output, progress=False).rows == 24


def test_a_work_folder_that_is_a_file_is_named(folder: Path, model: fastres.Model, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    (tmp_path / "out.csv.partial").write_text("somebody's")
    for step in (
        lambda: classify(folder, output, model, shard="1/2"),
        lambda: fastres.join_shards(output, progress=False),
        lambda: fastres.plan_shards(folder, output, model=model, batch_size=5, workers=0, progress=False),
    ):
        with pytest.raises(OutputError, match=r"out\.csv\.partial.* cannot be (read|written): "):
            step()
    assert (tmp_path / "out.csv.partial").read_text() == "somebody's"
