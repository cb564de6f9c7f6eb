"""Made-up documents of evaluations for the tests of the report: the numbers of each belong together."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def wilson(share: float, images: int) -> tuple[float, float]:
    """Return the ends of the 95% interval of a share."""
    z = 1.96
    middle, spread = share + z * z / (2 * images), z * math.sqrt(share * (1 - share) / images + (z / images / 2) ** 2)
    return (middle - spread) / (1 + z * z / images), (middle + spread) / (1 + z * z / images)


def accuracy(labels: np.ndarray, predicted: np.ndarray, scores: np.ndarray, classes: int) -> dict[str, Any]:
    """Return the part ``accuracy`` of a model with these answers."""
    right = labels == predicted
    top1 = float(right.mean())
    low, high = wilson(top1, len(labels))
    per_class = []
    for index in range(classes):
        of, answered = labels == index, predicted == index
        share = float(right[of].mean()) if of.any() else None
        per_class.append({
            "index": index, "images": int(of.sum()), "top1": share,
            "top5": min(1.0, share + 0.06) if share is not None and classes > 5 else None,
            "precision": float(right[answered].mean()) if answered.any() else None, "predicted": int(answered.sum()),
        })  # fmt: skip
    known = [entry["top1"] for entry in per_class if entry["top1"] is not None]
    pairs, numbers = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    bins = []
    for place in range(15):
        inside = np.minimum((scores * 15).astype(int), 14) == place
        mean = float(scores[inside].mean()) if inside.any() else None
        share = float(right[inside].mean()) if inside.any() else None
        bins.append({"low": place / 15, "high": (place + 1) / 15, "images": int(inside.sum()), "confidence": mean,
                     "accuracy": share})  # fmt: skip
    return {
        "images": len(labels), "top1": top1, "top1_low": low, "top1_high": high,
        "top5": min(1.0, top1 + 0.06) if classes > 5 else None, "balanced": float(np.mean(known)), "nll": 0.4,
        "ece": sum(b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["images"]) / len(labels),
        "classes": per_class,
        "confusions": [[int(a), int(b), int(n)] for (a, b), n in zip(pairs.T, numbers, strict=True)],
        "calibration": bins,
    }  # fmt: skip


def model(
    name: str, labels: np.ndarray, classes: int, wrong: float, speed: float, *, seed: int = 0, compared: bool = True
) -> dict[str, Any]:
    """Return a model that gets about the share ``wrong`` of the labels wrong, mostly as a neighbouring class."""
    random = np.random.default_rng(seed)
    sure = random.beta(6, 0.6, len(labels))
    off = random.random(len(labels)) < wrong * (1.6 - sure)
    predicted = np.where(off, (labels + random.choice([1, 1, 2, 3, 5], len(labels))) % classes, labels)
    scores = np.clip(1 / classes + (1 - 1 / classes) * (sure * 0.93 + 0.06), 0, 1)
    order = [int(row) for row in np.argsort(-scores) if off[row]][:24]
    architecture, engine, dtype = name.split()
    layers = [f"layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3, 4) for block in range(3) for conv in (1, 2, 3)]
    return {
        "name": name, "model": architecture, "weights": "IMAGENET1K_V2", "engine": engine, "dtype": dtype,
        "transforms": {"resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0.485, 0.456, 0.406],
                       "std": [0.229, 0.224, 0.225]},
        "accuracy": accuracy(labels, predicted, scores, classes),
        "agreement": {
            "images": len(labels), "same_class": 1 - 0.4 * wrong, "clear": int(0.9 * len(labels)),
            "clear_same_class": 1.0, "logit_error": 0.0123,
            "layers": [{"name": name, "error": 0.002 + 0.0007 * place * random.uniform(0.6, 1.2)}
                       for place, name in enumerate(["conv1", *layers, "fc"])],
            "layers_images": 32, "layers_reason": None,
        } if compared else None,
        "speed": {"images_per_s": speed, "p20_ms": 15600 / speed, "p50_ms": 16000 / speed, "p80_ms": 17000 / speed,
                  "batch": 16, "first_answer_s": 0.412},
        "mistakes": [{"row": row, "name": f"{labels[row]}/photo {row}.jpg", "label": int(labels[row]),
                      "predicted": int(predicted[row]), "score": float(scores[row]),
                      "label_score": float(1 - scores[row]) / 2} for row in order],
        "disagreements": [{"row": row, "name": f"{labels[row]}/photo {row}.jpg", "label": int(labels[row]),
                           "reference": int(labels[row]), "reference_score": 0.51, "predicted": int(predicted[row]),
                           "score": 0.44, "logit_error": 0.034} for row in order[::2]] if compared else [],
    }  # fmt: skip


def document(models: list[dict[str, Any]], names: Sequence[str], images: int, **other: Any) -> dict[str, Any]:
    """Return the document of a run with these models; ``other`` replaces parts of it."""
    reference = models[0]["name"] if len(models) > 1 else None
    return {
        "fastres": "0.1.0", "date": "2026-11-27", "command": "fastres evaluate photos --model resnet50",
        "machine": {"cpu": "A processor", "gpu": None, "threads": 2, "torch": "2.11.0"}, "source": ["photos"],
        "kind": "files", "images": images, "unreadable": 0, "errors": [], "skipped": 0, "decoder": "exact",
        "batch_size": 16,
        "labels": {"source": "folders", "order": "names", "text": f"{len(names)} folders, named as the model's classes",
                   "missing": []},
        "class_names": list(names), "reference": reference, "models": models, **other,
    }  # fmt: skip


def digits() -> dict[str, Any]:
    """Three models, ten classes, an unreadable image."""
    labels = np.random.default_rng(1).integers(0, 10, 1797)
    models = [
        model("resnet20 fastres float32", labels, 10, 0.04, 812.0, compared=False),
        model("resnet20 fastres bfloat16", labels, 10, 0.045, 1650.0, seed=0),
        model("resnet20 onnx int8", labels, 10, 0.17, 2410.0, seed=2),
    ]
    errors = [{"row": 5, "name": "3/broken.jpg", "error": "cannot identify image file"}]
    return document(models, DIGITS, 1797, unreadable=1, errors=errors)


def two_classes() -> dict[str, Any]:
    """One model, two classes, few images."""
    labels = np.random.default_rng(2).integers(0, 2, 90)
    return document([model("resnet18 fastres float32", labels, 2, 0.1, 31.2, compared=False)], ("cat", "dog"), 90)


def large(models: int = 8, classes: int = 1000, images: int = 20_000) -> dict[str, Any]:
    """Many models and classes, as ImageNet has."""
    labels = np.random.default_rng(3).integers(0, classes - 3, images)
    names = [f"a class with a name {index}, also known as the {index}th" for index in range(classes)]
    found = [
        model(f"resnet{18 + 8 * place} fastres {dtype}", labels, classes, 0.3 - 0.02 * place, 300.0 / (1 + place),
              seed=place, compared=place > 0)
        for place in range(models) for dtype in ["float32"]
    ]  # fmt: skip
    given = document(found, names, images)
    given["labels"]["missing"] = [classes - 3, classes - 2, classes - 1]
    return given


def unlabelled() -> dict[str, Any]:
    """Two models whose answers to images without labels are compared."""
    given = digits()
    given["models"], given["labels"] = given["models"][:2], None
    for entry in given["models"]:
        entry["accuracy"], entry["mistakes"] = None, []
        for found in entry["disagreements"]:
            found["label"] = None
    return given


def empty() -> dict[str, Any]:
    """No image could be read, and nothing is known."""
    entry = {
        "name": "resnet18", "model": "resnet18", "weights": "", "engine": "fastres", "dtype": "float32",
        "transforms": {}, "accuracy": None, "agreement": None, "speed": None, "mistakes": [], "disagreements": [],
    }  # fmt: skip
    errors = [{"row": row, "name": f"{row}.jpg", "error": "empty file"} for row in range(3)]
    return document([entry], [], 0, unreadable=3, errors=errors, labels=None, command=None, reference=None)


def thumbnail(row: int) -> str:
    """Return a small picture as a data URI."""
    random = np.random.default_rng(row)
    small = Image.fromarray(random.integers(0, 256, (6, 5 + row % 4, 3), dtype=np.uint8))
    data = io.BytesIO()
    small.resize((160 + 20 * (row % 3), 160), Image.Resampling.BICUBIC).save(data, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def thumbnails(given: dict[str, Any]) -> dict[int, str]:
    """Return a picture for every row that the document shows."""
    rows = {found["row"] for entry in given["models"] for key in ("mistakes", "disagreements") for found in entry[key]}
    return {row: thumbnail(row) for row in rows}


def nasty() -> dict[str, Any]:
    """Long names, names that look like HTML, and every number that may be absent absent in one model of two."""
    given = digits()
    markup = ("<script>alert(1)</script> & “猫” \x00\ud83d " + "very long " * 30)[:200]
    given["class_names"] = [
        markup,
        "two",
        "two",
        "",
        *("ä" * 200 for _ in range(3)),
        "</title>",
        "a" * 200,
        "'\" onload=x",
    ]
    given["source"] = ["<b>photos</b>"]
    given["labels"] = {"source": "csv", "order": "text", "text": "<i>as text</i>: '1', '10', '2'", "missing": [7]}
    full, bare = given["models"][1], given["models"][2]
    full["name"] = "<script>" + "m" * 200
    for key in ("mistakes", "disagreements"):
        for entry in full[key]:
            entry["name"] = "ordner/" + "<img src=x>é" * 18 + ".jpg"
    bare["accuracy"] |= {"top5": None, "nll": None, "confusions": [], "classes": [], "calibration": []}
    bare["agreement"] |= {"same_class": None, "clear_same_class": None, "logit_error": None, "layers": None,
                          "layers_reason": "an exported file has no layers"}  # fmt: skip
    bare["speed"] = None
    for entry in bare["mistakes"]:
        entry["label_score"] = None
    for entry in bare["disagreements"]:
        entry["label"] = entry["logit_error"] = None
    return given
