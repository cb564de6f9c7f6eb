"""PNG charts of a run, made only from :class:`fastres.bench.report.results.Results`."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .results import OK, LayerRow, Results, Row
from .standing import FASTRES, Key, compared, groups, roofline_speed
from .words import device_name, milliseconds, speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels side by side
DPI = 130
FAR = 2.5  # a roofline above this many times the fastest speed gets a label but no line
MANY_STEPS = 70  # with this many steps or more, the axis shows stages instead of step names
FASTRES_COLOUR, PEER_COLOUR, ROOFLINE_COLOUR = "#d1495b", "#8fa3b5", "#222222"
BOUND_COLOURS = {"memory": "#3b7ea1", "compute": "#e0a030"}
ENGINE_COLOURS = {
    FASTRES: FASTRES_COLOUR,
    "eager": "#9aa5b1",
    "eager_channels_last": "#5f6c7b",
    "folded_channels_last": "#b08968",
    "eager_cudagraph": "#7b5ea7",
    "folded_cudagraph": "#a78bd0",
    "compile": "#2a9d8f",
    "compile_max_autotune": "#1d6f66",
    "torch_tensorrt": "#76b900",
    "onnxruntime": "#e9a23b",
    "onnxruntime_tensorrt": "#a66a00",
    "openvino": "#3a86c8",
    "jax": "#4c5fd7",
}

Setting = tuple[str, int, str, int]  # model, size, dtype, batch


def throughput(results: Results) -> bytes | None:
    """Draw the images per second of each engine as bars and the roofline as a line, with a panel for each setting.

    If a model has more than three batches, draw the smallest, the middle and the largest. Whiskers show the 20th to
    80th percentiles. Return ``None`` if there is nothing to compare.
    """
    panels = [
        (f"{model}, {dtype}, {size}×{size}, batch {rows[0].batch}", [row for row in rows if row.status == OK])
        for (model, size, dtype), batches in groups(results.rows)
        for rows in _ends_and_middle([rows for rows in batches if compared(rows)])
    ]
    if not panels:
        return None
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    bars = max(len(rows) for _, rows in panels)
    figure = _figure(results, "Images per second", 5.2 * columns + 0.6, (0.42 * bars + 1.3) * lines + 0.6)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.axis("off")
        else:
            _draw_bars(axis, *panel)
    return _png(figure)


def by_batch(results: Results) -> bytes | None:
    """Draw images per second and the share of the roofline over the batch size.

    Each engine has a line and each model a column. Return ``None`` if no model was compared at two or more batches.
    """
    panels: list[tuple[Key, list[list[Row]]]] = []
    for key, batches in groups(results.rows):
        kept = sorted((rows for rows in batches if compared(rows)), key=lambda rows: rows[0].batch)
        if len(kept) > 1:
            panels.append((key, kept))
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    title = "Images per second and share of the roofline"
    figure = _figure(results, title, 5.4 * columns + 0.6, 6.4 * lines + 1)
    rows_of_axes = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[1.25, 1] * lines)
    handles: dict[str, Any] = {}
    for place in range(lines * columns):
        line, column = divmod(place, columns)
        upper, lower = rows_of_axes[2 * line][column], rows_of_axes[2 * line + 1][column]
        if place < len(panels):
            handles |= _draw_lines(upper, lower, *panels[place])
        else:
            upper.axis("off")
            lower.axis("off")
    order = sorted(handles, key=lambda name: (name != FASTRES, name == "roofline"))
    figure.legend(
        [handles[name] for name in order],
        [name.replace("_", " ") for name in order],
        loc="outside lower center",
        ncols=min(2 * columns, len(order)),
        fontsize=9.5,
        frameon=False,
    )
    return _png(figure)


def layers(results: Results) -> bytes | None:
    """Draw the time and the roofline of each step of fastres, for each model's smallest and largest batch.

    Return ``None`` if no step was timed.
    """
    panels = []
    for batches in _layers_by_model(results.layers).values():
        least, most = min(batches), max(batches)
        panels += [batches[batch] for batch in dict.fromkeys((least, most))]
    if not panels:
        return None
    height = sum(_panel_height(rows) for rows in panels)
    figure = _figure(results, "Time and roofline of each step", 14, height + 0.9)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[_panel_height(rows) for rows in panels])
    for axis, rows in zip(axes.ravel(), panels, strict=True):
        _draw_steps(axis, rows)
    return _png(figure)


def layer_settings(rows: Sequence[LayerRow]) -> dict[Setting, list[LayerRow]]:
    """Group the steps by setting, in order."""
    found: dict[Setting, list[LayerRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.size, row.dtype, row.batch), []).append(row)
    return found


def _layers_by_model(rows: Sequence[LayerRow]) -> dict[Key, dict[int, list[LayerRow]]]:
    found: dict[Key, dict[int, list[LayerRow]]] = {}
    for (model, size, dtype, batch), members in layer_settings(rows).items():
        found.setdefault((model, size, dtype), {})[batch] = members
    return found


def _ends_and_middle(batches: list[list[Row]]) -> list[list[Row]]:
    if len(batches) <= 3:
        return batches
    ordered = sorted(batches, key=lambda rows: rows[0].batch)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _figure(results: Results, title: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    where = results.environment
    versions = f"{device_name(where)}, fastres {where['fastres']}, torch {where['torch']}"
    size = min(14.0, 1.7 * width)  # font size: a narrow figure has small panels
    figure.suptitle(f"{title}\n{textwrap.fill(versions, int(120 * width / size))}", fontsize=size)
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()


def _draw_bars(axis: Axes, title: str, rows: list[Row]) -> None:
    """Draw horizontal bars, the fastest on top, each labelled with its speed and its ratio to eager."""
    from matplotlib.ticker import MaxNLocator

    rows = sorted(rows, key=lambda row: row.images_per_s or 0.0)
    speeds = [row.images_per_s or 0.0 for row in rows]
    slow, fast = (
        [1e3 * row.batch / (ms or 1.0) for row, ms in zip(rows, times, strict=True)]
        for times in ([row.p80_ms for row in rows], [row.p20_ms for row in rows])
    )
    whiskers = (
        [max(0.0, value - low) for value, low in zip(speeds, slow, strict=True)],
        [max(0.0, high - value) for value, high in zip(speeds, fast, strict=True)],
    )
    colours = [FASTRES_COLOUR if row.engine == FASTRES else PEER_COLOUR for row in rows]
    axis.barh([row.engine for row in rows], speeds, height=0.7, color=colours)
    axis.errorbar(speeds, range(len(rows)), xerr=whiskers, fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
    bound = roofline_speed(rows) or 0.0
    drawn = bound <= FAR * max(fast)  # a line farther out would squeeze the bars
    right = max([bound if drawn else 0.0, *fast])
    for place, (row, value, high) in enumerate(zip(rows, speeds, fast, strict=True)):
        ratio = "" if row.ratio_to_eager is None else f"  {row.ratio_to_eager:.2f}×"
        axis.text(
            max(value, high) + 0.015 * right,
            place,
            f"{speed(value)}{ratio}",
            va="center",
            fontsize=9,
            fontweight="bold" if row.engine == FASTRES else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            zorder=3,
        )
    limit = max(right * 1.06, max(fast) * 1.32)
    if bound:
        words, x, side = ("", bound, "center") if drawn else (" →", limit, "right")
        axis.text(
            x, len(rows) - 0.42, f"roofline {speed(bound)}{words}", ha=side, va="bottom", fontsize=8.5, clip_on=False
        )
    if bound and drawn:
        axis.axvline(bound, color=ROOFLINE_COLOUR, linestyle="--", linewidth=1.2)
    axis.set_xlim(0, limit)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(_plain)
    axis.set_ylim(-0.5, len(rows) - 0.45)
    axis.set_title(title, fontsize=10, pad=16)
    axis.set_xlabel("images/s (× eager in the same dtype)", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_lines(upper: Axes, lower: Axes, key: Key, batches: list[list[Row]]) -> dict[str, Any]:
    """Draw the speed above and the share of the roofline below. Return one line per engine for the legend."""
    model, size, dtype = key
    places = {rows[0].batch: place for place, rows in enumerate(batches)}  # evenly spaced for any batch sizes
    by_engine: dict[str, list[Row]] = {}
    for row in itertools.chain.from_iterable(batches):
        if row.status == OK:
            by_engine.setdefault(row.engine, []).append(row)
    handles: dict[str, Any] = {}
    for engine, rows in by_engine.items():
        own = engine == FASTRES
        style: dict[str, Any] = {
            "color": ENGINE_COLOURS.get(engine, PEER_COLOUR),
            "linewidth": 2.6 if own else 1.4,
            "marker": "o",
            "markersize": 5.5 if own else 3.5,
            "zorder": 4 if own else 2,
        }
        x = [places[row.batch] for row in rows]
        (handles[engine],) = upper.plot(x, [row.images_per_s or 0.0 for row in rows], **style)
        lower.plot(x, [100 * (row.roofline_share or 0.0) for row in rows], **style)
    known = [(places[rows[0].batch], bound) for rows in batches if (bound := roofline_speed(rows))]
    if known:
        line = {"color": ROOFLINE_COLOUR, "linestyle": "--", "linewidth": 1.2}
        (handles["roofline"],) = upper.plot([x for x, _ in known], [y for _, y in known], **line)  # type: ignore[arg-type]
        lower.axhline(100, color=ROOFLINE_COLOUR, linestyle="--", linewidth=1.2)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter(_plain)
    upper.yaxis.set_minor_formatter(_plain_minor)
    upper.set_title(f"{model}, {dtype}, {size}×{size}", fontsize=10.5)
    upper.set_ylabel("images/s", fontsize=9)
    lower.set_ylabel("% of the roofline", fontsize=9)
    lower.set_xlabel("batch", fontsize=9)
    lower.set_ylim(bottom=0)
    for axis in (upper, lower):
        axis.set_xticks(list(places.values()), [str(batch) for batch in places])
        axis.margins(x=0.06)
        axis.grid(True, which="major", axis="y", color="#e4e4e4", linewidth=0.8)
        axis.tick_params(labelsize=8.5, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    return handles


def _plain(value: float, position: Any = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _plain_minor(value: float, position: Any = None) -> str:
    """Label the minor ticks at 2 and 5 only."""
    return _plain(value) if f"{value:e}"[0] in "25" else ""


def _panel_height(rows: list[LayerRow]) -> float:
    return 3.6 if len(rows) < MANY_STEPS else 3.0


def _draw_steps(axis: Axes, rows: list[LayerRow]) -> None:
    """Draw a bar per step in execution order. The dark base is the roofline; the colour shows the limiting ceiling."""
    from matplotlib.patches import Patch

    times = [row.us or 0.0 for row in rows]
    least = [row.roofline_us or 0.0 for row in rows]
    width = 0.82
    axis.bar(range(len(rows)), times, width, color=[BOUND_COLOURS.get(row.bound, PEER_COLOUR) for row in rows])
    axis.bar(range(len(rows)), least, width, color="black", alpha=0.38)
    axis.hlines(least, *_edges(len(rows), width), color=ROOFLINE_COLOUR, linewidth=1.3)
    first = rows[0]
    share = f" ({sum(least) / sum(times):.0%} of it)" if sum(times) else ""
    axis.set_title(
        f"{first.model}, {first.dtype}, {first.size}×{first.size}, batch {first.batch}: "
        f"{_duration(sum(times))} in {len(rows)} steps, roofline {_duration(sum(least))}{share}",
        fontsize=10.5,
        loc="left",
    )
    axis.set_ylabel("µs", fontsize=9)
    axis.yaxis.set_major_formatter(_plain)
    axis.set_xlim(-0.8, len(rows) - 0.2)
    if len(rows) < MANY_STEPS:
        axis.set_xticks(range(len(rows)), [row.step for row in rows], rotation=90, fontsize=7)
    else:
        stages = [row.step.split(".")[0] for row in rows]
        starts = [index for index, stage in enumerate(stages) if index == 0 or stages[index - 1] != stage]
        apart = [a for a, b in itertools.pairwise([*starts, len(rows) * 2]) if b - a > len(rows) / 25]  # no overlap
        axis.set_xticks(apart, [stages[index] for index in apart], fontsize=8, ha="left")
    axis.tick_params(axis="y", labelsize=8.5)
    axis.grid(True, axis="y", color="#e8e8e8", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    key: list[Any] = [Patch(color=colour, label=f"bound by {name}") for name, colour in BOUND_COLOURS.items()]
    key.append(Patch(color="#555555", label="roofline: the shortest possible time"))
    axis.legend(handles=key, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)


def _edges(count: int, width: float) -> tuple[list[float], list[float]]:
    return [x - width / 2 for x in range(count)], [x + width / 2 for x in range(count)]


def _duration(us: float) -> str:
    return f"{milliseconds(us / 1e3)} ms" if us >= 1000 else f"{us:,.0f} µs"


CHARTS: dict[str, Callable[[Results], bytes | None]] = {
    "throughput.png": throughput,
    "throughput_by_batch.png": by_batch,
    "layers.png": layers,
}
