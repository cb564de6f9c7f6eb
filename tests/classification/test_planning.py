"""The dry run: it says what the shards will do, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastres
from fastres.commands.cli import main
from fastres.errors import OutputError, ResumeError

from .conftest import classify


class TestPlan:
    def test_it_says_what_the_shards_will_do_and_writes_nothing(
        self, folder: Path, model: fastres.Model, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.parquet"
        options: dict[str, Any] = {"model": model, "batch_size": 5, "workers": 0, "progress": False}
        before = sorted(tmp_path.rglob("*"))
        plan = fastres.plan_shards(folder, output, shards=3, **options)
        assert sorted(tmp_path.rglob("*")) == before
        assert (plan.images, plan.batch_size, plan.listed, plan.skipped) == (24, 5, None, 1)
        assert [(each.start, each.stop, each.finished) for each in plan.shards] == [(0, 5, 0), (5, 15, 0), (15, 24, 0)]
        assert plan.images_per_s is not None
        assert plan.seconds == 10 / plan.images_per_s
        assert plan.sample < 24
        classify(folder, output, model, shard="2/3")
        plan = fastres.plan_shards(folder, output, shards=2, **options)
        assert [(each.start, each.stop, each.finished) for each in plan.shards] == [(0, 10, 5), (10, 24, 5)]
        assert plan.listed
        assert "shard  rows      images  finished\n1/2    0 to 10       10         5" in str(plan)
        with pytest.raises(ResumeError, match="decoder was"):
            fastres.plan_shards(folder, output, decoder="exact", **options)

    def test_one_batch_is_too_few_to_tell(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        plan = fastres.plan_shards(folder / "sub", tmp_path / "out.parquet", model=model, workers=0)
        assert (plan.images, plan.images_per_s, plan.seconds) == (1, None, None)
        assert "There are too few images to estimate the time" in str(plan)

    def test_an_existing_table_is_an_error_here_as_well(
        self, folder: Path, model: fastres.Model, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.parquet"
        output.write_bytes(b"precious")
        with pytest.raises(OutputError, match="already exists"):
            fastres.plan_shards(folder, output, model=model)
        assert fastres.plan_shards(folder, output, model=model, overwrite=True, workers=0).images == 24

    def test_the_command(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "classify",
            str(folder),
            "-o",
            str(tmp_path / "out.csv"),
            "--model",
            "resnet20_digits",
            "--dry-run",
        ]
        assert main([*arguments, "--workers", "0", "--batch-size", "4", "--shard", "1/25", "--quiet"]) == 0
        said = capsys.readouterr().out
        assert f"{tmp_path / 'out.csv'}: 24 images (files, 1 skipped)" in said
        assert "… and 5 more shards" in said
        assert main([*arguments, "--workers", "1", "--json", "--quiet"]) == 0
        assert len(json.loads(capsys.readouterr().out)["shards"]) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["images"]
