"""The record of a calibration: what was quantised, with which images, how, and how near to float32 the result is.

It is plain data, which is saved with the plan in 8 bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from fastres.executors.cpu import CpuExecutor
from fastres.model.model import Model
from fastres.network.plan import LOGITS, POOLED, Plan
from fastres.quantisation.comparison import Comparison, compare
from fastres.quantisation.search import Calibrated
from fastres.version import __version__
from fastres.weights.hashing import state_sha256

from .samples import Samples

BATCH = 16


def make_record(model: Model, samples: Samples, found: Calibrated, limit: int) -> dict[str, Any]:
    """Return the record without the judgement, which needs the model in 8 bit (:func:`judged`)."""
    chosen = asdict(found.chosen)
    return {
        "version": __version__,
        "float32": {
            "model": model.architecture.name,
            "weights": model.weights,
            "state_sha256": state_sha256(model.state_dict()),
        },
        "images": {
            "read": samples.read,
            "skipped": samples.skipped,
            "reasons": [reason for _, reason in samples.reasons],
            "used": len(samples.pixels),
            "measured": len(samples.fit),
            "chosen_on": len(samples.choose),
            "judged_on": len(samples.judge),
        },
        "method": chosen["method"],
        "equalised": chosen["equalised"],
        "corrected": chosen["corrected"],
        "kept": list(chosen["kept"]),
        "weight_limit": limit,
        "candidates": [{**asdict(candidate), "kept": len(candidate.kept)} for candidate in found.candidates],
        "sensitivity": found.sensitivity,
        "signal_to_noise": found.signal_to_noise,
    }


def judged(quantized: Model, plan: Plan, samples: Samples) -> dict[str, Any]:
    """Compare a model in 8 bit with the float32 ``plan`` on images that had no part in the calibration."""
    classes = bool(quantized.num_classes)
    executor, output = CpuExecutor(plan), LOGITS if classes else POOLED
    batches = samples.judge.split(BATCH)
    with torch.no_grad():
        truth = torch.cat([executor.run(batch, (output,))[0] for batch in batches])
        found = torch.cat([quantized(batch) for batch in batches])
    comparison = compare(found, truth, classes)
    record: dict[str, Any] = {"agreement": _agreement(comparison), "accuracy": None}
    labels = samples.judge_labels
    if labels is not None:
        shares = [float((logits.argmax(1) == labels).double().mean()) for logits in (truth, found)]
        record["accuracy"] = {"images": len(labels), "float32": shares[0], "int8": shares[1]}
    return record


def _agreement(comparison: Comparison) -> dict[str, Any]:
    snr = comparison.snr_db
    return {**asdict(comparison), "snr_db": snr if math.isfinite(snr) else None}


def record_text(record: Mapping[str, Any]) -> str:
    """Return a record as a few lines for a person."""
    images, agreement = record["images"], record["agreement"]
    lines = [
        f"calibrated on {images['used']} of {images['read']:,} images"
        + (f"; {images['skipped']:,} could not be read" if images["skipped"] else ""),
        f"scales by {record['method']}, {_corrections(record)}",
        _kept_text(record["kept"]),
        f"against float32, on {agreement['images']} images kept apart: {_agreement_text(agreement)}",
    ]
    accuracy = record["accuracy"]
    if accuracy is not None:
        lines.append(f"accuracy on these images: {accuracy['float32']:.2%} in float32, {accuracy['int8']:.2%} in 8 bit")
    worst = list(record["sensitivity"].items())[:3]
    lines.append("most sensitive steps: " + ", ".join(f"{name} {error:.2%}" for name, error in worst))
    return "\n".join(lines)


def _corrections(record: Mapping[str, Any]) -> str:
    used = {"weights equalised": record["equalised"], "biases corrected": record["corrected"]}
    return " and ".join(name for name, is_used in used.items() if is_used) or "no corrections"


def _kept_text(kept: list[str]) -> str:
    if not kept:
        return "every step is in 8 bit"
    return f"{len(kept)} step{'s are' if len(kept) > 1 else ' is'} in float32: {', '.join(kept)}"


def _agreement_text(agreement: Mapping[str, Any]) -> str:
    error = f"outputs differ by {agreement['logit_error']:.2%}"
    if agreement["agreement"] is None:
        return error
    clear = agreement["clear_agreement"]
    inside = "" if clear is None else f" ({clear:.1%} of the {agreement['clear']} whose margin exceeds the noise)"
    return f"same best class {agreement['agreement']:.1%}{inside}, {error}"
