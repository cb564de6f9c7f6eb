"""Test that the tables and charts show the results and nothing else."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastres.bench.report import charts, results, show
from fastres.bench.report.results import LayerRow, Results, Row
from fastres.errors import FastresError

ENVIRONMENT: dict[str, Any] = {
    "gpu": None,
    "cpu": "A processor",
    "cpu_count": 4,
    "threads": 2,
    "load_average": 0.1,
    "torch": "2.13.0",
    "triton": None,
    "fastres": "0.1.0",
    "date": "2026-01-01T00:00:00+00:00",
    "ceilings": {"float32": {"tflops": 0.2, "gb_per_s": 30.0}},
}


def timed(engine: str, batch: int, ms: float, eager_ms: float, dtype: str = "float32") -> Row:
    return Row(
        "resnet50",
        224,
        batch,
        dtype,
        engine,
        "ok",
        p20_ms=0.9 * ms,
        p50_ms=ms,
        p80_ms=1.2 * ms,
        images_per_s=1e3 * batch / ms,
        ratio_to_eager=eager_ms / ms,
        ratio_to_eager_float32=2 * eager_ms / ms,
        max_rel_error=1.5e-6,
        peak_memory_mb=321.0,
        first_call_s=0.75,
        tflops=0.125,
        roofline_ms=4.0 * batch,
        roofline_share=4.0 * batch / ms,
        samples=15,
    )


ROWS = (
    timed("eager", 1, 20.0, 20.0),
    timed("fastres", 1, 8.0, 20.0),
    Row("resnet50", 224, 1, "float32", "compile", "absent", note="no [bold] compiler"),
    timed("eager", 8, 100.0, 100.0),
    timed("fastres", 8, 50.0, 100.0),
    Row("resnet50", 224, 8, "float32", "compile", "absent", note="no [bold] compiler"),
    Row("resnet50", 224, 8, "float32", "bad", "wrong", max_rel_error=0.5, note="its logits are off"),
    Row("resnet50", 224, 8, "bfloat16", "fastres", "unsupported", note="This CPU does not compute in bfloat16"),
)


def shown(*rows: Row, width: int | None = None, **environment: Any) -> str:
    text = io.StringIO()
    show.show(Results({**ENVIRONMENT, **environment}, rows), text)
    return text.getvalue()


def line_of(text: str, batch: int, engine: str) -> list[str]:
    found = [line.split() for line in text.splitlines() if line.split()[:2] == [str(batch), engine]]
    assert len(found) == 1
    return found[0]


def test_the_table_has_every_figure_uncut() -> None:
    text = shown(*ROWS)
    assert "A processor, 2 threads" in text
    assert "0.2 TFLOP/s (matmul), 30 GB/s (copy)" in text
    assert " 8.000  7.200–9.600     125.0     2.50  1.5e-06   321    0.75    0.125    50%  ★" in text
    assert "  100     90.0–120      80.0     1.00  1.5e-06   321    0.75    0.125    32%" in text
    assert "…" not in text


def test_half_precision_has_a_column_for_the_float32_ratio() -> None:
    assert "float32" not in shown(*ROWS[:2]).replace("float32, 224×224", "").replace("this run, float32", "")
    text = shown(timed("a_name_of_twenty_char", 256, 1234.5, 2469.0, "float16"))
    assert line_of(text, 256, "a_name_of_twenty_char")[5:7] == ["2.00", "4.00"]
    assert "…" not in text


def test_what_was_not_timed_is_in_the_table_and_explained_once() -> None:
    text = shown(*ROWS)
    assert line_of(text, 8, "compile")[2:] == ["absent"]
    assert line_of(text, 8, "bad")[2:] == ["wrong", "5.0e-01"]
    assert "resnet50, bfloat16, 224×224" in text
    assert re.search(r"8 +fastres +unsupported", text)
    flat = re.sub(r"\s+", " ", text)
    assert flat.count("no [bold] compiler") == 1
    assert "compile, float32: absent: no [bold] compiler (resnet50 batch 1, resnet50 batch 8)" in flat
    assert "bad, float32: wrong: its logits are off" in flat
    assert "fastres, bfloat16: unsupported: This CPU does not compute in bfloat16" in flat


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"load_average": 3.0}, True), ({"load_average": 0.5}, False), ({"load_average": 3.0, "gpu": "A GPU"}, False)],
)
def test_a_busy_machine_is_said(environment: dict[str, Any], said: bool) -> None:
    assert ("Other programs were running" in shown(*ROWS, **environment)) is said


@pytest.mark.parametrize("width", [72, 80, 100, 120])
def test_narrow_screens_drop_columns_and_cut_none(width: int) -> None:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width).print(show.table(("resnet50", 224, "float16"), [list(ROWS[:2])], width))
    assert "…" not in text.getvalue()
    cells = line_of(text.getvalue(), 1, "fastres")
    assert cells[2] == "8.000"
    assert cells[-2:] == ["50%", "★"]
    assert ("7.200–9.600" in cells) is (width >= 100)


def test_who_is_fastest_is_said() -> None:
    assert "fastres is the fastest engine at all 2 points." in shown(*ROWS)
    slow = replace(ROWS[4], p20_ms=119.0, p50_ms=125.0)
    text = re.sub(r"\s+", " ", shown(*ROWS[:4], slow))
    assert "fastres is the fastest engine at 1 of 2 points, and within the spread of the fastest at 1 more." in text
    assert (
        "Not the fastest: resnet50, float32, 224×224, batch 8: fastres takes 25.0% longer than eager (125 ms compared "
        "with 100 ms; their p20–p80 ranges overlap)"
    ) in text
    slower = shown(*ROWS[:4], replace(slow, p20_ms=121.0))
    assert "overlap" not in slower
    assert "fastres is the fastest engine at 1 of 2 points." in slower
    assert line_of(shown(*ROWS[:4], slow), 8, "eager")[-1] == "★"
    assert "not timed together with another" in shown(ROWS[0])


def draw(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> Figure:
    """Draw ``rows`` and return the figure."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    content = charts.throughput(Results(ENVIRONMENT, rows))
    assert content is not None
    assert content.startswith(b"\x89PNG")
    return figures[0]


