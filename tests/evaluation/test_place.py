"""The folder of an evaluation: what it refuses, and what interruptions and earlier evaluations leave in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import OutputError, ResumeError, WorkerError
from fastres.evaluation import job as jobs
from fastres.evaluation import run as runs
from fastres.evaluation.place import DOCUMENT, REPORT, TABLE

from .running import evaluate


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the run end like one that is interrupted after three batches. Returns the starts of all batches."""
    starts: list[int] = []
    rows = jobs.EvaluateJob.rows

    def stopping(self: jobs.EvaluateJob, piece: jobs.Part) -> Any:
        starts.append(piece.start)
        if len(starts) == 4:
            raise KeyboardInterrupt
        return rows(self, piece)

    monkeypatch.setattr(jobs.EvaluateJob, "rows", stopping)
    return starts


def test_a_resumed_evaluation_is_the_same(few: Path, tmp_path: Path, interrupted: list[int]) -> None:
    options = {"batch_size": 4, "dtypes": ["float32"], "engines": ["fastres", "eager"]}
    with pytest.raises(KeyboardInterrupt, match="12 of 40 rows are kept"):
        evaluate(few, output=tmp_path / "out", **options)
    with pytest.raises(OutputError, match="12 rows of an interrupted run; use --resume"):
        evaluate(few, output=tmp_path / "out", **options)
    with pytest.raises(ResumeError, match="had different settings: models changed"):
        evaluate(few, output=tmp_path / "out", resume=True, **{**options, "engines": ["eager"]})
    result = evaluate(few, output=tmp_path / "out", resume=True, **options)
    assert (result.resumed, result.images) == (12, 40)
    assert interrupted[4:] == list(range(12, 40, 4))
    undisturbed = evaluate(few, output=tmp_path / "other", **options)
    assert (tmp_path / "out" / TABLE).read_bytes() == (tmp_path / "other" / TABLE).read_bytes()
    assert result.models[1].accuracy == undisturbed.models[1].accuracy


def test_resuming_a_complete_table_writes_the_report(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate(few, output=out)
    (out / REPORT).unlink()
    (out / DOCUMENT).unlink()
    with pytest.raises(OutputError, match=r"already has images\.parquet"):
        evaluate(few, output=out)
    again = evaluate(few, output=out, resume=True)
    assert (again.resumed, again.models[0].accuracy) == (40, first.models[0].accuracy)
    assert (out / REPORT).exists()
    with pytest.raises(OutputError, match="table of another evaluation, with other models and columns"):
        evaluate(few, output=out, resume=True, engines=["eager"])
    assert evaluate(few, output=out, overwrite=True, engines=["eager"]).resumed == 0


def test_other_labels_are_another_evaluation(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(few, output=out)
    names = sorted(few.rglob("*.png"))
    with pytest.raises(OutputError, match="with other labels"):
        evaluate(few, output=out, resume=True, labels={path.name: 0 for path in names})


def test_an_interrupted_replacement_is_resumed_as_it_says(few: Path, tmp_path: Path, interrupted: list[int]) -> None:
    out = tmp_path / "out"
    evaluate(few, output=out)
    interrupted.clear()
    with pytest.raises(KeyboardInterrupt, match=r"12 of 40 rows are kept .*; continue with --resume --overwrite"):
        evaluate(few, output=out, overwrite=True, batch_size=4)
    assert evaluate(few, output=out, resume=True, overwrite=True, batch_size=4).resumed == 12


def test_nothing_is_kept_without_an_output(few: Path, interrupted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt, match="interrupted: without an output, no row is kept; run it again"):
        evaluate(few, batch_size=4)

    def died(self: jobs.EvaluateJob, piece: jobs.Part) -> Any:
        raise WorkerError("DataLoader worker (pid 7) is killed")

    monkeypatch.setattr(jobs.EvaluateJob, "rows", died)
    with pytest.raises(WorkerError, match="without an output, no row is kept"):
        evaluate(few, batch_size=4)


def test_an_interruption_after_the_table(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(runs, "_speeds", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted: the table of 40 rows is complete; --resume writes the"):
        evaluate(few, output=out)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        evaluate(few)
    monkeypatch.undo()
    assert evaluate(few, output=out, resume=True).resumed == 40


def test_a_new_table_is_never_beside_an_earlier_report(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    evaluate(few, output=out)
    monkeypatch.setattr(runs, "_speeds", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(few, output=out, overwrite=True, engines="eager")
    assert os.listdir(out) == [TABLE]


def test_a_report_of_somebody_is_not_replaced(few: Path, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text("mine")
    with pytest.raises(OutputError, match=r"already has report\.html; use another output or --overwrite to replace it"):
        evaluate(few, output=tmp_path, resume=True)
    assert (tmp_path / REPORT).read_text() == "mine"
    assert evaluate(few, output=tmp_path, overwrite=True).output == tmp_path


@pytest.mark.parametrize("damage", [b"junk", b"", None])
def test_a_damaged_table_is_named(damage: bytes | None, few: Path, tmp_path: Path) -> None:
    evaluate(few, output=tmp_path)
    table = tmp_path / TABLE
    table.write_bytes(table.read_bytes()[:-50] if damage is None else damage)
    with pytest.raises(OutputError, match=r"images\.parquet' is damaged, or no table of an evaluation; use"):
        evaluate(few, output=tmp_path, resume=True)


def test_other_images_are_another_evaluation(few: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(few, tmp_path / "source"))
    evaluate(source, output=tmp_path / "out")
    os.utime(next(source.rglob("*.png")), (1, 1))
    with pytest.raises(OutputError, match="another evaluation, with other images"):
        evaluate(source, output=tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", r"The output is empty; pass the name of a folder, such as '\.'"),
        (3, "The output is an int; pass the name of a folder"),
        ("/proc/evaluation", r"'/proc/evaluation' cannot be created \(No such file or directory\); use another path"),
    ],
)
def test_outputs_that_are_no_folders(
    output: Any, message: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=message):
        evaluate(few, output=output)
    assert not os.listdir()


def test_an_output_is_no_class_folder(few: Path, tmp_path: Path) -> None:
    """Its own folders would be classes."""
    source = Path(shutil.copytree(few, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    before = sorted(source.rglob("*"))
    for output in (source, source / "out", tmp_path / "link" / "out"):
        for labels in ("auto", "folders"):
            with pytest.raises(OutputError, match="whose folders are classes; use an output outside it"):
                evaluate(source, output=output, labels=labels)
    assert sorted(source.rglob("*")) == before
    labels = {path.name: int(path.parent.name) for path in source.rglob("*.png")}
    assert evaluate(source, output=source / "out", labels=labels).images == 40


def test_a_folder_is_not_left_behind(few: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="labels"):
        evaluate(few, output=tmp_path / "out", labels=[1, 2, 3])
    assert not list(tmp_path.iterdir())
