"""The comparison of channels-last activations with blocks of channels, and what the committed results must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastres.bench import layouts
from fastres.bench.layouts import JSON_NAME, main
from fastres.bench.measure.timing import Budget
from fastres.errors import InputError
from fastres.executors import cpu
from fastres.onednn.library import library

RESULTS = sorted((Path(__file__).parents[2] / "bench" / "results").glob(f"*/{JSON_NAME}"))


def test_a_network_is_timed_in_both_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := cpu.absent():
        pytest.skip(reason)
    lanes = library().lanes
    if lanes is None:
        pytest.skip("blocks are the vectors of AVX2 or AVX-512")
    monkeypatch.setattr(layouts, "BUDGET", Budget(seconds=0.1, fewest=2, most=3, warmups=1))
    arguments = ["--model", "resnet18", "--batch", "1", "2", "--size", "192", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / JSON_NAME).read_text())
    assert [(row["model"], row["batch"], row["size"]) for row in found["rows"]] == [
        ("resnet18", 1, 192),
        ("resnet18", 2, 192),
    ]
    assert [row["chosen"] for row in found["rows"]] == ["channels-last" if lanes == 16 else "blocks", "blocks"]
    for row in found["rows"]:
        assert row["channels_last_ms"] > 0
        assert row["ratio"] == pytest.approx(row["blocked_ms"] / row["channels_last_ms"], rel=0.01)
    assert "fastres takes" in capsys.readouterr().out


def test_a_network_that_is_never_in_blocks_is_named() -> None:
    with pytest.raises(InputError, match="There is nothing to compare for resnext50_32x4d"):
        main(["--model", "resnext50_32x4d"])


def test_a_batch_without_images_is_an_error() -> None:
    with pytest.raises(InputError, match="--batch"):
        main(["--batch", "0"])


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_fastres_takes_the_faster_layout(path: Path) -> None:
    """It may lose the noise of the measurement, and not more."""
    for row in json.loads(path.read_text())["rows"]:
        loss = row["ratio"] if row["chosen"] == "blocks" else 1 / row["ratio"]
        assert loss < 1.04, row
