"""The measurement of 8 bit: its rows, and what the committed results must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastres.bench.quantisation import BUNDLED, JSON_NAME, PLACES, RANDOM, SHIFT, TRAINED, main, moved

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "quantisation" / JSON_NAME


def test_the_bundled_network_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["--train", "--random", "--images", "0", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / JSON_NAME).read_text())["networks"]
    assert row["model"] == BUNDLED
    assert row["images"] == 360 * PLACES
    assert row["logit_error"] < 0.03
    assert abs(row["accuracy"]["float32"] - row["accuracy"]["int8"]) <= 0.005
    assert f"{BUNDLED}  trained (bundled)" in capsys.readouterr().out


def test_scans_are_judged_in_several_places() -> None:
    scans = torch.zeros(5, 3, 32, 32, dtype=torch.uint8, device="cpu")
    scans[..., 10:20, 12:18] = torch.randint(1, 256, (5, 1, 10, 6), dtype=torch.uint8, device="cpu")
    found = moved(scans).view(PLACES, 5, 3, 32, 32)
    assert torch.equal(found[0], scans)
    for number in range(5):
        (rows, columns) = zip(*(scan[number, 0].nonzero().amin(0).tolist() for scan in found), strict=True)
        assert len(set(zip(rows, columns, strict=True))) > PLACES // 2
        assert all(abs(row - 10) <= SHIFT for row in rows)
        assert all(abs(column - 12) <= SHIFT for column in columns)
        for scan in found:
            torch.testing.assert_close(scan[number].float().sum(), scans[number].float().sum())


def test_the_committed_results_are_near_float32() -> None:
    """Within half a point of the accuracy, and the same class where the float32 margin exceeds the noise.

    Of a random network few images are clear (18 of ResNet-152), so one may differ.
    """
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [row["model"] for row in found["networks"]] == [BUNDLED, *TRAINED, *RANDOM]
    for row in found["networks"]:
        other = round(row["clear"] * (1 - (row["clear_agreement"] or 0)))
        assert other <= max(0.01 * row["clear"], 0 if row["accuracy"] else 1), row["model"]
        if row["accuracy"]:
            assert abs(row["accuracy"]["float32"] - row["accuracy"]["int8"]) <= 0.005, row["model"]
    assert found["memory"]["images"] >= 5000
    assert found["memory"]["skipped"] == found["memory"]["broken"] > 0
    assert found["memory"]["peak_above_model_mb"] < 2048 * 1.048576
