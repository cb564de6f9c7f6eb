"""Test what a visit to a GPU runs, in which order and for how long."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastres.bench.visit import running
from fastres.bench.visit.pieces import BUDGET, FULL, VISITS, Scale, estimate, groups, pieces
from fastres.bench.visit.trials import FAMILIES
from fastres.bench.visit.visit import RESERVE, Visit
from fastres.kernels.routing import without
from tests.bench.visit.test_visit import piece


@pytest.mark.parametrize("name", VISITS)
def test_a_visit_should_fit_a_call_and_says_so(name: str, tmp_path: Path) -> None:
    todo = pieces(name)
    assert estimate(todo) <= BUDGET - RESERVE
    assert len({item.name for item in todo}) == len(todo)
    assert all(item.seconds <= item.grace + item.limit <= 600 for item in todo)
    said = Visit(name, "a GPU", tmp_path / "work", tmp_path, BUDGET).plan(todo)
    assert f"about {estimate(todo)} s of {BUDGET} s. All pieces fit." in said
    assert all(item.name in said for item in todo)


def test_pieces_side_by_side_count_once() -> None:
    one, two, three = (replace(piece("p", ""), seconds=seconds) for seconds in (10, 20, 30))
    together = [replace(one, together="a"), replace(two, together="a")]
    assert estimate([*together, three]) == 50
    assert groups([*together, three, one]) == [together, [three], [one]]


def test_what_matters_most_comes_first() -> None:
    names = [item.name for item in pieces("first")]
    assert names[:2] == ["environment", "compile"]
    assert names[-5:-1] == [f"rules resnet50 float16 batch {batch}" for batch in (256, 64, 8, 1)]
    assert names[-1] == "kernels in 8 bit"
    tuned = [item.name for item in pieces("tune") if not item.family]
    assert tuned[:4] == [
        "tune resnet50 batch 256", "tuned resnet50 float16 batch 256",
        "tune resnet50 batch 1", "tuned resnet50 float16 batch 1",
    ]  # fmt: skip


def test_every_promised_point_is_measured_beside_its_peers() -> None:
    wanted = {"eager", "eager_channels_last", "eager_cudagraph", "compile", "compile_max_autotune", "fastres"}
    measured: dict[str, set[str]] = {}
    for item in [*pieces("first"), *pieces("peers")]:
        if "fastres.bench.run" in item.command:
            given = dict(zip(item.command, item.command[1:], strict=False))
            peers = set(given["--peers"].split(","))
            assert {"eager", "eager_channels_last", "fastres"} <= peers
            if (given["--model"], given["--dtype"]) == ("resnet50", "float16"):
                measured.setdefault(given["--batch"], set()).update(peers)
    assert measured == dict.fromkeys(("256", "64", "8", "1"), wanted)


def test_slow_peers_have_processes_of_their_own() -> None:
    for item in pieces("peers"):
        assert len({"compile", "compile_max_autotune"} & set(",".join(item.command).split(","))) <= 1, item.name


def test_every_family_has_a_trial_in_a_process_of_its_own() -> None:
    trials = [item for item in pieces("first") if item.family]
    assert [item.family for item in trials] == list(FAMILIES)
    assert set(without.FAMILIES) <= set(FAMILIES)
    on_a_cpu = {"blocks", "primitives", "loop"}
    assert set(without.WAYS) - set(FAMILIES) == {"tables"} | on_a_cpu
    assert {item.together for item in trials} == {"smoke"}
    assert all((item.limit, item.grace) == (20, 20) for item in trials)


@pytest.mark.parametrize("name", [*VISITS, "all"])
def test_pieces_name_files_that_exist(name: str) -> None:
    for item in pieces(name):
        for word in item.command:
            if word.startswith(("tests/", "bench/")):
                assert (running.ROOT / word).exists(), word
        assert item.inputs
        for pattern in item.inputs:
            folder = pattern.split("*")[0].rstrip("/")
            assert list(running.ROOT.glob(pattern)) or "configs" in folder or "candidates" in folder, pattern


def test_every_gpu_test_is_part_of_a_visit() -> None:
    named = {word for item in pieces("all") for word in item.command if word.startswith("tests/")}
    assert {"tests/kernels", "tests/gpu/test_graphs.py", "tests/gpu/test_models.py"} <= named
    marked = {path.relative_to(running.ROOT).as_posix() for path in (running.ROOT / "tests/bench").rglob("test_*.py")
              if "mark.gpu" in path.read_text() and path.name != Path(__file__).name}  # fmt: skip
    assert marked <= named


def test_a_smaller_scale_measures_less() -> None:
    small = Scale("resnet18", 64, ("4", "1"), others=())
    names = [item.name for name in VISITS for item in pieces(name, small)]
    assert not [name for name in names if "resnet50" in name and not name.startswith("model tests")]
    assert FULL.model == "resnet50"
