"""Draw what a network sees in a photograph: first filters, feature maps and class-activation maps.

Each function returns a matplotlib figure that is not registered with pyplot. ``figure.savefig(path)`` writes it, and a
notebook shows it. Images can be anything that ``model.predict`` accepts. The functions raise
``MissingDependencyError`` without matplotlib, ``ImageError`` for an image that cannot be read, and ``ClassifierError``
if they need classes and the model has no classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastres.arguments import whole_number
from fastres.images.transforms import ImageSource, load_image
from fastres.model.model import Model
from fastres.model.predict import require_classifier, top_predictions
from fastres.model.predictions import Prediction
from fastres.text import path_text

from .cam import at_pixels, class_activation_maps
from .pictures import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray


WIDTH = 16.0  # inches; 1600 pixels at DPI
DPI = 100
COLOURS = "inferno"  # perceptually uniform; the lowest value is black
CHANNELS = 9  # channels drawn for each stage
LARGEST_SIDE = 1024  # most pixels per side of a drawn photograph
TILE = 56  # fewest pixels per side of a tile in a mosaic
ACCENT = "#d1495b"


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image, and the network's input made from it (``x``, uint8 ``[1, 3, crop, crop]``).

    ``box`` is left, top, right, bottom of the crop in the photograph's own pixels.
    """

    image: Image.Image
    x: Tensor
    box: tuple[float, float, float, float]
    name: str

    @classmethod
    def of(cls, model: Model, source: ImageSource) -> Photograph:
        image = load_image(source)
        x = model.transforms.pixels(source if isinstance(source, Tensor) else image)[None].to(model.device)
        name = path_text(Path(source).name) if isinstance(source, (str, Path)) else "image"
        return cls(image, x, model.transforms.crop_box(image.height, image.width), name)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """The crop's box in matplotlib's order: left, right, bottom, top."""
        left, top, right, bottom = self.box
        return left, right, bottom, top


def filters_figure(model: Model) -> Figure:
    """Draw the filters of the first convolution in colour, one tile each, scaled to their largest weight.

    Grey is zero.
    """
    figure = _figure(6.0, 6.4)
    _draw_filters(figure.subplots(), model)
    return figure


def features_figure(model: Model, image: ImageSource, channels: int = CHANNELS) -> Figure:
    """Draw feature maps of the stem and of each stage: the ``channels`` maps that vary most over the image."""
    channels = whole_number(channels, "channels")
    photograph = Photograph.of(model, image)
    stages = len(model.outline.features)
    figure = _figure(WIDTH, WIDTH / stages + 0.7)
    _draw_features(figure, model, photograph, channels)
    return figure


def cam_figure(model: Model, image: ImageSource, top_k: int = 3) -> Figure:
    """Draw class-activation maps of the ``top_k`` most probable classes over the photograph, on one scale."""
    top_k = whole_number(top_k, "top_k")
    require_classifier(model, "cam_figure")
    photograph = Photograph.of(model, image)
    (predictions,) = top_predictions(model(photograph.x), top_k, model.categories)
    figure = _figure(WIDTH, _cam_height(photograph, len(predictions)))
    _draw_cams(figure, model, photograph, predictions)
    return figure


