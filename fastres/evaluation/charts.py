"""The charts of the report as inline SVG. Their style classes are in ``style.css.jinja``."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from fastres.pages.words import count, error, finite, percent, shortened, significant

# Bars of the calibration curve that stand for fewer images than this are pale.
FEW = 10


@dataclass(frozen=True)
class Point:
    """A model in the chart of accuracy and speed; ``low`` and ``high`` are the ends of the interval of accuracy."""

    name: str
    speed: float
    accuracy: float
    low: float
    high: float


def svg(width: float, height: float, said: str, parts: Sequence[str], style: str = "chart") -> str:
    """Return an SVG picture that readers of the screen describe as ``said``."""
    return (
        f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def interval(low: float | None, value: float, high: float | None, ends: tuple[float, float], best: float) -> str:
    """Return a share as a dot with its interval, on an axis that has these ``ends``; ``best`` is a line across."""
    first, span = ends[0], ends[1] - ends[0]

    def x(share: float) -> float:
        return 5 + 130 * (share - first) / span

    parts = [_line(0, 10, 140, 10, "track"), _line(x(best), 1, x(best), 19, "best-line")]
    if low is not None and high is not None:
        parts.append(_line(x(low), 10, x(high), 10, "range"))
    parts.append(_dot(x(value), 10, "dot"))
    return svg(140, 20, "interval", parts, "interval")


def scatter(points: Sequence[Point]) -> str:
    """Return the chart of accuracy against images per second. Filled dots: no other model is better at both."""
    width, height, left, top, right, bottom = 600.0, 380.0, 58.0, 14.0, 16.0, 44.0
    speeds = [point.speed for point in points]
    logarithmic = max(speeds) > 5 * min(speeds)
    across = math.log10 if logarithmic else float
    space = 0.12 * (across(max(speeds)) - across(min(speeds)) or abs(across(max(speeds))) or 1.0)
    x_ends = across(min(speeds)) - space, across(max(speeds)) + 2.5 * space
    lows, highs = [point.low for point in points], [point.high for point in points]
    space = max(0.1 * (max(highs) - min(lows)), 0.002)
    y_ends = max(0.0, min(lows) - space), min(1.0, max(highs) + space)

    def x(speed: float) -> float:
        return left + (width - left - right) * (across(speed) - x_ends[0]) / (x_ends[1] - x_ends[0])

    def y(share: float) -> float:
        return height - bottom - (height - top - bottom) * (share - y_ends[0]) / (y_ends[1] - y_ends[0])

    parts = []
    for share in _ticks(*y_ends, 5):
        parts.append(_line(left, y(share), width - right, y(share), "grid"))
        parts.append(_text(left - 7, y(share) + 4, f"{100 * share:.6g}%", "end"))
    marks = _powers(*x_ends) if logarithmic else _ticks(max(0.0, x_ends[0]), x_ends[1], 6)
    for speed in marks:
        parts.append(_line(x(speed), top, x(speed), height - bottom, "grid"))
        parts.append(_text(x(speed), height - bottom + 16, f"{speed:,.6g}", "middle"))
    parts.append(_text((left + width - right) / 2, height - 6, "images per second", "middle", "title"))
    parts.append(
        f'<text class="title" text-anchor="middle" transform="translate(13 {(height - bottom + top) / 2:.0f}) '
        'rotate(-90)">top-1 accuracy</text>'
    )
    taken = [(x(point.speed) - 6, y(point.accuracy) - 6, x(point.speed) + 6, y(point.accuracy) + 6) for point in points]
    for point in points:
        ahead = any(
            other.speed >= point.speed and other.accuracy >= point.accuracy
            and (other.speed, other.accuracy) != (point.speed, point.accuracy) for other in points
        )  # fmt: skip
        said = f"{shortened(point.name, 80)}: {percent(point.accuracy)}, {significant(point.speed)} images/s"
        parts.append(_line(x(point.speed), y(point.low), x(point.speed), y(point.high), "spread"))
        parts.append(_dot(x(point.speed), y(point.accuracy), "dot hollow" if ahead else "dot", said, 5))
    for point in points:
        label = shortened(point.name, 30)
        place = _place(x(point.speed), y(point.accuracy), _width(label), taken, (left, top, width, height - bottom))
        taken.append(place)
        if place[2] < x(point.speed):
            parts.append(_text(place[2], place[3] - 3, label, "end", "label"))
        else:
            parts.append(_text(place[0], place[3] - 3, label, "start", "label"))
    names = "; ".join(f"{shortened(point.name, 40)} {percent(point.accuracy)}" for point in points)
    return svg(width, height, f"Top-1 accuracy against images per second: {names}", parts)


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Return the calibration curve: accuracy and mean score of each bin of scores, and its number of images."""
    width, left, top, side, base = 424.0, 54.0, 10.0, 345.0, 62.0
    floor, bottom = top + 230.0, top + 230.0 + 22.0 + base
    most = max((entry["images"] for entry in bins), default=0) or 1

    def x(share: float) -> float:
        return left + side * share

    def y(share: float) -> float:
        return floor - 230.0 * share

    parts = []
    for tenth in range(0, 11, 2):
        parts.append(_line(left, y(tenth / 10), left + side, y(tenth / 10), "grid"))
        parts.append(_text(left - 6, y(tenth / 10) + 4, f"{10 * tenth}%", "end"))
        parts.append(_text(x(tenth / 10), bottom + 15, f"{10 * tenth}%", "middle"))
    for entry in bins:
        start, span = x(entry["low"]) + 1, max(side * (entry["high"] - entry["low"]) - 2, 1.0)
        share, score = finite(entry.get("accuracy")), finite(entry.get("confidence"))
        said = f"scores {percent(entry['low'], 0)} to {percent(entry['high'], 0)}: {count(entry['images'], 'image')}"
        if share is not None and score is not None:
            said += f", mean score {percent(score)}, accuracy {percent(share)}"
            style = "right few" if entry["images"] < FEW else "right"
            parts.append(_box(start, y(share), span, floor - y(share), style, said))
            parts.append(_line(start, y(score), start + span, y(score), "mean"))
        tall = 44.0 * entry["images"] / most
        parts.append(_box(start, bottom - tall, span, tall, "count", said))
        if entry["images"]:
            parts.append(_text(start + span / 2, bottom - tall - 3, _short(entry["images"]), "middle", "small"))
    parts += [_line(x(0), y(0), x(1), y(1), "diagonal"), _line(left, bottom, left + side, bottom, "axis")]
    for middle, said in ((floor - 115, "accuracy"), (bottom - 26, "images")):
        parts.append(
            f'<text class="title" text-anchor="middle" transform="translate(11 {middle:g}) rotate(-90)">{said}</text>'
        )
    parts.append(_text(left + side / 2, bottom + 33, "score of the answer", "middle", "title"))
    return svg(width, bottom + 40, "Accuracy by score of the answer, and the number of images by score", parts)


