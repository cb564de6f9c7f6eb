"""Numbers in the README and the pages agree with the committed results and with the data in the code."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fastres.bench.report import results, standing

from .blocks import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
PERFORMANCE = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
INTEL = ROOT / "bench" / "results" / "cpu-intel-xeon-2-threads" / "results.json"
OTHERS = {"ResNet-18": "resnet18", "ResNeXt-50": "resnext50_32x4d", "ResNet-152": "resnet152"}  # folders beside it
RESULTS = ROOT / "bench" / "results" / "cpu-amd-epyc-2-threads" / "results.json"


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, int], dict[str, Any]]:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {(row["engine"], row["batch"]): row for row in found if row["model"] == "resnet50" and row["status"] == "ok"}


@pytest.fixture(scope="module")
def intel() -> dict[tuple[str, str, int], dict[str, Any]]:
    found = json.loads(INTEL.read_text(encoding="utf-8"))["rows"]
    return {(row["dtype"], row["engine"], row["batch"]): row for row in found if row["status"] == "ok"}


def test_the_claim_of_the_front_pages_is_right() -> None:
    found = json.loads((INTEL.parent / "cold" / INTEL.name).read_text(encoding="utf-8"))
    assert found["environment"]["first_call"] == "empty compilation caches on disk"
    rows = {(row["engine"], row["dtype"], row["batch"]): row for row in found["rows"]}
    points = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 8)]
    ratios = sorted(rows[("eager", *point)]["p50_ms"] / rows[("fastres", *point)]["p50_ms"] for point in points)
    first = {engine: sorted(rows[engine, dtype, 1]["first_call_s"] for dtype in ("float32", "bfloat16"))
             for engine in ("fastres", "compile")}  # fmt: skip
    assert {f"{time:.1f}" for time in first["fastres"]} == {"0.2"}
    said = [" ".join(text.replace("**", "").split()) for text in (README, START)]
    for text in said:
        assert f"{ratios[0]:.1f} to {ratios[-1]:.1f} times as fast as eager PyTorch on a CPU" in text
        low, high = first["compile"]
        assert f"the first answer in 0.2 s where torch.compile takes {low:.0f} to {high:.0f} s" in text
    card = json.loads((ROOT / "bench/results/nvidia-h100-80gb-hbm3/results.json").read_text(encoding="utf-8"))["rows"]
    rates = [next(f"{row['images_per_s']:,.0f}" for row in card if (row["engine"], row["batch"]) == (engine, 256))
             for engine in ("fastres", "compile")]  # fmt: skip
    assert f"classifies {rates[0]} images/s, where torch.compile reaches {rates[1]}" in said[0]
    assert (
        min(row["p50_ms"] for row in found["rows"] if row["batch"] == 1 and row["p50_ms"])
        == (rows["fastres", "int8", 1]["p50_ms"])
    )


def test_the_readmes_figures_of_the_server_are_right() -> None:
    found = json.loads((INTEL.parent / "serve.json").read_text(encoding="utf-8"))
    rate = {name: f"{server['capacity_images_per_s']:.1f}" for name, server in found["servers"].items()}
    said = " ".join(README.split())
    assert f"answers {rate['fastres']} images/s, where FastAPI with eager PyTorch answers {rate['plain']}" in said


def test_the_sentences_below_it_are_right() -> None:
    headline, _ = standing.verdict(results.read(INTEL).rows)
    said = " ".join(README.split())
    assert headline.rstrip(".") in said
    for name, folder in OTHERS.items():
        file = INTEL.parent / folder / INTEL.name
        found = standing.points(results.read(file).rows)
        lost = [point for point in found if not point.is_fastest]
        assert all(point.overlaps for point in lost)  # "and within the spread of the fastest at the others"
        link = f"[{name}]({file.relative_to(ROOT).as_posix()})"
        assert f"{len(found) - len(lost)} of {len(found)} ({link})" in said


def test_the_older_results_are_quoted_rightly(rows: dict[tuple[str, int], dict[str, Any]]) -> None:
    one, eight = rows["fastres", 1], rows["fastres", 8]
    shares = [round(100 * row["roofline_share"]) for row in (one, eight)]
    assert f"{shares[0]} and {shares[1]} % of the roofline" in PERFORMANCE
    ratios = [f"{row['ratio_to_eager']:.2f}×" for row in (one, eight)]
    assert f"{ratios[0]} eager at batch 1 and {ratios[1]} at batch 8" in PERFORMANCE


def test_the_readmes_speed_in_8_bit_is_right(intel: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    said = " ".join(README.split())
    batches = sorted({batch for _, _, batch in intel})

    def ratios(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        return sorted(intel[(*one, batch)]["p50_ms"] / intel[(*other, batch)]["p50_ms"] for batch in batches)

    faster = ratios(("float32", "fastres"), ("int8", "fastres"))
    assert f"{faster[0]:.1f} to {faster[-1]:.1f} times as fast as in float32" in said
    assert f"OpenVINO takes {longer(ratios(('int8', 'openvino'), ('int8', 'fastres')))} longer" in said


def longer(ratios: Iterable[float]) -> str:
    """Return the range of ratios as ``"2 to 19 %"``, which is how much longer the slower ones take."""
    percent = sorted(round(100 * (ratio - 1)) for ratio in ratios)
    return f"{percent[0]} to {percent[-1]} %"


def test_the_distances_between_the_engines_on_a_cpu_are_right(
    intel: dict[tuple[str, str, int], dict[str, Any]],
) -> None:
    points = standing.points(results.read(INTEL).rows)
    assert all(point.is_fastest for point in points)
    one, two, three = (
        longer(point.ahead for point in points if point.fastres.dtype == dtype)
        for dtype in ("float32", "bfloat16", "int8")
    )
    said = f"The next engine takes {one} longer in float32, {two} in bfloat16, and {three} in 8 bit."
    compiled = longer(
        row["p50_ms"] / intel[dtype, "fastres", batch]["p50_ms"]
        for (dtype, engine, batch), row in intel.items()
        if engine == "compile"
    )
    assert f"{said} torch.compile takes {compiled} longer." in PERFORMANCE
    others = [results.read(INTEL.parent / folder / INTEL.name).rows for folder in OTHERS.values()]
    worst = max((point for rows in others for point in standing.points(rows)), key=lambda point: point.behind)
    name = {folder: name for name, folder in OTHERS.items()}[worst.fastres.model]
    where = f"{name} in {worst.fastres.dtype}, {worst.fastres.batch} images"
    assert f"which takes at most {100 * worst.behind:.1f} % longer ({where})" in PERFORMANCE


def test_the_first_call_of_torch_compile_is_right(intel: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "migrate" / "from-torch-compile.md").read_text(encoding="utf-8")
    file = ROOT / "bench" / "results" / "nvidia-h100-80gb-hbm3" / "results.json"
    first = {row["engine"]: row["first_call_s"] for row in json.loads(file.read_text())["rows"] if row["batch"] == 1}
    theirs, ours = (intel["float32", engine, 1]["first_call_s"] for engine in ("compile", "fastres"))
    said = " ".join(page.split())
    assert f"takes {theirs:.0f} s on two threads of an Intel Xeon; fastres's takes {ours:.1f} s." in said
    assert f"in float16, {first['compile']:.0f} s and {first['fastres']:.0f} s, with caches as found on disk" in said
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    fastest = {row["engine"]: row["p50_ms"] for row in rows if row["batch"] == 1}
    assert fastest["compile_max_autotune"] < fastest["fastres"]  # "which is ahead of fastres at batch 1"


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
    small = [round(100 * (1 - row["ratio"])) for row in found if (row["size"], row["batch"]) == (32, 1)]
    assert f"takes {small[0]} % less in a ResNet-20, and {small[1]} % less in a ResNet-56" in said


def test_the_times_of_one_image_are_right() -> None:
    for row in json.loads((INTEL.parent / "calls.json").read_text(encoding="utf-8"))["rows"]:
        times = [row[f"{way}_ms"] for way in ("operators", "one_by_one", "primitives")]
        cells = " | ".join(f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms" for ms in times)
        assert (f"| {row['model']} | {row['dtype']} | {cells} |" in PERFORMANCE) == (row["threads"] == 2)


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
    for name in ("cards", "drawings", "migrate", "results"):
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


def test_the_servers_figures_are_the_result_file() -> None:
    found = json.loads((INTEL.parent / "serve.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "serve.md").read_text(encoding="utf-8").split())

    def pair(level: dict[str, Any]) -> str:
        values = [level["latency_ms"][name] for name in ("p50", "p99")]
        if values[1] < 1000:
            return ", ".join(f"{value:.0f}" for value in values) + " ms"
        return ", ".join(f"{value / 1000:.2g}" for value in values) + " s"

    for label, name in {"fastres serve": "fastres", "FastAPI + eager PyTorch, one image a call": "plain",
                        "LitServe + eager PyTorch": "litserve"}.items():  # fmt: skip
        server = found["servers"][name]
        cells = [f"{server['capacity_images_per_s']:.1f}", *(pair(level) for level in server["loads"][1:])]
        assert f"| {label} | {' | '.join(cells)}" in page, cells
    offered = [round(level["offered_per_s"]) for level in found["servers"]["fastres"]["loads"]]
    assert f"p50, p99 at {offered[1]} requests/s | at {offered[2]} requests/s | at {offered[3]} requests/s" in page
    assert f"reaches {found['offline_images_per_s']:.1f} images/s" in page
    beside = found["servers"]["fastres"]["one_at_a_time"]["server_ms"]["beside"]
    assert f"{beside['p50']:.1f} ms (p50) and {beside['p99']:.1f} ms (p99)" in page
