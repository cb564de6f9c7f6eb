"""Numbers in the README and the pages agree with the committed results and with the data in the code."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from .blocks import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
RESULTS = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads" / "results.json"
ENGINES = {
    "eager PyTorch": "eager",
    "eager, channels last": "eager_channels_last",
    "torch.compile, frozen": "compile",
    "ONNX Runtime (`fastres export`)": "onnxruntime",
    "OpenVINO (`fastres export`)": "openvino",
    "**fastres**": "fastres",
}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], dict[str, Any]]:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {(row["engine"], row["batch"]): row for row in found if row["model"] == "resnet50" and row["status"] == "ok"}


def milliseconds(row: dict[str, Any]) -> str:
    return f"{row['p50_ms']:.1f} ms" if row["p50_ms"] < 100 else f"{row['p50_ms']:.0f} ms"


def test_the_readmes_table_is_the_result_file(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert RESULTS.relative_to(ROOT).as_posix() in README
    table = dict(re.findall(r"^\| ([^|]*[^| ]) \| (.* ms.* s\**) \|$", README, re.MULTILINE))
    assert set(table) == set(ENGINES)
    for label, engine in ENGINES.items():
        one, eight = rows[engine, 1], rows[engine, 8]
        first = one["first_call_s"]
        cells = [milliseconds(one), f"{one['ratio_to_eager']:.2f}", milliseconds(eight)]
        cells += [f"{eight['ratio_to_eager']:.2f}", f"{first:.0f} s" if first >= 10 else f"{first:.1f} s"]
        assert table[label].replace("*", "").split(" | ") == cells, label


def test_the_sentences_below_it_are_right(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    one, eight = rows["fastres", 1], rows["fastres", 8]
    shares = [round(100 * row["roofline_share"]) for row in (one, eight)]
    assert f"{shares[0]} to {shares[1]} %" in README
    assert f"{shares[0]} and {shares[1]} % of the roofline" in PERFORMANCE
    ratios = [f"{row['ratio_to_eager']:.2f}×" for row in (one, eight)]
    assert f"{ratios[0]} eager at batch 1 and {ratios[1]} at batch 8" in PERFORMANCE
    said = " ".join(README.split())
    engines = (
        ("compile_max_autotune", 1, "than torch.compile's max-autotune"),
        ("onnxruntime", 8, "than ONNX Runtime"),
    )
    for engine, batch, name in engines:
        longer = round(100 * (rows["fastres", batch]["p50_ms"] / rows[engine, batch]["p50_ms"] - 1))
        assert f"{longer} % longer {name}" in said
        fastest = min((row for (_, n), row in rows.items() if n == batch), key=lambda row: row["p50_ms"])
        assert fastest["engine"] == engine, "the engine that the README names is the fastest"


def test_the_readmes_speed_in_8_bit_is_right() -> None:
    file = ROOT / "bench" / "results" / "cpu-intel-xeon-2-threads" / "results.json"
    assert file.relative_to(ROOT).as_posix() in README
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    ms = {(row["engine"], row["dtype"], row["batch"]): row["p50_ms"] for row in found if row["status"] == "ok"}
    said = " ".join(README.split())
    for engine, other, words in (
        (("fastres", "int8"), ("fastres", "float32"), "as fast as in float32"),
        (("openvino", "int8"), ("fastres", "int8"), "as fast as fastres does"),
    ):
        ratios = sorted(ms[(*other, batch)] / ms[(*engine, batch)] for batch in (1, 8, 32))
        assert f"{ratios[0]:.1f} to {ratios[-1]:.1f} times {words}" in said


def test_the_distance_to_the_fastest_engine_on_a_cpu_is_right() -> None:
    file = ROOT / "bench" / "results" / "cpu-intel-xeon-2-threads" / "results.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    ms = {(row["dtype"], row["batch"], row["engine"]): row["p50_ms"] for row in found if row["status"] == "ok"}
    largest = 0.0
    for dtype, batch in {key[:2] for key in ms}:
        times = {engine: time for (*point, engine), time in ms.items() if tuple(point) == (dtype, batch)}
        largest = max(largest, times["fastres"] / min(times.values()) - 1)
        assert times["fastres"] < times.get("compile", float("inf"))
        assert min(times, key=lambda name: times[name]) in {"float32": {"onnxruntime"}}.get(
            dtype, {"openvino", "fastres"}
        )
    assert f"within {round(100 * largest)} % of the fastest engine" in PERFORMANCE


def test_the_gain_of_blocks_of_channels_is_right() -> None:
    file = ROOT / "bench" / "results" / "cpu-intel-xeon-2-threads" / "layouts.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    rows = {(row["size"], row["batch"]): row for row in found if row["model"] == "resnet50"}
    said = " ".join(PERFORMANCE.split())
    for size, words in ((224, "less time in blocks at 224×224"), (64, "less at 64×64")):
        less = sorted(round(100 * (1 - rows[size, batch]["ratio"])) for batch in (2, 4, 8))
        assert f"{less[0]} to {less[-1]} % {words}" in said
    more = round(100 * (rows[224, 1]["ratio"] - 1))
    assert f"A single image of 224×224 takes {more} % more" in said


def test_the_readmes_gpu_table_is_the_result_file() -> None:
    folder = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3"
    assert (folder / "results.json").relative_to(ROOT).as_posix() in README
    merged = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["engine"], row["batch"]): row for row in merged if row["status"] == "ok"}
    engines = {
        "eager, channels last": "eager_channels_last", "the same in a CUDA graph": "eager_cudagraph",
        "torch.compile": "compile", "fastres": "fastres",
    }  # fmt: skip
    table = dict(re.findall(r"^\| ([^|]*[^| ]) \| (.* ms .*[\d*]) \|$", README.replace("**", ""), re.MULTILINE))
    assert set(table) == set(engines)
    for label, engine in engines.items():
        times = [found[engine, batch]["p50_ms"] for batch in (1, 8, 64, 256)]
        cells = [f"{ms:.1f} ms" if ms >= 5.5 else f"{ms:.2f} ms" for ms in times[:3]]
        cells += [f"{times[3]:.1f} ms" if times[3] >= 10 else f"{times[3]:.2f} ms"]
        assert table[label].split(" | ") == [*cells, f"{found[engine, 256]['images_per_s']:,.0f}"], label
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "runs").glob("*rules*batch-256.json")]
    (rules,) = (row for run in runs for row in run["rows"] if row["engine"] == "fastres")
    assert f"With the rules alone an H100 runs {rules['images_per_s']:,.0f} images/s" in " ".join(README.split())


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model cards and drawings are up to date with the tables and the Plan."""
    folder = ROOT / "docs" / "mkdocs"
    monkeypatch.syspath_prepend(folder)
    for path, content in runpy.run_path(str(folder / "generate.py"))["generated"]().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name}: run python docs/mkdocs/generate.py"
    for name in ("cards", "drawings", "results"):
        assert Path(sys.modules.pop(name).__file__ or "").parent == folder