def test_the_chart_has_a_panel_a_setting_with_bars_and_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = draw(monkeypatch, *ROWS)
    panels = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in panels] == [
        "resnet50, float32, 224×224, batch 1",
        "resnet50, float32, 224×224, batch 8",
    ]
    for axis, speeds in zip(
        panels, ({"eager": 50.0, "fastres": 125.0}, {"eager": 80.0, "fastres": 160.0}), strict=True
    ):
        names = [label.get_text() for label in axis.get_yticklabels()]
        bars = dict(zip(names, (patch.get_width() for patch in axis.patches), strict=True))
        assert bars == pytest.approx(speeds)
        assert names[-1] == "fastres"  # the fastest is on top
        texts = " ".join(text.get_text() for text in axis.texts)
        assert "roofline 250.0" in texts
        assert all(f"{speed:.1f}" in texts for speed in speeds.values())
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in dashed] == pytest.approx([250.0])  # type: ignore[index]
        assert axis.get_xlim()[1] > 250


def test_labels_lie_inside_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    # Worst case: the axis limits leave the only room beyond the longest bar, and whiskers extend past it.
    figure = draw(monkeypatch, *(replace(row, roofline_ms=7.9) for row in ROWS[:2]))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = figure.axes[0].texts
    assert len(texts) == 3
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_a_far_roofline_is_named_and_leaves_the_bars_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    (axis,) = draw(monkeypatch, *(replace(row, roofline_ms=0.5) for row in ROWS[:2])).axes
    assert "roofline 2,000 →" in [text.get_text() for text in axis.texts]
    assert 125 < axis.get_xlim()[1] < 250
    assert not [line for line in axis.lines if line.get_linestyle() == "--"]


def test_of_many_batches_three_are_drawn_and_panels_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [timed(engine, batch, 10.0, 10.0) for batch in (1, 2, 4, 8, 16) for engine in ("eager", "fastres")]
    more = [replace(row, model="resnet18") for row in rows]
    figure = draw(monkeypatch, *rows, *more[:2])
    titles = [axis.get_title().split(", ") for axis in figure.axes if axis.axison]
    assert [(title[0], title[-1]) for title in titles] == [
        ("resnet50", "batch 1"),
        ("resnet50", "batch 4"),
        ("resnet50", "batch 16"),
        ("resnet18", "batch 1"),
    ]
    assert len(figure.axes) == 6


