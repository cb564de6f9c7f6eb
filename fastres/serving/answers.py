"""The answers of a server, as JSON; the classes describe them in its OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from .engine import Result
from .models import best_classes


class Identity(BaseModel):
    """Which model has answered."""

    name: str
    weights: str | None
    sha256: str = Field(description="of the names and values of all tensors")
    dtype: str
    device: str
    fastres: str


class Prediction(BaseModel):
    label: str
    index: int
    score: float = Field(description="softmax probability")


class Milliseconds(BaseModel):
    decode: float
    queue: float = Field(description="from the decoded image to its batch")
    model: float = Field(description="for the whole batch")
    batch: int = Field(description="images in the batch")


class Error(BaseModel):
    type: str
    message: str


class Refused(BaseModel):
    error: Error


class Classified(BaseModel):
    """The answer for one image in the body of a request."""

    model: Identity
    predictions: list[Prediction]
    milliseconds: Milliseconds


class ClassifiedImage(BaseModel):
    name: str | None
    predictions: list[Prediction] | None = None
    milliseconds: Milliseconds | None = None
    error: Error | None = None


class ClassifiedImages(BaseModel):
    """The answer for a form or for URLs: each image has predictions or an error."""

    model: Identity
    images: list[ClassifiedImage]


class Embedded(BaseModel):
    """The answer for one image in the body of a request."""

    model: Identity
    embedding: list[float]
    milliseconds: Milliseconds


class EmbeddedImage(BaseModel):
    name: str | None
    embedding: list[float] | None = None
    milliseconds: Milliseconds | None = None
    error: Error | None = None


class EmbeddedImages(BaseModel):
    """The answer for a form or for URLs: each image has an embedding or an error."""

    model: Identity
    images: list[EmbeddedImage]


class Mapped(Prediction):
    map: list[list[float]] = Field(description="class-activation map [h][w]; its mean plus the bias is the logit")


class Looked(BaseModel):
    """The answer of /look. Cell i of a map is centred on pixel ``stride`` · i of the crop."""

    model: Identity
    predictions: list[Mapped]
    width: int = Field(description="of the upright image")
    height: int
    box: tuple[float, float, float, float] = Field(description="left, top, right, bottom of what the model saw")
    crop: int = Field(description="sides of what the model saw, in its own pixels")
    stride: int
    milliseconds: Milliseconds


def classified(result: Result, labels: Sequence[str], top_k: int) -> dict[str, Any]:
    """Return the best classes of an image and the times."""
    return {"predictions": _predictions(result, labels, top_k), "milliseconds": _milliseconds(result)}


def embedded(result: Result) -> dict[str, Any]:
    """Return the embedding of an image and the times."""
    return {"embedding": result.embedding.tolist(), "milliseconds": _milliseconds(result)}


def looked(result: Result, labels: Sequence[str], transforms: Any, stride: int) -> dict[str, Any]:
    """Return the best classes of an image with their maps, and where in the image they lie."""
    maps, decoded = result.computed.extra or [], result.decoded
    predictions = _predictions(result, labels, len(maps))
    return {
        "predictions": [{**found, "map": each} for found, each in zip(predictions, maps, strict=True)],
        "width": decoded.width,
        "height": decoded.height,
        "box": list(transforms.crop_box(decoded.height, decoded.width)),
        "crop": transforms.crop,
        "stride": stride,
        "milliseconds": _milliseconds(result),
    }


def _predictions(result: Result, labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    return [
        {"label": labels[index], "index": index, "score": float(result.scores[index])}
        for index in best_classes(result.scores, top_k)
    ]


def _milliseconds(result: Result) -> dict[str, Any]:
    return {**result.milliseconds, "batch": result.computed.batch}
