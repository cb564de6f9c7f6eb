"""An evaluation as one self-contained HTML file without scripts, external fonts or external images.

The templates ``*.jinja`` hold the text. The values are those of the run's document, which is plain JSON data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastres.pages.templates import rendered
from fastres.pages.words import (
    ClassNames,
    between,
    digits_for,
    error,
    finite,
    percent,
    shortened,
    significant,
)

from . import charts, report_tables
from .findings import accurate, doubts, mean_score, timed, verdict, warnings

TEMPLATE = "report.html.jinja"


def render(document: Mapping[str, Any], pictures: Mapping[int, str]) -> str:
    """Return the report of a run as HTML text.

    ``pictures`` are thumbnails as data URIs, by the row of the image. A row without a picture has a blank one.
    """
    names = ClassNames(document.get("class_names") or ())
    return rendered(
        Path(__file__).parent,
        TEMPLATE,
        document=document,
        title=_title(document),
        verdict=verdict(document),
        doubts=doubts(document, names),
        warnings=warnings(document, names),
        sections=[_section(number, model, pictures) for number, model in enumerate(document["models"], 1)],
        comparison=_comparison(document),
        scatter=_scatter(document["models"]),
        facts=_facts(document),
        transforms=_transforms(document["models"]),
        few=charts.FEW,
        name=names,
        between=between,
        pictures=pictures,
    )


def _title(document: Mapping[str, Any]) -> str:
    sources = [shortened(str(source), 80) for source in document.get("source") or ()]
    return ", ".join([*sources[:3], *(["…"] if len(sources) > 3 else [])]) or "images"


def _section(number: int, model: Mapping[str, Any], pictures: Mapping[int, str]) -> dict[str, Any]:
    """Return what the section of a model shows; parts for which there are no numbers are empty."""
    accuracy, agreement = model.get("accuracy"), model.get("agreement")
    if accuracy and not accuracy.get("images"):
        accuracy = None
    layers = (agreement or {}).get("layers") or []
    known = [layer for layer in layers if finite(layer["error"]) is not None]
    bins = [entry for entry in (accuracy or {}).get("calibration") or [] if entry["images"]]
    rows = report_tables.class_rows(accuracy) if accuracy else []
    shown, folded = report_tables.SHOWN, report_tables.FOLDED
    pairs, kinds = report_tables.confusions(accuracy) if accuracy else ([], 0)
    return {
        "id": f"model-{number}",
        "kind": ", ".join(model[key] for key in ("model", "engine", "dtype") if model[key] not in model["name"]),
        "model": model,
        "accuracy": accuracy,
        "agreement": agreement,
        "digits": digits_for(accuracy["images"]) if accuracy else 1,
        "cards": _cards(model, accuracy),
        "mistakes": model.get("mistakes") or [],
        "wrong": report_tables.wrong(accuracy) if accuracy else 0,
        "disagreements": model.get("disagreements") or [],
        "differ": _differ(agreement),
        "matrix": report_tables.matrix(accuracy) if accuracy else None,
        "pairs": pairs,
        "kinds": kinds,
        "classes": rows[:shown],
        "more_classes": rows[shown : shown + folded],
        "left_out": max(len(rows) - shown - folded, 0),
        "bins": bins,
        "curve": charts.reliability(accuracy["calibration"]) if accuracy and bins else None,
        "mean_score": mean_score(accuracy) if accuracy else None,
        "layers": layers,
        "bars": charts.layer_bars(layers) if layers else None,
        "largest": max(known, key=lambda layer: layer["error"]) if known else None,
    }


def _cards(model: Mapping[str, Any], accuracy: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Return the numbers at the head of a model's section: what, the number, and what belongs to it."""
    cards = []
    if accuracy and finite(accuracy.get("top1")) is not None:
        digits = digits_for(accuracy["images"])
        share = partial(percent, digits=digits)
        span = between(accuracy.get("top1_low"), accuracy.get("top1_high"), digits)
        cards.append(("top-1 accuracy", share(accuracy["top1"]), f"95% interval: {span}" if span else ""))
        others = {"top-5 accuracy": "top5", "balanced accuracy": "balanced"}
        cards += [(said, share(accuracy[key]), "") for said, key in others.items() if accuracy.get(key) is not None]
    if (speed := model.get("speed")) and finite(speed.get("images_per_s")) is not None:
        cards.append(("images per second", significant(speed["images_per_s"]), f"batch {speed.get('batch')}"))
        if finite(speed.get("p50_ms")) is not None:
            spread = f"p20–p80: {significant(speed.get('p20_ms'))}–{significant(speed.get('p80_ms'))} ms"
            cards.append(("time of a batch", f"{significant(speed['p50_ms'])} ms", spread))
    if (agreement := model.get("agreement")) and finite(agreement.get("same_class")) is not None:
        digits, clear = digits_for(agreement["images"]), agreement.get("clear_same_class")
        spread = f"{percent(clear, digits)} of the {agreement['clear']:,} clear ones" if clear is not None else ""
        cards.append(("same class as the reference", percent(agreement["same_class"], digits), spread))
    if agreement and agreement.get("logit_error") is not None:
        cards.append(("logit error", error(agreement["logit_error"]), "relative to the reference"))
    return cards


