"""A small run of the benchmark of ``fastres classify --processes``, and its arithmetic."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastres.bench import shards
from fastres.bench.shards import APART, BUNDLED, JSON_NAME, KINDS, ONE, SHARED, Load, Setting, Tables, main
from fastres.errors import FastresError, InputError

SMALL = (Load("large JPEGs", BUNDLED, (96, 64), 2, 8),)


def test_it_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("skimage", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.setattr(shards, "LOADS", SMALL)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cores = sorted(os.sched_getaffinity(0))[:2]
    given = ["--images", "40", "--rounds", "1", "--processes", str(len(cores)), "--memory-images", "0"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / JSON_NAME).read_text())
    (load,) = found["loads"]
    assert (load["images"], load["width"], load["height"]) == (80, 96, 64)
    assert load["alone"]["slower"] == (
        "decoding" if load["alone"]["decode_images_per_s"] < load["alone"]["model_images_per_s"] else "model"
    )
    (kinds,) = load["rounds"]
    assert list(kinds) == list(KINDS)
    used = {ONE: [cores[:1]], SHARED: [cores], APART: [[core] for core in cores]}
    for kind, run in kinds.items():
        assert run["cores"] == used[kind]
        assert run["whole_images_per_s"] == pytest.approx(sum(80 / seconds for seconds in run["wall_s"]), rel=1e-3)
        assert all(0 < inner < outer for inner, outer in zip(run["report_s"], run["wall_s"], strict=True))
        assert 0 < run["cores_used"] <= 1.05
        had = sum(run["wall_s"]) * (len(cores) if kind == SHARED else 1)
        assert run["cores_used"] == pytest.approx(run["processor_s"] / had, rel=0.01)
    assert found["settings"]["workers"] == 0
    assert found["memory"] == []
    assert "large JPEGs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary file is left"


def test_memory_is_sampled_over_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(shards, "MEMORY_EVERY_S", 0.1)
    _, images = shards.make_images(shards.MANY, tmp_path / "many", 200)
    tables = Tables(shards.MANY, images, 200, Setting(tmp_path, (min(os.sched_getaffinity(0)),), 0))
    row = shards.memory_of(("--shard", "1/1"), tmp_path / "rows.parquet", tables)
    assert (row["options"], row["images"]) == ("--shard 1/1", 200)
    assert row["peak_resident_mb"] == max(mb for _, _, mb, _ in row["samples"]) > 50
    assert all(0 <= own <= resident for _, _, resident, own in row["samples"])
    assert max(own for _, _, _, own in row["samples"]) > 20
    assert 0 < row["samples"][-1][1] <= 200, "rows were seen"
    assert row["join_peak_resident_mb"] > 50
    assert (tmp_path / "rows.parquet").exists()


def test_memory_is_sampled_with_shards_and_with_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(shards, "memory_of", lambda options, output, tables: (options, output.name, tables.count))
    assert shards.memory(5, Setting(tmp_path, (0, 1, 2), 0)) == [
        (("--shard", "1/1"), "shard.parquet", 5),
        (("--processes", "3"), "processes.parquet", 5),
    ]


def test_images_are_always_the_same_and_many_share_a_file(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    load = dataclasses.replace(SMALL[0], distinct=3)
    folders = [shards.make_images(load, tmp_path / name, 7) for name in "ab"]
    contents = [[path.read_bytes() for path in sorted(images.iterdir())] for _, images in folders]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 7
    assert len(set(contents[0])) == len(list(folders[0][0].iterdir())) == 3


def rates(steady: float | None, whole: float) -> dict[str, Any]:
    return {"steady_images_per_s": steady, "whole_images_per_s": whole, "cores_used": 0.5}


def test_efficiency_is_relative_to_one_process_of_the_same_round() -> None:
    rounds = [
        {ONE: rates(100, 50), SHARED: rates(180, 60), APART: rates(190, 80)},
        {ONE: rates(50, 50), SHARED: rates(80, 70), APART: rates(100, 100)},
        {ONE: rates(100, 40), SHARED: rates(200, 40), APART: rates(None, 60)},
    ]
    found = shards.scaling(rounds, 2)
    assert found["steady"]["efficiency"][SHARED] == {"median": 0.9, "least": 0.8, "most": 1.0}
    assert found["whole"]["efficiency"][SHARED] == {"median": 0.6, "least": 0.5, "most": 0.7}
    assert found["whole"]["efficiency"][APART] == {"median": 0.8, "least": 0.75, "most": 1.0}
    assert found["steady"]["images_per_s"][ONE] == {"median": 100, "least": 50, "most": 100}
    assert found["steady"]["efficiency"][APART] is None, "one rate is unknown"
    assert shards.spread([]) is None


def test_tables_that_differ_do_not_count(tmp_path: Path) -> None:
    tables = Tables(SMALL[0], tmp_path, 3, Setting(tmp_path, (0,), 1))
    program: Any = SimpleNamespace(report={"rows": 3, "errors": 0})
    for name, content in (("a", b"rows"), ("b", b"rows"), ("c", b"other rows")):
        (tmp_path / name).write_bytes(content)
    assert tables.check(program, tmp_path / "a") == tables.check(program, tmp_path / "b") == program.report
    with pytest.raises(FastresError, match="differ"):
        tables.check(program, tmp_path / "c")
    for report in ({"rows": 2, "errors": 0}, {"rows": 3, "errors": 1}):
        program.report = report
        with pytest.raises(FastresError, match=f"{report['rows']} rows of 3, {report['errors']} errors"):
            tables.check(program, tmp_path / "a")


def test_figures_that_are_missing_are_named_in_the_tables() -> None:
    rounds = [{kind: rates(None, 50) for kind in KINDS}]
    alone = {"decode_images_per_s": 10.0, "model_images_per_s": 20.0, "slower": "decoding"}
    load = {
        "load": "large JPEGs",
        "model": BUNDLED,
        "alone": alone,
        "rounds": rounds,
        "scaling": shards.scaling(rounds, 2),
    }
    own = {"20%": None, "50%": 80.0, "100%": 81.0}
    row = {"options": "--shard 1/1", "images": 9, "own_mb": own, "growth_mb": None, "peak_resident_mb": 80.5}
    lines = shards.summary({"settings": {"processes": 2}, "loads": [load], "memory": [row]}).splitlines()
    (steady,) = [line for line in lines if "10 % to 90 %" in line]
    (whole,) = [line for line in lines if "whole command" in line]
    assert steady.count("too few images") == 4
    assert "50.0% (50.0% to 50.0%)" in whole
    assert any("one process 50%, 2 processes 50%, 2 commands 50%" in line for line in lines)
    assert lines[-1].split("  ")[0] == "--shard 1/1"
    assert lines[-1].count("too few images") == 2
    assert lines[-1].endswith("80.5")


def test_bad_arguments_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--images", "--rounds", "--processes"):
        with pytest.raises(InputError, match=option):
            main(["--out", str(tmp_path), option, "0"])
    with pytest.raises(InputError, match="5000 processes need a core each"):
        main(["--out", str(tmp_path), "--processes", "5000"])
    (tmp_path / "file").touch()
    with pytest.raises(FastresError, match="--out"):
        main(["--out", str(tmp_path / "file")])
