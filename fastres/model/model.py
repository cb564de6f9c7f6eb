"""The public ``Model``: the interface of a torchvision ResNet on top of a plan and an executor."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastres.errors import ArchitectureError, DeviceError, DtypeError, GradientError
from fastres.executors import cpu
from fastres.folding.build import build_plan, outline
from fastres.images.transforms import Transforms
from fastres.network.architectures import Architecture
from fastres.network.plan import LOGITS, POOLED, Plan, Shape
from fastres.roofline.ceilings import Ceilings
from fastres.text import dtype_name

from . import compiled
from .explain import Explanation
from .inputs import check_input
from .outputs import returned_values
from .parameters import Parameters, tree
from .predict import Prediction, predict

if TYPE_CHECKING:
    from collections.abc import Iterable

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARMUP_CALLS = 2  # on a GPU the first call compiles and the second captures


class Executor(Protocol):
    """Runs a plan: ``CpuExecutor``, ``GpuExecutor`` or ``GraphExecutor`` of :mod:`fastres.executors`."""

    def run(self, x: Tensor, outputs: Sequence[str] = (LOGITS,)) -> list[Tensor]: ...


class Model(nn.Module):
    """A ResNet for inference. Create it with ``fastres.load`` or ``fastres.from_module``.

    Call it with ``x`` ``[N, 3, H, W]`` on the model's device. H and W may be any size from the minimum up, in any
    memory format. It returns float32 logits ``[N, num_classes]``. A model without a classifier (``num_classes=0``)
    returns the pooled features ``[N, C]``, like :meth:`embed`. Floating-point ``x`` must be normalised. ``uint8`` ``x``
    is raw RGB pixels, which the first kernel normalises with the mean and std of the weights.

    The parameters and buffers are those of the checkpoint, in float32 and under torchvision's names. The network runs
    from a folded copy of them, which computes in ``dtype``. The model is for inference only: ``train()`` and inputs
    that require grad raise ``GradientError``.
    """

    _device: torch.device
    _executor_cache: Executor | None
    _handle: int
    _lock: threading.Lock
    _outline: Plan

    def __init__(
        self,
        state: Mapping[str, Tensor],
        arch: Architecture,
        *,
        transforms: Transforms,
        categories: Sequence[str] | None = None,
        dtype: torch.dtype | str = "auto",
        weights: str = "a state dict",
    ) -> None:
        super().__init__()
        self.training = False
        self.architecture = arch
        self.transforms = transforms
        categories = categories if arch.num_classes else ()
        self.categories: tuple[str, ...] | None = tuple(categories) if categories is not None else None
        self.weights = weights
        self._requested_dtype = parse_dtype(dtype)
        for name, child in tree(state).items():
            self.add_module(name, child)
        self._reset()

    # -- properties ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation: the one requested, or else float16 on CUDA and float32 on the CPU."""
        if self._requested_dtype is not None:
            return self._requested_dtype
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @property
    def num_classes(self) -> int:
        return self.architecture.num_classes

    @property
    def outline(self) -> Plan:
        """The plan without weight data (tensors on the ``meta`` device): shapes, costs and structure only."""
        return self._outline

    @property
    def plan(self) -> Plan:
        """The network as fused steps, with folded weights in the model's dtype and on its device.

        Each access builds a new plan.
        """
        with torch.no_grad():
            return build_plan(
                self.state_dict(),
                self.architecture,
                dtype=self.dtype,
                mean=self.transforms.mean,
                std=self.transforms.std,
            )

    def extra_repr(self) -> str:
        return (
            f"{self.architecture.name}, {self.weights}, "
            f"{f'{self.num_classes} classes' if self.num_classes else 'no classifier'}, "
            f"{dtype_name(self.dtype)} on {self.device}"
        )

    def __repr__(self) -> str:
        return f"fastres.Model({self.extra_repr()})"

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
        return self.values(x, returned_values(self._outline, return_layers))

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

    def predict(
        self, images: Any, top_k: int = 5, *, batch_size: int = 32, progress: bool | None = None
    ) -> list[list[Prediction]]:
        """Classify images: a path, PIL image, array ``[H, W, 3]``, tensor ``[3, H, W]``, or a list of these.

        ``transforms`` resizes, crops and normalises each image. Returns the ``top_k`` classes of each image, the most
        probable first. On a terminal, a progress bar is shown if there is more than one batch; ``progress`` turns it on
        or off.

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
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if dtypes is None:
            dtypes = (torch.float32, self.dtype, torch.uint8) if self.device.type == "cuda" else (torch.float32,)
        given = [dtypes] if isinstance(dtypes, torch.dtype) else list(dict.fromkeys(dtypes))
        for batch in [batch_sizes] if isinstance(batch_sizes, int) else batch_sizes:
            for dtype in given:
                x = torch.zeros(batch, 3, height, width, dtype=dtype, device=self.device)
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
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return Explanation.of(self._outline, self.device, self.dtype, batch, height, width, ceilings, microseconds)

    def _run(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return compiled.run(x, self._handle, outputs)
        check_input(x, self.architecture, self.device)
        if x.shape[0] == 0:
            return self._empty(x.shape, outputs)
        with torch.no_grad():
            return self._executor.run(x, outputs)

    def _empty(
        self, shape: Sequence[int], outputs: tuple[str, ...], device: torch.device | None = None
    ) -> list[Tensor]:
        """Return uninitialised outputs for an input of ``shape``, in the layouts that the executors return."""
        n, _, h, w = shape
        shapes: dict[str, Shape] = self._outline.shapes(n, h, w)
        device = device or self.device
        results = []
        for output in outputs:
            if output == LOGITS:
                results.append(torch.empty(shapes[LOGITS], device=device))
            elif output == POOLED:
                results.append(torch.empty(n, self.architecture.features, dtype=self.dtype, device=device))
            else:
                nhwc = torch.empty(shapes[output], dtype=self.dtype, device=device)
                results.append(nhwc.permute(0, 3, 1, 2))
        return results

    # -- the executor, built when first needed ---------------------------------------------------------------

    def _reset(self) -> None:
        """Discard everything derived from the parameters."""
        # Stored, because every call needs it and walking over the parameters takes 7 µs.
        object.__setattr__(self, "_device", next(self.parameters()).device)
        object.__setattr__(self, "_lock", threading.Lock())
        object.__setattr__(self, "_executor_cache", None)
        plan = outline(self.architecture, self.dtype, tuple(self.transforms.mean), tuple(self.transforms.std))
        object.__setattr__(self, "_outline", plan)
        object.__setattr__(self, "_handle", compiled.register(self))

    @property
    def _executor(self) -> Executor:
        executor = self._executor_cache
        if executor is None:
            with self._lock:
                executor = self._executor_cache
                if executor is None:
                    executor = make_executor(self)
                    object.__setattr__(self, "_executor_cache", executor)
        return executor

    # -- the interface of nn.Module --------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """Implement ``.cuda()``, ``.to()``, ``.half()`` and similar methods.

        Moves the parameters, stores the dtype, and discards the folded copy, which the next call builds again.
        """
        try:
            moved = [fn(torch.empty(0, dtype=dtype, device=self.device)) for dtype in (torch.float32, torch.float16)]
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(
                f"The model cannot be moved: {error}. "
                f"{'A CUDA GPU is available' if torch.cuda.is_available() else 'No CUDA GPU is available here'}; "
                "model.to('cpu') always works"
            ) from error
        device = moved[0].device
        check_device(device)
        if moved[0].dtype == moved[1].dtype:
            self._requested_dtype = parse_dtype(moved[0].dtype)
        super()._apply(lambda tensor: tensor.to(device), recurse)
        self._reset()
        return self

    def train(self, mode: bool = True) -> Model:
        if mode:
            raise GradientError(
                "fastres is for inference: batch norm is folded away and no gradients are computed. Train the "
                "torchvision model, then fastres.from_module(model) or fastres.load(name, weights=state_dict)"
            )
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Model:
        if requires_grad:
            raise GradientError("fastres computes no gradients; train the torchvision model and load its state dict")
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict like ``nn.Module.load_state_dict``. The next call folds the network again."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._reset()
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" in self.__dict__ and (name in self._modules or (name == "fc" and isinstance(value, nn.Module))):
            self._replace_head(name, value)
        elif isinstance(value, nn.Module):
            raise ArchitectureError(
                f"model.{name} cannot be set: fastres runs a fixed plan and would ignore the module. "
                "Change the torchvision model and use fastres.from_module"
            )
        else:
            super().__setattr__(name, value)

    def _replace_head(self, name: str, value: Any) -> None:
        features = self.architecture.features
        if name == "fc" and isinstance(value, nn.Identity):
            self.architecture = self.architecture.with_classes(0)
            self._modules.pop("fc", None)
            self.categories = ()
        elif name == "fc" and isinstance(value, nn.Linear) and value.in_features == features and value.bias is not None:
            head = {"weight": value.weight.detach(), "bias": value.bias.detach()}
            self.architecture = self.architecture.with_classes(value.out_features)
            self._modules["fc"] = Parameters({part: t.to(self.device, torch.float32) for part, t in head.items()})
            if self.categories is not None and len(self.categories) != value.out_features:
                self.categories = None
        else:
            raise ArchitectureError(
                f"model.{name} cannot be replaced by {type(value).__name__}: fastres runs a fixed plan. "
                f"model.fc takes an nn.Linear({features}, classes), or nn.Identity() for no classifier; "
                "model.embed(x) gives the classifier's input; "
                "for anything else change the torchvision model and use fastres.from_module"
            )
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_device", "_lock", "_executor_cache", "_outline", "_handle")
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Return the compute dtype for a ``torch.dtype`` or its name, ``None`` for ``"auto"``. Raises ``DtypeError``."""
    if dtype == "auto":
        return None
    names = {dtype_name(known): known for known in COMPUTE_DTYPES}
    known = names.get(dtype_name(dtype))
    if known is None:
        raise DtypeError(f"dtype is {dtype}, but fastres computes in {', '.join(names)}; pass one of these or 'auto'")
    return known


def check_device(device: torch.device) -> None:
    """Raise ``DeviceError`` if fastres has no executor for this type of device."""
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(
            f"The device is {str(device)!r}, but fastres runs only on 'cpu' and 'cuda' devices; use one of these"
        )


def make_executor(model: Model) -> Executor:
    """Fold ``model`` and build the executor for its device."""
    if model.device.type == "cpu":
        cpu.check_dtype(model.dtype)
        return cpu.CpuExecutor(model.plan)
    from fastres.executors.gpu import GpuExecutor
    from fastres.executors.graphs import GraphExecutor, Pool
    from fastres.kernels.routing.without import left_out

    if torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            "A model's first call folds and packs its weights, which a CUDA graph cannot capture: call "
            "model.warmup(...), or the model on a batch of this shape, before the capture"
        )
    runner = GpuExecutor(model.plan)
    torch.cuda.current_stream(model.device).synchronize()  # other streams may now read the weights
    return runner if "graphs" in left_out() else GraphExecutor(runner, Pool(model.device))