def _differ(agreement: Mapping[str, Any] | None) -> int:
    """Return the number of images to which a model and the reference give different classes."""
    same = finite(agreement.get("same_class")) if agreement else None
    return round(agreement["images"] * (1 - same)) if agreement and same is not None else 0


def _comparison(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of all models: columns of numbers, and the intervals of top-1 accuracy on a common axis."""
    models = document["models"]
    ranked, ends = accurate(models), report_tables.axis(models)
    digits = digits_for(document["images"])
    best = ranked[0]["accuracy"]["top1"] if ranked else None
    different = len({model["accuracy"]["top1"] for model in ranked}) > 1
    top1: list[dict[str, Any] | None] = []
    for model in models:
        found = model.get("accuracy") or {}
        value = finite(found.get("top1"))
        if value is None or ends is None or best is None:
            top1.append(None)
            continue
        low, high = finite(found.get("top1_low")), finite(found.get("top1_high"))
        top1.append({
            "text": percent(value, digits),
            "range": between(low, high, digits),
            "bar": charts.interval(low, value, high, ends, best),
            "best": different and percent(value, digits) == percent(best, digits),
        })  # fmt: skip
    return {
        "top1": top1 if ranked else None,
        "columns": report_tables.columns(models, document["images"], document.get("reference")),
    }


def _scatter(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the chart of accuracy and speed, if at least two models have both."""
    points = []
    for model in accurate(timed(models)):
        found, top1 = model["accuracy"], model["accuracy"]["top1"]
        low, high = finite(found.get("top1_low")), finite(found.get("top1_high"))
        points.append(
            charts.Point(model["name"], model["speed"]["images_per_s"], top1,
                         top1 if low is None else low, top1 if high is None else high)
        )  # fmt: skip
    return charts.scatter(points) if len(points) > 1 else None


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of what was measured, where and how."""
    machine = document.get("machine") or {}
    kinds = {"files": "image files", "tar": "images in tar files", "parquet": "images in Parquet files"}
    facts = {
        "images": ", ".join(map(str, document.get("source") or ())),
        "read as": kinds.get(str(document.get("kind")), document.get("kind")),
        "decoder": document.get("decoder"),
        "batch size": document.get("batch_size"),
        "GPU": machine.get("gpu"),
        "CPU": machine.get("cpu"),
        "threads": machine.get("threads"),
        "torch": machine.get("torch"),
        "fastres": document.get("fastres"),
        "date": document.get("date"),
        "command": document.get("command"),
    }
    return [(said, str(value)) for said, value in facts.items() if value not in (None, "")]


def _transforms(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the preprocessing of each model as text."""

    def text(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return " ".join(map(text, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return [
        ", ".join(f"{key} {text(value)}" for key, value in (model.get("transforms") or {}).items() if value is not None)
        for model in models
    ]
