"""Where the time of one image goes: the command, and what the committed results must show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastres.bench import calls
from fastres.bench.calls import JSON_NAME, main
from fastres.bench.measure.timing import Budget
from fastres.errors import InputError, UnknownModelError
from fastres.executors import direct

RESULTS = sorted((Path(__file__).parents[2] / "bench" / "results").glob(f"*/{JSON_NAME}"))


def test_networks_are_timed_on_few_and_many_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := direct.absent():
        pytest.skip(reason)
    monkeypatch.setattr(calls, "BUDGET", Budget(seconds=0.1, fewest=2, most=3, warmups=1))
    before = torch.get_num_threads()
    assert main(["--model", "resnet20", "plain20", "--threads", "1", "2", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / JSON_NAME).read_text())
    assert [(row["model"], row["size"], row["dtype"], row["threads"]) for row in found["rows"]] == [
        ("resnet20", 32, "float32", 1),
        ("resnet20", 32, "float32", 2),
        ("plain20", 32, "float32", 1),
        ("plain20", 32, "float32", 2),
    ]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["primitives_ms"] / row["operators_ms"], rel=0.01)
        assert row["loop_ratio"] == pytest.approx(row["primitives_ms"] / row["one_by_one_ms"], rel=0.01)
    assert "one by one" in capsys.readouterr().out


def test_without_primitives_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "absent", lambda: "torch's oneDNN is unknown")
    with pytest.raises(InputError, match="nothing to compare: torch's oneDNN is unknown"):
        main([])


def test_bad_arguments_are_errors() -> None:
    if reason := direct.absent():
        pytest.skip(reason)
    with pytest.raises(InputError, match="--threads"):
        main(["--threads", "0"])
    with pytest.raises(UnknownModelError):
        main(["--model", "resnet19"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_primitives_are_faster_than_operators(path: Path) -> None:
    for row in json.loads(path.read_text())["rows"]:
        assert row["ratio"] < 1, row
        assert row["loop_ratio"] < 1.03, row
