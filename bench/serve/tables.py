"""The results of ``fastres bench serve`` as tables and as a drawing."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastres.text import text_table

from .servers import DESCRIPTIONS, FASTRES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = tuple[str, ...]
End = tuple[float, float, str, str]  # of a curve: x, y, its name and colour
LINE_PT = 10.0  # height of a line of text
COLOURS = {"fastres": "#d1495b", "plain": "#5f6c7b", "litserve": "#2a9d8f"}
MARKERS = {"fastres": "o", "plain": "s", "litserve": "^"}


def text(found: Mapping[str, Any]) -> str:
    """Return the results as tables."""
    servers, offline = found["servers"], found["offline_images_per_s"]
    lone = "one at a time: p50"
    first: list[Row] = [("server", "capacity", "of classify", lone, "p99", "beside decoding and model: p50", "p99")]
    second: list[Row] = [
        ("server", "load", "offered", "answered", "p50", "p95", "p99", "429", "other", "batch", "memory from, to")
    ]
    for name, server in servers.items():
        first.append(_capacity(name, server, offline))
        second += [_level(name, level) for level in server["loads"]]
    levels = [(name, level) for name, server in servers.items()
              for level in (server["one_at_a_time"], server["saturated"], *server["loads"])]  # fmt: skip
    requests, silent, wrong = (sum(level[each] for _, level in levels) for each in ("requests", "no_answer", "wrong"))
    parts = [text_table(first, right=range(1, 7))]
    if offline:
        parts.append(f"fastres classify, the same images from a folder: {offline:g} images/s")
    parts += [
        text_table(second, right=range(2, 11)),
        f"{requests:,} requests, {silent:,} without an answer, {wrong:,} answers with another best class than the "
        "first answer of that server for the same photograph",
    ]
    same = ", ".join(f"{name} {share:.1%}" for name, share in found["same_best_class"].items())
    if same:
        parts.append(f"Photographs with the same best class as with fastres: {same}")
    parts += [f"Doubtful: {name}, {level['load']}: {doubt}" for name, level in levels for doubt in level["doubts"]]
    return "\n\n".join(parts)


def _capacity(name: str, server: Mapping[str, Any], offline: float | None) -> Row:
    one, capacity = server["one_at_a_time"], server["capacity_images_per_s"]
    beside = (one["server_ms"] or {}).get("beside") or {}
    return (
        DESCRIPTIONS.get(name, name),
        f"{capacity:g}/s",
        f"{capacity / offline:.0%}" if offline else "",
        *(_ms(one["latency_ms"][each]) for each in ("p50", "p99")),
        *(_ms(beside.get(each)) for each in ("p50", "p99")),
    )


def _level(name: str, level: Mapping[str, Any]) -> Row:
    memory = level["memory_mb"]
    other = {status: count for status, count in level["statuses"].items() if status not in ("200", "429")}
    return (
        name,
        level["load"],
        f"{level['offered_per_s']:g}/s",
        f"{level['images_per_s']:g}/s",
        *(_ms(level["latency_ms"][each]) for each in ("p50", "p95", "p99")),
        f"{level['statuses'].get('429', 0):,}",
        ", ".join(f"{count:,} {status}" for status, count in other.items()) or "0",
        f"{level['batches']['mean_batch']:g}" if level["batches"] else "",
        f"{memory['first']:g}, {memory['last']:g} MB" if memory else "",
    )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:g} ms"


def drawing(found: Mapping[str, Any], kind: str) -> bytes:
    """Return the latency and the throughput of each server over the offered load, as ``"png"`` or ``"svg"``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ends: dict[Axes, list[End]] = {left: [], right: []}
    for name, server in found["servers"].items():
        levels = sorted(server["loads"], key=lambda level: level["offered_per_s"])
        levels = [level for level in levels if level["latency_ms"]["p50"] is not None]
        if not levels:
            continue
        offered = [level["offered_per_s"] for level in levels]
        colour = COLOURS.get(name, "#333333")
        style: dict[str, Any] = {"color": colour, "marker": MARKERS.get(name, "o"), "markersize": 5}
        for each, line in (("p50", "-"), ("p99", "--")):
            values = [level["latency_ms"][each] for level in levels]
            left.plot(offered, values, line, **style)
            ends[left].append((offered[-1], values[-1], f"{name} {each}", colour))
        values = [level["images_per_s"] for level in levels]
        right.plot(offered, values, "-", **style)
        ends[right].append((offered[-1], values[-1], name, colour))
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:,g}")
    left.set_title("Latency, from the time at which a request was due", loc="left", fontsize=10)
    left.set_ylabel("ms")
    right.set_title("Answers with status 200", loc="left", fontsize=10)
    right.set_ylabel("images/s")
    offline = found["offline_images_per_s"]
    if offline:
        right.axhline(offline, color="#999999", linewidth=1, linestyle=":")
        right.annotate(
            "fastres classify", (0, offline), (4, 3), textcoords="offset points", color="#666666", fontsize=8
        )
    for axis in (left, right):
        axis.set_xlabel("offered requests/s (Poisson)")
        axis.set_xlim(0, None)
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    right.set_ylim(0, None)
    for axis, found_ends in ends.items():
        _label(axis, found_ends)
    figure.suptitle(f"{found['model']} on {found['environment']['cpu']}", fontsize=11, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def _label(axis: Axes, ends: Sequence[End]) -> None:
    """Write the name of each curve beside its end, from the lowest up, at least a line above the one below it."""
    to_points = 72 / axis.figure.dpi
    below = -math.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        height = float(axis.transData.transform((x, y))[1]) * to_points
        raised = max(0.0, below + LINE_PT - height)
        below = height + raised
        axis.annotate(name, (x, y), (6, raised), textcoords="offset points", va="center", color=colour, fontsize=8)


def names(servers: Sequence[str]) -> str:
    """Return which servers are compared, for the help."""
    return ", ".join(f"{name} ({DESCRIPTIONS[name]})" for name in servers if name != FASTRES)
