"""The public ``Model``: the interface of a torchvision ResNet on top of a folded network."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, overload

import torch
from torch import Tensor

from fastres.arguments import image_sides, is_whole, whole_number
from fastres.network.plan import LOGITS, POOLED
from fastres.roofline.ceilings import Ceilings
from fastres.text import dtype_name
from fastres.weights import saved

from .explain import Explanation
from .folded import COMPUTE_DTYPES, Folded, parse_dtype
from .outputs import returned_values
from .predict import predict, require_classifier
from .predictions import Predictions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from PIL import Image

    OneImage: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
    ManyImages: TypeAlias = list[Any] | tuple[Any, ...] | Iterator[Any]

__all__ = ["COMPUTE_DTYPES", "Model", "parse_dtype"]

WARMUP_CALLS = 2  # on a GPU the first call compiles and the second captures


# What other libraries call it, and what a Model has in its place.
_ELSEWHERE = {
    "forward_features": 'model.features(x)["layer4"] is the last feature map',
    "forward_intermediates": "model.features(x, layers) gives the feature maps",
    "forward_head": "model.embed(x) gives the pooled features, and model(x) the logits",
    "reset_classifier": "load the model again, with num_classes=N, or 0 for pooled features",
    "get_classifier": "model.classifier has its weight and bias",
    "num_features": "model.architecture.features is the number of pooled features",
    "default_cfg": "model.transforms has the preprocessing, and model.categories the class names",
    "pretrained_cfg": "model.transforms has the preprocessing, and model.categories the class names",
    "config": "model.architecture describes the network, and model.categories has the class names",
}


class Model(Folded):
    """A ResNet for inference. Create it with ``fastres.load`` or ``fastres.from_module``.

    Call it with ``x`` ``[N, 3, H, W]`` on the model's device. H and W may be any size from the minimum up, in any
    memory format. It returns float32 logits ``[N, num_classes]``. A model without a classifier (``num_classes=0``)
    returns the pooled features ``[N, C]``, like :meth:`embed`. Floating-point ``x`` must be normalised. ``uint8`` ``x``
    is raw RGB pixels, which the first kernel normalises with the mean and std of the weights.

    The parameters and buffers are those of the checkpoint, in float32 and under torchvision's names. The network runs
    from a folded copy of them, which computes in ``dtype``. If they change, the next call folds them again: a call
    always uses the weights that ``state_dict()`` shows (for the exceptions, see :meth:`refresh`). The model is for
    inference only: ``train()`` and inputs that require grad raise ``GradientError``.
    """

    def extra_repr(self) -> str:
        return (
            f"{self.architecture.name}, {self.weights}, "
            f"{f'{self.num_classes} classes' if self.num_classes else 'no classifier'}, "
            f"{dtype_name(self.dtype)} on {self.device}"
        )

    def __repr__(self) -> str:
        return f"fastres.Model({self.extra_repr()})"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _ELSEWHERE:
                raise
            message = f"A fastres.Model has no {name!r}; {_ELSEWHERE[name]}"
            raise AttributeError(message, name=name, obj=self) from error

    @property
    def classifier(self) -> tuple[Tensor, Tensor]:
        """The classifier's weight ``[num_classes, C]`` and bias ``[num_classes]`` in float32; see :meth:`embed`.

        Raises ``ClassifierError`` if the model has no classifier.
        """
        require_classifier(self, "classifier")
        state = self.state_dict()
        return state["fc.weight"].float(), state["fc.bias"].float()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model to a ``.safetensors`` file, completely or not at all; return its path.

        ``fastres.load(path)`` reads it: the tensors, the architecture, ``transforms`` and ``categories``. Raises
        ``OutputError`` if the file cannot be written.
        """
        return saved.write(path, self.state_dict(), **self._description())

    def _description(self) -> dict[str, Any]:
        """Return what a saved file holds beside the tensors."""
        return {
            "architecture": self.architecture,
            "transforms": self.transforms,
            "categories": self.categories,
            "weights": self.weights,
            "record": None,
        }

    # -- running ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, (LOGITS,))[0] if self.num_classes else self.embed(x)

    def features(
        self, x: Tensor, return_layers: Mapping[str, str] | Sequence[str] | None = None
    ) -> OrderedDict[str, Tensor]:
        """Return feature maps by name, in the network's order: ``[N, C, h, w]`` in ``dtype``, channels-last.

        Without ``return_layers``, return all of ``stem``, ``layer1``, …. ``return_layers`` is a mapping from layers to
        the names of the returned maps, as in torchvision's ``IntermediateLayerGetter``, or a list of layers. The
        network then stops after the deepest of them. The stem's output is also called ``maxpool`` (``relu`` in CIFAR
        networks, which have no max-pool), and ``avgpool`` is ``[N, C, 1, 1]``. To use the network inside a larger
        model, see :class:`fastres.Backbone`. Raises ``InputError`` for layers that the network does not have.

        >>> model.features(x, {"layer1": "0", "layer4": "1"})
        """
        return self.values(x, returned_values(self.outline, return_layers))

    def values(self, x: Tensor, wanted: Mapping[str, str]) -> OrderedDict[str, Tensor]:
        """Compute values of the plan in one call. ``wanted`` maps returned names to values of the plan."""
        distinct = tuple(dict.fromkeys(wanted.values()))
        found = dict(zip(distinct, self._run(x, distinct), strict=True))
        if POOLED in found:
            found[POOLED] = found[POOLED][:, :, None, None]
        return OrderedDict((name, found[value]) for name, value in wanted.items())

    def embed(self, x: Tensor) -> Tensor:
        """Return the average-pooled features of the last stage, float32 ``[N, C]``: the classifier's input."""
        return self._run(x, (POOLED,))[0].float()

    @overload
    def predict(
        self, images: OneImage, top_k: int = ..., *, batch_size: int = ..., progress: bool | None = ...
    ) -> Predictions: ...
    @overload
    def predict(
        self, images: ManyImages, top_k: int = ..., *, batch_size: int = ..., progress: bool | None = ...
    ) -> list[Predictions]: ...
    @overload
    def predict(self, images: Any, top_k: int = ..., *, batch_size: int = ..., progress: bool | None = ...) -> Any: ...
    def predict(self, images: Any, top_k: int = 5, *, batch_size: int = 32, progress: bool | None = None) -> Any:
        """Classify one image or many: a path, PIL image, array ``[H, W, 3]``, tensor ``[3, H, W]``, or a list of these.

        ``transforms`` resizes, crops and normalises each image. For one image, returns its :class:`Predictions`: the
        ``top_k`` classes, the most probable first. For a list, an iterator or a batch (``[N, H, W, 3]`` or
        ``[N, 3, H, W]``), returns a list of them. On a terminal, a progress bar is shown if there is more than one
        batch; ``progress`` turns it on or off.

        >>> model.predict("cat.jpg").top1.label
        >>> [found.top1.label for found in model.predict(["cat.jpg", "dog.jpg"])]

        Raises ``ImageError`` for anything that is not an image, ``ClassifierError`` if the model has no classifier, and
        ``InputError`` unless ``top_k`` and ``batch_size`` are whole numbers of at least 1.
        """
        return predict(self, images, top_k, batch_size=batch_size, progress=progress)

    def warmup(
        self,
        batch_sizes: Iterable[int] | int = (1,),
        image_size: int | tuple[int, int] = 224,
        dtypes: Iterable[torch.dtype] | torch.dtype | None = None,
    ) -> None:
        """Do the work of the first calls of each shape now: fold, pack, compile kernels, capture CUDA graphs.

        ``dtypes`` are the dtypes of the inputs to expect. Each has its own kernels and graphs on a GPU. ``None`` stands
        for float32, ``dtype`` and uint8 (the input of :meth:`predict` and ``fastres classify``) on a GPU, and for
        float32 on a CPU. Raises the same errors as a call with such inputs.
        """
        height, width = image_sides(image_size)
        if dtypes is None:
            dtypes = (torch.float32, self.dtype, torch.uint8) if self.device.type == "cuda" else (torch.float32,)
        given = [dtypes] if isinstance(dtypes, torch.dtype) else list(dict.fromkeys(dtypes))
        for batch in [batch_sizes] if is_whole(batch_sizes) else batch_sizes:  # type: ignore[union-attr]
            for dtype in given:
                x = torch.zeros(whole_number(batch, "batch_sizes"), 3, height, width, dtype=dtype, device=self.device)
                for _ in range(WARMUP_CALLS):
                    self(x)

    def explain(
        self,
        batch: int = 1,
        image_size: int | tuple[int, int] = 224,
        *,
        ceilings: Ceilings | None = None,
        microseconds: Mapping[str, float] | None = None,
    ) -> Explanation:
        """Explain how each step runs for this shape: kernel, configuration, shapes, FLOPs, bytes, and any fallback.

        On a GPU, also give each step's share of the roofline. The time is measured if the tuner measured this layer on
        this GPU, otherwise estimated. The ceilings come from the GPU's data sheet unless you pass ``ceilings``, which
        ``fastres.bench.measure.ceilings.measure`` measures. The ceilings of a CPU are unknown unless you pass them.
        ``microseconds`` are measured times of steps, by name.

        Raises ``InputError`` unless ``batch`` is a whole number of at least 1 and ``image_size`` is one or a pair of
        them, not below the network's minimum.
        """
        batch, (height, width) = whole_number(batch, "batch"), image_sides(image_size)
        given = (batch, height, width, ceilings, microseconds, self._signal_to_noise())
        return Explanation.of(self.outline, self.device, self.dtype, *given)

    def _signal_to_noise(self) -> Mapping[str, float]:
        return {}