def look(model: Model, image: ImageSource, top_k: int = 3) -> Figure:
    """Draw one picture with the photograph, its classes, first filters, feature maps and class-activation maps."""
    top_k = whole_number(top_k, "top_k")
    require_classifier(model, "look")
    photograph = Photograph.of(model, image)
    (predictions,) = top_predictions(model(photograph.x), max(top_k, 5), model.categories)
    shown = predictions[:top_k]
    heights = [4.6, WIDTH / len(model.outline.features) + 0.5, _cam_height(photograph, len(shown))]
    figure = _figure(WIDTH, sum(heights) + 0.5)
    name = model.architecture.name
    weights = model.weights.removeprefix(f"{name} ").rpartition("/")[2]
    size = f"{photograph.image.width}×{photograph.image.height}"
    figure.suptitle(f"{name}  ·  {weights}  ·  {photograph.name}, {size}", fontsize=15, weight="bold", parse_math=False)
    bands: Any = figure.subfigures(3, 1, height_ratios=heights, hspace=0.02)
    top, middle, bottom = bands
    aspect = min(max(photograph.image.width / photograph.image.height, 0.7), 1.9)
    axes = top.subplots(1, 3, width_ratios=[3.6 * aspect, 4.2, 3.9])
    _draw_photograph(axes[0], photograph)
    _draw_scores(axes[1], predictions)
    _draw_filters(axes[2], model)
    _draw_features(middle, model, photograph, CHANNELS)
    _draw_cams(bottom, model, photograph, shown)
    return figure


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.01, hspace=0.01)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def _draw_photograph(axis: Axes, photograph: Photograph) -> None:
    from matplotlib.patches import Rectangle

    _show_photograph(axis, photograph)
    left, top, right, bottom = photograph.box
    for width, colour in ((4.0, "black"), (2.0, "white")):
        corner, size = (left, top), (right - left, bottom - top)
        axis.add_patch(Rectangle(corner, *size, fill=False, linewidth=width, edgecolor=colour, clip_on=False))
    _title(
        axis, "photograph", f"the network sees the square, as {photograph.x.shape[3]}×{photograph.x.shape[2]} pixels"
    )


def _show_photograph(axis: Axes, photograph: Photograph) -> None:
    """Draw the whole photograph, with its own pixels as coordinates even if it is drawn smaller."""
    image = photograph.image.copy()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    width, height = photograph.image.size
    axis.imshow(np.asarray(image), extent=(0, width, height, 0))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")


def _draw_scores(axis: Axes, predictions: Sequence[Prediction]) -> None:
    """Draw the probabilities of the classes as bars, one below the other."""
    scores = [prediction.score for prediction in predictions]
    places = range(len(predictions))
    axis.barh(places, scores, height=0.34, color=[ACCENT, *["#8d99ae"] * (len(scores) - 1)])
    for place, prediction in zip(places, predictions, strict=True):
        axis.text(0, place - 0.24, prediction.label[:40], fontsize=11, va="bottom", parse_math=False)
        axis.text(1.0, place - 0.24, f"{prediction.score:.1%}", fontsize=11, va="bottom", ha="right")
    axis.barh(places, 1.0, height=0.34, color="#8d99ae", alpha=0.15)
    axis.set(xlim=(0, 1), ylim=(len(scores) - 0.6, -0.75))
    axis.axis("off")
    _title(axis, "classes", "softmax probability")


def _draw_filters(axis: Axes, model: Model) -> None:
    weight = next(value for value in model.state_dict().values() if value.ndim == 4).cpu().float()  # [K, 3, R, S]
    scaled = 0.5 + weight / (2 * weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12))
    count, _, rows, columns = weight.shape
    axis.imshow(mosaic(scaled.permute(0, 2, 3, 1).numpy()), interpolation="nearest")
    axis.axis("off")
    _title(axis, "first filters", f"{count} of {rows}×{columns} pixels, grey is zero")


def _draw_features(figure: Figure | SubFigure, model: Model, photograph: Photograph, channels: int) -> None:
    features = model.features(photograph.x)
    axes = figure.subplots(1, len(features), squeeze=False)[0]
    for axis, (name, value) in zip(axes, features.items(), strict=True):
        maps = value[0].float().cpu()
        chosen = maps.flatten(1).std(1, correction=0).topk(min(channels, len(maps))).indices
        tiles = maps[chosen]
        low, high = tiles.amin((1, 2), keepdim=True), tiles.amax((1, 2), keepdim=True)
        axis.imshow(_coloured(mosaic(((tiles - low) / (high - low).clamp_min(1e-12)).numpy())), interpolation="nearest")
        axis.axis("off")
        count, height, width = maps.shape
        _title(axis, f"{name} features", f"{len(chosen)} of {count} channels, {height}×{width}")


