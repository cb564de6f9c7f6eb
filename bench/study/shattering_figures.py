"""The figures of ``shattering.py``, drawn from its data."""

from __future__ import annotations

from .common import Data, Picture, seeds_text, title
from .figures import BROWN_NOISE, INK, MUTED, PLAIN, RESIDUAL, WHITE_NOISE, new_figure, note

SEEN = 3e-3  # smaller correlations are not drawn, because they are close to the noise of the average


def net_of(data: Data, name: str) -> Data:
    """Return the measurements of one network."""
    return next(row for row in data["nets"] if row["net"] == name)


def draw(data: Data) -> list[Picture]:
    return [_draw_gradients(data), _draw_decay(data)]


def _draw_gradients(data: Data) -> Picture:
    """Draw figure 1 of the paper: sample gradients above, their correlation matrices below."""
    columns = len(data["shown"]) + 1
    figure, axes = new_figure(2, columns, width=15, height=6)
    x = data["grid"]
    for column, (name, layers) in enumerate(data["shown"]):
        row = net_of(data, name)
        colour = PLAIN[1] if name == "plain" else RESIDUAL[1]
        axes[0][column].plot(x, row["samples"][str(layers)], color=colour, linewidth=1.1)
        axes[0][column].set_title(f"{name}, {layers} layer{'s' if layers > 1 else ''}")
        image = axes[1][column].imshow(
            row["matrices"][str(layers)], cmap="RdBu_r", vmin=-1, vmax=1, extent=(-2, 2, 2, -2), interpolation="nearest"
        )
    for noise, colour in zip(data["noises"], (BROWN_NOISE, WHITE_NOISE), strict=True):
        offset = 0 if noise["net"] == "brown noise" else 7
        axes[0][-1].plot(x, [value + offset for value in noise["sample"]], color=colour, linewidth=1.1)
        note(axes[0][-1], -2, offset + 3.6, noise["net"], colour)
    axes[0][-1].set_title("for comparison")
    axes[0][-1].set(yticks=[], ylim=(-4.5, 11.5))
    axes[1][-1].axis("off")
    figure.colorbar(image, ax=axes[1][-1], location="left", label="correlation of gradients", shrink=0.8)
    for axis in axes[0]:
        axis.set_xlabel("input x")
    for axis in axes[1][:-1]:
        axis.set_xlabel("input x")
        axis.grid(False)
    axes[0][0].set_ylabel("gradient df/dx,\nunit variance")
    axes[1][0].set_ylabel("input x′")
    caption = (
        "Top: the gradient of one network as a function of its input. Bottom: the correlation of gradients at x and "
        f"x′ over {data['networks']} initialisations. All networks have BN."
    )
    return Picture("shattering-gradients.png", figure, caption)


def _draw_decay(data: Data) -> Picture:
    figure, axes = new_figure(1, 3, width=15, height=4.6)
    curves, decays, own = axes[0]
    x = [value - data["grid"][0] for value in data["grid"]]
    for name, layers, colour in (
        ("plain", 1, PLAIN[0]),
        ("plain", 4, PLAIN[1]),
        ("plain", 24, PLAIN[2]),
        ("residual, β = 0.1", 50, RESIDUAL[1]),
        ("residual, β = 1", 50, RESIDUAL[2]),
    ):
        values = net_of(data, name)["autocorrelations"][str(layers)]
        curves.plot(x, values, color=colour, linewidth=2, label=f"{name}, {layers} layer{'s' if layers > 1 else ''}")
    for noise, style in zip(data["noises"], ("--", ":"), strict=True):
        curves.plot(x, noise["autocorrelation"], color=INK, linestyle=style, linewidth=1.2, label=noise["net"])
    curves.set(xlim=(0, 2), title="Autocorrelation", xlabel="distance in x", ylabel="autocorrelation of df/dx")
    curves.legend(fontsize=9)
    for name, colour, place in (
        ("plain", PLAIN[1], 8),
        ("residual, β = 1", RESIDUAL[2], 30),
        ("residual, β = 0.1", RESIDUAL[1], 30),
    ):
        row = net_of(data, name)
        seen = [layer for layer, value in enumerate(row["correlations"], start=1) if value > SEEN]
        decays.plot(seen, [row["correlations"][layer - 1] for layer in seen], color=colour, linewidth=2.4)
        decays.plot(range(1, len(row["paper"]) + 1), row["paper"], color=INK, linestyle=":", linewidth=1.3)
        if name == "residual, β = 1":
            decays.plot(range(1, len(row["paper"]) + 1), row["centred"], color=INK, linestyle="--", linewidth=1)
        height = row["correlations"][min(place, len(seen)) - 1]
        note(decays, place + 1, height * (1.5 if name == "plain" else 0.7), name, colour, va="top", ha="left")
    decays.set(yscale="log", ylim=(SEEN, 0.7), title="Decay with depth, independent inputs", xlabel="layers L")
    decays.set_ylabel("correlation of gradients")
    steps = [shift / (data["line_points"] - 1) for shift in data["line_shifts"]]
    shades = {"plain": iter((PLAIN[0], PLAIN[2])), "resnet": iter((RESIDUAL[0], RESIDUAL[2]))}
    for row in data["own"]:
        kind = row["model"].rstrip("0123456789")
        colour = next(shades[kind])
        own.plot(steps, row["cosines"], color=colour, linewidth=2, marker="o", markersize=4, label=title(row["model"]))
    own.axhline(0, color=MUTED, linewidth=0.8)
    own.set(xscale="log", title="CIFAR networks, between two images", xlabel="part of the way from image to image")
    own.minorticks_off()
    own.set_xticks(steps, [f"{shift}/{data['line_points'] - 1}" for shift in data["line_shifts"]])
    own.set_ylabel("cosine of input gradients")
    own.legend()
    caption = (
        f"Left and middle: {data['networks']} initialisations. Dotted lines in the middle: the paper's theorems; "
        f"dashed: with BN's variance about the mean. Right: this project's untrained networks, {data['lines']} "
        f"line{'s' if data['lines'] > 1 else ''} between images of {data['dataset'].split(',')[0]}, "
        f"{seeds_text(data['seeds'])}."
    )
    return Picture("shattering-decay.png", figure, caption)