def layer_bars(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return the error of each layer as a bar, in the order of the network."""
    left, top, tall = 62.0, 10.0, 170.0
    step = max(9.0, min(34.0, 620.0 / max(len(layers), 1)))
    width, floor = left + step * len(layers) + 12.0, top + tall
    highest = max((value for layer in layers if (value := finite(layer.get("error"))) is not None), default=0.0) or 1.0
    parts = []
    for mark in _ticks(0.0, highest, 4):
        height = floor - tall * mark / highest
        parts.append(_line(left, height, width, height, "grid"))
        parts.append(_text(left - 6, height + 4, error(mark), "end"))
    for position, layer in enumerate(layers):
        value = finite(layer.get("error"))
        said = f"{layer['name']}: {error(layer.get('error'))}"
        height = tall * (value if value is not None else highest) / highest
        style = "bar" if value is not None else "bar lost"
        parts.append(_box(left + step * position + 1, floor - height, step - 2, max(height, 0.5), style, said))
    position = 0
    for stage, members in groupby(layers, key=lambda layer: str(layer["name"]).split(".")[0]):
        number = len(list(members))
        start, room = left + step * position, step * number
        parts.append(_line(start, floor, start, floor + 7, "axis"))
        if room > 24:
            parts.append(
                _text(start + room / 2, floor + 18, shortened(stage, max(int(room / 7), 3)), "middle", "small")
            )
        position += number
    parts.append(_line(left, floor, width - 12, floor, "axis"))
    return svg(width, floor + 26, "Error of the outputs of each layer", parts)


def _width(label: str) -> float:
    """Return about how wide a label is."""
    return sum(12.5 if unicodedata.east_asian_width(letter) in "WF" else 6.7 for letter in label)


def _place(
    x: float, y: float, width: float, taken: Sequence[tuple[float, ...]], room: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Return a box for a label beside a dot that covers no other box, as near to the dot as possible."""
    left, top, right, bottom = room
    first = None
    for away in range(0, 160, 14):
        places = [(start, y + way * away) for start in (x + 9, x - 9 - width) for way in (1, -1)]
        for start, middle in (*places, (x - width / 2, y - 16 - away), (x - width / 2, y + 17 + away)):
            start = min(max(start, left + 2), right - width - 2)
            box = start, middle - 8, start + width, middle + 7
            first = first or box
            if box[1] >= top and box[3] <= bottom and not any(_cover(box, other) for other in taken):
                return box
    return first or (x, y, x, y)


def _cover(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from ``low`` to ``high``, ``about`` so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten whose logarithms lie between ``low`` and ``high``."""
    return [value for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)
            if low <= math.log10(value := factor * 10.0**power) <= high]  # fmt: skip


def _short(number: int) -> str:
    """Return a number of images in at most four characters or so."""
    if number < 1000:
        return str(number)
    return f"{number / 1000:.1f}k" if number < 10_000 else f"{number / 1000:.0f}k"


def _line(x: float, y: float, to_x: float, to_y: float, style: str) -> str:
    return f'<line class="{style}" x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"/>'


def _box(x: float, y: float, width: float, height: float, style: str, said: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{style}" {place}><title>{escape(said)}</title></rect>'


def _dot(x: float, y: float, style: str, said: str = "", radius: float = 4) -> str:
    inside = f"><title>{escape(said)}</title></circle>" if said else "/>"
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"{inside}'


def _text(x: float, y: float, said: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'
