"""``python -m bench.study`` at its smallest size, and the committed results compared with the committed page."""

from __future__ import annotations

import base64
import copy
import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastres.bench.study import __main__ as command
from fastres.bench.study import degradation, report, shattering, shortcuts, vanishing
from fastres.bench.study.__main__ import STUDIES, main
from fastres.bench.study.common import Settings, number, power
from fastres.errors import FastresError, MissingDependencyError
from fastres.extras import install

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "bench" / "results" / "studies"
PAGE = ROOT / "docs" / "why-residual.md"
PNG = b"\x89PNG\r\n\x1a\n"


def smallest(folder: Path) -> Settings:
    return Settings(
        folder, seeds=1, epochs=1, limit=20, deep=32, draws=1, nets=1, images=8, lines=1, line_points=40, size="test"
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all four studies at their smallest size, written by the command."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "settings_of", lambda options: smallest(options.out))
        assert main(["all", "--out", str(folder), "--docs", str(folder / "docs" / "page.md")]) == 0
    return folder


def data_of(folder: Path, study: str) -> dict[str, Any]:
    result = report.read(folder / f"{study}.json")
    assert result is not None
    return result.data


def test_every_study_writes_figures_data_and_the_page(results: Path) -> None:
    names = {path.name for path in results.iterdir()}
    assert {f"{study}.json" for study in STUDIES} < names
    for name in names:
        if name.endswith(".png"):
            assert (results / name).read_bytes().startswith(PNG)
    page = (results / "index.html").read_text()
    markdown = (results / "docs" / "page.md").read_text()
    for name in (name for name in names if name.endswith(".png")):
        assert base64.b64encode((results / name).read_bytes()).decode() in page
        assert f"(../{name})" in markdown
    assert set(re.findall(r'src="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert not re.search(r'(href|src)="http', page)


def test_identity_layers_change_nothing(results: Path) -> None:
    (row,) = data_of(results, "degradation")["constructed"]
    assert row["largest_difference"] == 0
    assert row["deepened_error"] == row["shallow_error"]


def test_the_sigmoid_bound_holds(results: Path) -> None:
    rows = [row for row in data_of(results, "vanishing")["lab"] if row["activation"] == "sigmoid"]
    assert max(row["largest_of_bound"] for row in rows if not row["batch_norm"]) <= 1
    assert min(row["largest_of_bound"] for row in rows if row["batch_norm"]) > 1


def test_the_line_turns_from_brown_to_white(results: Path) -> None:
    data = data_of(results, "shattering")
    brown, white = (row["exponent"] for row in data["noises"])
    assert (brown, white) == (pytest.approx(-2, abs=0.02), pytest.approx(0, abs=0.02))
    plain = data["nets"][0]
    assert plain["exponents"][0] == pytest.approx(-2, abs=0.3)
    assert plain["exponents"][-1] == pytest.approx(0, abs=0.3)
    assert plain["coactive"] == pytest.approx([0.25] * shattering.DEPTH, abs=0.02)
    assert plain["paper"][:4] == [0.5, 0.25, 0.125, 0.0625]


def test_every_block_is_removed_once(results: Path) -> None:
    data = data_of(results, "shortcuts")
    counts = {model: len([row for row in data["blocks"] if row["model"] == model]) for model in shortcuts._models(data)}
    assert counts == {"plain20": 9, "plain32": 15, "resnet20": 9, "resnet32": 15}
    assert all((row["branch_ratio"] is None) == row["model"].startswith("plain") for row in data["blocks"])


def test_each_study_ends_in_fastres(results: Path) -> None:
    for study in STUDIES:
        runs = data_of(results, study)["runs"]
        assert len(runs) >= 4
        assert all(0 < run["fastres_distance"] < 1e-2 for run in runs)


def test_what_was_measured_is_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (results / "vanishing.json").read_bytes()
    study = replace(vanishing.STUDY, measure=lambda _: pytest.fail("it was measured again"))
    monkeypatch.setitem(STUDIES, "vanishing", study)
    monkeypatch.setattr(command, "settings_of", lambda options: smallest(options.out))
    assert main(["vanishing", "--out", str(results)]) == 0
    assert (results / "vanishing.json").read_bytes() == before


def test_other_settings_are_measured(results: Path) -> None:
    asked: list[Settings] = []

    def measure(settings: Settings) -> dict[str, Any]:
        asked.append(settings)
        raise FastresError("asked")

    study = replace(vanishing.STUDY, measure=measure)
    with pytest.raises(FastresError, match="asked"):
        report.measured(study, replace(smallest(results), draws=2), "command")
    with pytest.raises(FastresError, match="asked"):
        report.measured(study, smallest(results), "command", again=True)
    assert len(asked) == 2


def test_a_broken_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "vanishing.json").write_text('{"study": "vanishing"')
    with pytest.raises(FastresError, match=r"vanishing.json is not a study's result"):
        report.read(tmp_path / "vanishing.json")


def test_command_line_sizes(tmp_path: Path) -> None:
    def chosen(*words: str) -> Settings:
        return command.settings_of(command._parser().parse_args([*words, "--out", str(tmp_path)]))

    assert (chosen("all").seeds, chosen("all").deep, chosen("all").size) == (3, 56, "full")
    quick = chosen("all", "--quick", "--seeds", "2", "--deep", "110")
    assert (quick.seeds, quick.deep, quick.size) == (2, 110, "quick")
    assert quick.fingerprint != chosen("all", "--quick").fingerprint
    assert replace(quick, workers=7).fingerprint == quick.fingerprint
    options = command._parser().parse_args(["vanishing", "--quick", "--seeds", "2"])
    assert command.command_of("vanishing", options) == "python -m bench.study vanishing --quick --seeds 2"


def test_a_broken_folder_of_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["degradation", "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("study: ")


def test_missing_matplotlib_is_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["all", "--out", str(tmp_path)]) == 2
    assert install("bench") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingDependencyError), report.drawing():
        pass


@pytest.fixture
def committed() -> dict[str, dict[str, Any]]:
    return {study: copy.deepcopy(data_of(COMMITTED, study)) for study in STUDIES}


def test_the_committed_page_and_tables_are_the_committed_results(committed: dict[str, dict[str, Any]]) -> None:
    found = [(study, report.read(COMMITTED / f"{name}.json")) for name, study in STUDIES.items()]
    results = [(study, result) for study, result in found if result is not None]
    assert PAGE.read_text(encoding="utf-8") == report.as_markdown(results, "../bench/results/studies")
    assert (COMMITTED / "index.html").read_text(encoding="utf-8") == report.as_html(results, COMMITTED)
    for name, study in STUDIES.items():
        for table, records in study.tables(committed[name]).items():
            assert (COMMITTED / f"{table}.csv").read_bytes() == report.as_csv(records)


def test_committed_results_are_of_the_full_size() -> None:
    for study in STUDIES:
        result = report.read(COMMITTED / f"{study}.json")
        assert result is not None
        assert (result.environment["size"], result.environment["seeds"]) == ("full", [0, 1, 2])
    assert not list(COMMITTED.glob("**/*.safetensors"))


def test_sentences_follow_the_numbers(committed: dict[str, dict[str, Any]]) -> None:
    """If an effect is absent from the data, the paragraph says so."""
    data = committed["degradation"]
    assert "in every seed" in degradation.paragraph(data)
    swapped = {"plain20": "plain56", "plain56": "plain20"}
    for network in data["networks"]:
        network["model"] = swapped.get(network["model"], network["model"])
    assert "Degradation does not show at this scale" in degradation.paragraph(data)

    data = committed["shortcuts"]
    for network in data["networks"]:
        network["accuracy"] = 0.9
    for row in data["blocks"]:
        row["accuracy_without"] = 0.8
    assert "does not show clearly" in shortcuts.paragraph(data)
    for network in data["networks"]:
        network["accuracy"] = 0.3
    assert "the comparison says nothing" in shortcuts.paragraph(data)

    data = committed["vanishing"]
    for row in data["own"]:
        row["norms"] = [0.001, 1.0]
    assert "vanish." in vanishing.paragraph(data)

    data = committed["shattering"]
    for row in data["own"]:
        row["cosines"] = [0.5] * 6
    assert shattering.paragraph(data).endswith("the effect does not show here.")


def test_numbers_are_written_as_people_write_them() -> None:
    assert number(24123.0) == "24,100"
    assert number(0.012345) == "0.0123"
    assert number(0) == "0"
    assert number(7.5e14) == "7.5×10¹⁴"
    assert power(1.72e-31) == "1.7×10⁻³¹"


def test_committed_tables_can_be_read_as_numbers() -> None:
    for path in COMMITTED.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert all(None not in row and None not in row.values() for row in rows)


def test_committed_json_is_plain(committed: dict[str, dict[str, Any]]) -> None:
    assert "NaN" not in json.dumps(committed)