def test_nothing_to_compare_draws_nothing(tmp_path: Path) -> None:
    assert [chart(Results(ENVIRONMENT, (ROWS[0], ROWS[2]))) for chart in charts.CHARTS.values()] == [None] * 3
    (tmp_path / "layers.png").write_bytes(b"of an earlier run")
    written = show.write(Results(ENVIRONMENT, ROWS), tmp_path)
    assert sorted(path.name for path in written) == ["report.html", "throughput.png", "throughput_by_batch.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: figures.append(figure))
    return figures


def test_lines_go_over_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = saved(monkeypatch)
    charts.by_batch(Results(ENVIRONMENT, tuple(reversed(ROWS[:7]))))
    upper, lower = figures[0].axes
    speeds = {line.get_color(): list(line.get_ydata()) for line in upper.lines}  # type: ignore[call-overload]
    assert speeds[charts.FASTRES_COLOUR] == pytest.approx([125.0, 160.0])
    assert speeds[charts.ENGINE_COLOURS["eager"]] == pytest.approx([50.0, 80.0])
    assert speeds[charts.ROOFLINE_COLOUR] == pytest.approx([250.0, 250.0])
    shares = {line.get_color(): list(line.get_ydata()) for line in lower.lines}  # type: ignore[call-overload]
    assert shares[charts.FASTRES_COLOUR] == pytest.approx([50.0, 64.0])
    assert [label.get_text() for label in upper.get_xticklabels()] == ["1", "8"]
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["fastres", "eager", "roofline"]


def step(name: str, us: float, least: float, bound: str, batch: int = 1) -> LayerRow:
    share = least / us
    return LayerRow(
        "resnet50", 224, batch, "float32", name, "1×1/1", "oneDNN", "2 threads", us, 10**9, 10**6, bound, least, share
    )


LAYERS = (
    step("stem", 400.0, 100.0, "compute"),
    step("head", 20.0, 15.0, "memory"),
    *(step("stem", 4000.0, 1000.0, "compute", batch) for batch in (8, 64)),
)


def test_steps_are_drawn_over_their_roofline_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = saved(monkeypatch)
    charts.layers(Results(ENVIRONMENT, ROWS, LAYERS))
    first, last = figures[0].axes
    assert first.get_title(loc="left") == (
        "resnet50, float32, 224×224, batch 1: 420 µs in 2 steps, roofline 115 µs (27% of it)"
    )
    assert "batch 64: 4.000 ms in 1 steps" in last.get_title(loc="left")
    heights = [patch.get_height() for patch in first.patches]  # type: ignore[attr-defined]
    assert heights == [400.0, 20.0, 100.0, 15.0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["stem", "head"]


def test_a_folder_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(Results(ENVIRONMENT, ROWS), tmp_path)
    assert show.main([str(tmp_path)]) == 0
    assert "resnet50, float32, 224×224" in capsys.readouterr().out
    assert (tmp_path / "throughput.png").is_file()
    assert "resnet50, float32" in (tmp_path / "report.html").read_text()


def test_runs_of_one_machine_become_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = replace(ROWS[1], p50_ms=9.0)
    for name, rows, layers in (("a", (*ROWS[:1], older), LAYERS[:2]), ("b", ROWS[:5], LAYERS[2:])):
        results.write(Results({**ENVIRONMENT, "command": name}, rows, layers), tmp_path / "runs" / name)
    assert show.main([str(tmp_path / "runs")]) == 2
    assert "--out" in capsys.readouterr().err
    merged = tmp_path / "runs" / "report"
    for _ in range(2):  # the second time, the first result is already in the folder
        assert show.main([str(tmp_path / "runs"), "--out", str(merged)]) == 0
    found = results.read(merged / "results.json")
    rows = {(row.batch, row.engine): row for row in found.rows}
    assert set(rows) == {(1, "eager"), (1, "fastres"), (1, "compile"), (8, "eager"), (8, "fastres")}
    assert rows[1, "fastres"].p50_ms == 8.0
    assert rows[1, "fastres"].ratio_to_eager_float32 == 2.5
    assert found.layers == LAYERS
    assert [run["command"] for run in found.environment["runs"]] == ["a", "b"]


def test_runs_of_different_machines_are_not_mixed(tmp_path: Path) -> None:
    for name in ("2.13.0", "2.14.0"):
        results.write(Results({**ENVIRONMENT, "torch": name}, ROWS), tmp_path / name)
    with pytest.raises(FastresError, match=r"2\.14\.0.*different machines or versions"):
        show.collect([tmp_path])


def test_a_folder_without_results_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main([str(tmp_path)]) == 2
    assert "results.json cannot be read" in capsys.readouterr().err
    with pytest.raises(FastresError):
        results.read(tmp_path / "results.json")