def _draw_cams(
    figure: Figure | SubFigure, model: Model, photograph: Photograph, predictions: Sequence[Prediction]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    maps = class_activation_maps(model, photograph.x, [prediction.index for prediction in predictions])
    crop = photograph.x.shape[-1]
    heat = at_pixels(maps, _last_stride(model), (crop, crop))[0].cpu().numpy()  # [K, crop, crop]
    highest = float(heat.max())
    scale = Normalize(0.0 if highest > 0 else float(heat.min()), highest)
    _, bias = model.classifier
    axes = figure.subplots(1, len(predictions), squeeze=False)[0]
    for axis, values, prediction, cells in zip(axes, heat, predictions, maps[0], strict=True):
        _draw_overlay(axis, photograph, values, scale)
        logit = float(cells.mean() + bias[prediction.index])
        _title(axis, prediction.label[:48], f"class-activation map; {prediction.score:.1%}, logit {logit:.2f}")
    bar = figure.colorbar(ScalarMappable(scale, COLOURS), ax=list(axes), shrink=0.9, aspect=30, pad=0.01)
    bar.set_label("evidence (mean + bias = logit)", fontsize=10)
    bar.outline.set_visible(False)


def _draw_overlay(axis: Axes, photograph: Photograph, heat: NDArray[Any], scale: Any) -> None:
    """Draw the photograph in grey and the map over its crop; higher values are more opaque."""
    grey = Photograph(photograph.image.convert("L").convert("RGB"), photograph.x, photograph.box, photograph.name)
    _show_photograph(axis, grey)
    opacity = 0.35 + 0.4 * np.clip(np.asarray(scale(heat)), 0, 1)
    axis.imshow(heat, extent=photograph.extent, cmap=COLOURS, norm=scale, alpha=opacity, interpolation="bilinear")
    width, height = photograph.image.size
    axis.set(xlim=(0, width), ylim=(height, 0))


def _cam_height(photograph: Photograph, count: int) -> float:
    """Return the height in inches of ``count`` photographs side by side, with titles."""
    width = 0.9 * WIDTH / max(count, 2)
    return min(width * photograph.image.height / photograph.image.width, 6.0) + 0.6


def _last_stride(model: Model) -> int:
    """Return the distance in pixels from one cell of the last stage to the next."""
    from fastres.model.outputs import strides_and_channels

    plan = model.outline
    return strides_and_channels(plan, plan.features[f"layer{len(model.architecture.depths)}"])[0]


def mosaic(tiles: NDArray[Any], columns: int | None = None) -> NDArray[Any]:
    """Arrange tiles ``[K, h, w]`` or ``[K, h, w, 3]`` row by row in one picture, with gaps of NaN (white in RGB).

    Small tiles are enlarged by a whole factor, so that all gaps look alike.
    """
    count, height, width = tiles.shape[:3]
    factor = max(1, math.ceil(TILE / max(height, width)))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = tiles.shape[1:3]
    columns = columns or math.ceil(math.sqrt(count))
    gap = max(1, round(0.05 * width))
    rows = math.ceil(count / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *tiles.shape[3:])
    picture = np.full(shape, 1.0 if tiles.ndim == 4 else np.nan, dtype=np.float32)
    for index, tile in enumerate(tiles):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        picture[top : top + height, left : left + width] = tile
    return picture


def _coloured(values: NDArray[Any]) -> NDArray[Any]:
    """Map values in 0..1 to RGBA colours; NaN is transparent."""
    import matplotlib

    return np.asarray(matplotlib.colormaps[COLOURS].with_extremes(bad=(1, 1, 1, 0))(np.ma.masked_invalid(values)))


def _title(axis: Axes, words: str, detail: str) -> None:
    axis.set_title(f"{words}\n", fontsize=12, weight="bold", loc="left", parse_math=False)
    axis.annotate(
        detail, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color="#555555"
    )