def test_the_classify_pages_tables_are_the_result_file() -> None:
    page = (ROOT / "docs" / "classify.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS.parent / "classify.json").read_text(encoding="utf-8"))
    for run in found["runs"]:
        rates = run["images_per_s"]
        cells = [f"{rates['decode']:.0f}", f"{rates['model']:.1f}", f"{rates['whole']:.1f}"]
        row = " | ".join([run["decoder"], *(f"{cell} images/s" for cell in cells), f"{run['share_of_slower']:.0%}"])
        assert f"| {row.replace('%', ' %')} |" in page
    times = {(row["width"], row["decoder"]): f"{row['ms_an_image']:#.3g} ms" for row in found["decoders"]}
    for width, height in ((500, 375), (1024, 768), (1600, 1200), (4000, 3000)):
        row = " | ".join(times[width, name] for name in ("exact", "Pillow draft", "fast"))
        assert f"| {width}×{height} | {row} |" in page
    fast = [row for row in found["decoders"] if row["decoder"] == "fast"]
    assert f"at most {max(row['largest_score_difference'] for row in fast):.4f}" in page
    kept = sorted(round(row["top_1_agreement"] * row["images"]) for row in fast)
    assert f"of {fast[0]['images']} photographs {kept[0]} to {kept[-1]} keep" in " ".join(page.split())
