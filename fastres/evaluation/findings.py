"""What a run found, in sentences: the verdict, and what is amiss with the images, their labels or the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastres.pages.words import (
    ClassNames,
    between,
    count,
    digits_for,
    finite,
    listed,
    percent,
    points,
    shortened,
    significant,
)

# Classes with fewer images than this say nothing about a wrong order of the classes.
_FEW = 3
_SIGNIFICANT = 0.05
# A model that is surer of its answers than it is right, by this share of the images, has more than bad calibration.
_SURE = 0.3


def accurate(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the models whose accuracy is known, the most accurate first."""
    known = [model for model in models if (found := model.get("accuracy")) and finite(found.get("top1")) is not None]
    return sorted(known, key=lambda model: -model["accuracy"]["top1"])


def timed(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the models whose speed is known, the fastest first."""
    known = [model for model in models if (found := model.get("speed")) and finite(found.get("images_per_s"))]
    return sorted(known, key=lambda model: -model["speed"]["images_per_s"])


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the intervals of two models' top-1 accuracy overlap, as far as they are known."""
    bounds = [finite(model["accuracy"].get(f"top1_{end}")) for model in (one, other) for end in ("low", "high")]
    low, high, other_low, other_high = (bound if bound is not None else -1.0 for bound in bounds)
    return low <= other_high and other_low <= high


def verdict(document: Mapping[str, Any]) -> list[str]:
    """Return sentences: the most important one first."""
    models, images = document["models"], document["images"]
    if not images:
        return ["No image could be read, so nothing was measured."]
    ranked, fast = accurate(models), timed(models)
    said = [_headline(document, ranked, fast)]
    if len(ranked) > 1:
        said.append(_chance(ranked))
    elif ranked and (span := _interval(ranked[0])):
        said.append(f"The 95% interval is {span}: the accuracy on many more images of this kind is probably within it.")
    if len(fast) > 1:
        said.append(_trade(document, ranked, fast))
    return [text for text in (*said, *_agreement(document)) if text]


def _headline(document: Mapping[str, Any], ranked: Sequence[Any], fast: Sequence[Any]) -> str:
    alone = len(document["models"]) == 1
    if not ranked:
        why = "There are no labels" if document.get("labels") is None else "No image has a usable label"
        speed = f" {name(fast[0])} classifies {_speed(fast[0])}." if alone and fast else _fastest(fast)
        return f"{why}, so the accuracy is unknown.{speed}"
    best = ranked[0]
    right = f"{_top1(best)} of {count(best['accuracy'].get('images') or document['images'], 'image')}"
    if alone:
        return f"{name(best)} classifies {right} correctly{f', at {_speed(fast[0])}' if fast else ''}."
    if len(ranked) == 1:
        others = f"The accuracy of the {'other models' if len(document['models']) > 2 else 'other model'} is unknown."
        return f"{name(best)} classifies {right} correctly. {others}{_fastest(fast)}"
    equal = [model for model in ranked if model["accuracy"]["top1"] == best["accuracy"]["top1"]]
    if len(equal) > 1:
        who = f"All {len(ranked)} models are" if len(equal) == len(ranked) else f"{_names(equal)} are the most"
        return f"{who}{' equally' if len(equal) == len(ranked) else ''} accurate: {right} are right.{_fastest(fast)}"
    if len(fast) > 1 and fast[0] is best and not _as_fast(fast):
        return f"{name(best)} is both the most accurate and the fastest: {right} are right, at {_speed(best)}."
    return f"{name(best)} is the most accurate: {right} are right.{_fastest(fast)}"


def _fastest(fast: Sequence[Any]) -> str:
    if len(fast) < 2:
        return ""
    if close := _as_fast(fast):
        who = f"All {len(fast)} models" if 2 < len(fast) == len(close) + 1 else _names([fast[0], *close])
        return f" {who} are about equally fast: up to {_speed(fast[0])}."
    return f" {name(fast[0])} is the fastest: {_speed(fast[0])}."


def _as_fast(fast: Sequence[Any]) -> list[Any]:
    """Return the models whose times of a batch overlap, from p20 to p80, with those of the fastest one."""
    slowest = _rate(fast[0], "p80_ms")
    return [model for model in fast[1:] if slowest and (_rate(model, "p20_ms") or 0.0) >= slowest]


def _rate(model: Mapping[str, Any], quantile: str) -> float | None:
    ms, batch = finite(model["speed"].get(quantile)), model["speed"].get("batch")
    return batch / ms if ms and batch else None


def may_be_chance(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the difference in top-1 accuracy may be chance.

    Both models had the same images, so McNemar's test on these decides. Without it, the intervals do.
    """
    test = other.get("paired")
    if test and test.get("other") == best["name"]:
        return bool(test["p_value"] >= _SIGNIFICANT)
    return overlap(best, other)


def _chance(ranked: Sequence[Any]) -> str:
    best, others = ranked[0], ranked[1:]
    alike = [name(model) for model in others if may_be_chance(best, model)]
    below = [name(model) for model in others if not may_be_chance(best, model)]
    test = "McNemar's test on the same images, 5%" if all(model.get("paired") for model in others) else "95% intervals"
    if not alike:
        which = "the other model" if len(others) == 1 else "all others"
        return f"It is more accurate than {which} beyond chance ({test})."
    if not below:
        return f"These images do not show that one model is more accurate than another ({test})."
    return (
        f"The difference between {name(best)} and {listed(alike)} may be chance. {listed(below)} "
        f"{'is' if len(below) == 1 else 'are'} less accurate beyond chance ({test})."
    )


def _trade(document: Mapping[str, Any], ranked: Sequence[Any], fast: Sequence[Any]) -> str:
    """Compare the fastest model with the most accurate one, or with the reference or the slowest one."""
    fastest = fast[0]
    of_reference = [model for model in fast if model["name"] == document.get("reference")]
    other = next(model for model in (*ranked[:1], *of_reference, fast[-1]) if model in fast and model is not fastest)
    if other in _as_fast(fast):
        return ""
    ratio = fastest["speed"]["images_per_s"] / other["speed"]["images_per_s"]
    said = f"{name(fastest)} is {significant(ratio, 2)} times as fast as {name(other)}"
    if fastest not in ranked or other not in ranked:
        return said + "."
    less = other["accuracy"]["top1"] - fastest["accuracy"]["top1"]
    if less == 0:
        return f"{said}, and as accurate."
    worse = f"{points(abs(less))} percentage points {'less' if less > 0 else 'more'} accurate"
    return f"{said} and {worse}" + (", which may be chance." if may_be_chance(other, fastest) else ".")


def _agreement(document: Mapping[str, Any]) -> list[str]:
    known = [model for model in document["models"] if (found := model.get("agreement"))
             and finite(found.get("same_class")) is not None]  # fmt: skip
    if not known:
        return []
    known.sort(key=lambda model: model["agreement"]["same_class"])
    shares = [percent(model["agreement"]["same_class"], digits_for(model["agreement"]["images"])) for model in known]
    reference = shortened(document.get("reference") or "the reference", 60)
    if len(known) == 1:
        return [f"{name(known[0])} gives the same class as {reference} for {shares[0]} of the images."]
    if shares[0] == shares[-1]:
        return [f"All other models give the same class as {reference} for {shares[0]} of the images."]
    return [
        f"The other models give the same class as {reference} for {shares[0]} ({name(known[0])}) to {shares[-1]} "
        f"({name(known[-1])}) of the images."
    ]


def doubts(document: Mapping[str, Any], names: ClassNames) -> list[str]:
    """Return a sentence or two for everything in the answers that suggests that the accuracy is measured wrongly."""
    return _wrong_order(document, names) or [
        text for model in document["models"] for text in _odd_answers(model, names)
    ]


def warnings(document: Mapping[str, Any], names: ClassNames) -> list[str]:
    """Return a sentence or two for what is missing: images that could not be read, and classes without images."""
    said = []
    if document.get("unreadable"):
        unreadable = count(document["unreadable"], "image")
        said.append(f"{unreadable} could not be read. No number below counts what could not be read.")
    if document.get("skipped"):
        said.append(f"{count(document['skipped'], 'image')} {_was(document['skipped'])} skipped and not counted.")
    said += [
        f"{name(model)} gives no answer to {count(unanswered, 'image')} (NaN). These count as wrong."
        for model in document["models"]
        if (unanswered := (model.get("accuracy") or {}).get("unanswered"))
    ]
    said += [f"Left out: {entry['name']}. {entry['reason']}." for entry in document.get("left_out") or ()]
    missing = (document.get("labels") or {}).get("missing") or []
    if missing:
        total = len(document.get("class_names") or ())
        unread = " that could be read" if document.get("unreadable") else ""
        of = f"{len(missing):,} of {total:,} classes" if total else count(len(missing), "class", "classes")
        said.append(
            f"{of} {'has' if len(missing) == 1 else 'have'} no images{unread}: "
            f"{listed([_quoted(names, index) for index in missing], 6)}. "
            "The accuracy on other classes does not show how well the models know these."
        )
    return said


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _wrong_order(document: Mapping[str, Any], names: ClassNames) -> list[str]:
    """Say that most classes are answered as one other class each, as they are if the order of the classes is wrong."""
    for model in document["models"]:
        cells = (model.get("accuracy") or {}).get("confusions") or []
        images: dict[int, int] = {}
        for label, _, number in cells:
            images[label] = images.get(label, 0) + number
        enough = [label for label, number in images.items() if number >= _FEW]
        moved = {label: predicted for label, predicted, number in cells
                 if label != predicted and images[label] >= _FEW and number > images[label] / 2}  # fmt: skip
        if len(moved) > max(1, len(enough) / 2) and len(set(moved.values())) > len(moved) / 2:
            label, predicted = next(iter(moved.items()))
            return [
                f"The labels may be in another order than the model's classes: for {len(moved):,} of "
                f"{count(len(enough), 'class', 'classes')}, {name(model)} gives one other class to most of their "
                f"images, for example {_quoted(names, predicted)} to those of {_quoted(names, label)}."
            ]
    return []


def _odd_answers(model: Mapping[str, Any], names: ClassNames) -> list[str]:
    """Say that a model has collapsed, is no better than a constant answer, or is surely wrong."""
    accuracy = model.get("accuracy")
    if not accuracy or not accuracy.get("images") or finite(accuracy.get("top1")) is None:
        return []
    images, top1, classes = accuracy["images"], accuracy["top1"], accuracy.get("classes") or []
    said = []
    if len(classes) > 1:
        most = max(classes, key=lambda entry: entry["images"])
        answered = max(classes, key=lambda entry: entry["predicted"])
        if answered["predicted"] > images / 2 and answered["predicted"] > 2 * answered["images"]:
            said.append(
                f"{name(model)} answers {_quoted(names, answered['index'])} for "
                f"{percent(answered['predicted'] / images)} of the images. Check its preprocessing and weights."
            )
        elif most["images"] < images and top1 <= most["images"] / images:
            said.append(
                f"{name(model)} is no better than always answering {_quoted(names, most['index'])}, which would "
                f"be right for {percent(most['images'] / images)} of the images."
            )
    confidence = mean_score(accuracy)
    if not said and confidence is not None and confidence - top1 > _SURE:
        said.append(
            f"{name(model)} is much surer than it is right: its mean score is {percent(confidence)}, its accuracy "
            f"{percent(top1)}. Check the labels and the preprocessing."
        )
    return said


def mean_score(accuracy: Mapping[str, Any]) -> float | None:
    """Return the mean softmax probability of the best class, from the bins of the calibration."""
    bins = [entry for entry in accuracy.get("calibration") or [] if entry["images"]]
    known = [(entry["images"], entry["confidence"]) for entry in bins if finite(entry.get("confidence")) is not None]
    images = sum(number for number, _ in known)
    return sum(number * score for number, score in known) / images if images else None


def name(model: Mapping[str, Any]) -> str:
    """Return the name of a model for a sentence."""
    return shortened(model["name"], 60)


def _quoted(names: ClassNames, index: int) -> str:
    return f"“{shortened(names(index), 40)}”"


def _names(models: Sequence[Mapping[str, Any]]) -> str:
    return listed([name(model) for model in models])


def _top1(model: Mapping[str, Any]) -> str:
    return percent(model["accuracy"]["top1"], digits_for(model["accuracy"].get("images") or 0))


def _interval(model: Mapping[str, Any]) -> str:
    accuracy = model["accuracy"]
    return between(accuracy.get("top1_low"), accuracy.get("top1_high"), digits_for(accuracy.get("images") or 0))


def _speed(model: Mapping[str, Any]) -> str:
    return f"{significant(model['speed']['images_per_s'])} images/s"
