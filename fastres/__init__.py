"""Run torchvision's ResNets fast, on a CPU or a GPU. Inference only.

>>> import fastres
>>> model = fastres.load("resnet50")
>>> model.predict("cat.jpg")

Names are imported when they are first used, because importing torch takes a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .aliases import serve_former_names
from .errors import FastresError
from .interruption import start_program
from .version import __version__

if TYPE_CHECKING:
    from . import look as look
    from . import ray as ray
    from .calibration import quantize
    from .classification import classify, join_shards, plan_shards
    from .evaluation import evaluate
    from .images.transforms import Transforms
    from .memory import keep_memory
    from .model import Model, Prediction, Predictions
    from .model.backbone import Backbone
    from .model.conversion import from_module
    from .model.loading import load
    from .network.catalogue import list_models
    from .serving import serve

__all__ = [
    "Backbone",
    "FastresError",
    "Model",
    "Prediction",
    "Predictions",
    "Transforms",
    "__version__",
    "classify",
    "evaluate",
    "from_module",
    "join_shards",
    "keep_memory",
    "list_models",
    "load",
    "plan_shards",
    "quantize",
    "serve",
]

# The modules that the names above are in. Folders are names as well: fastres.look works after ``import fastres``.
_MODULES = {
    "Backbone": "model.backbone",
    "Model": "model",
    "Prediction": "model",
    "Predictions": "model",
    "Transforms": "images.transforms",
    "classify": "classification",
    "evaluate": "evaluation",
    "from_module": "model.conversion",
    "join_shards": "classification",
    "keep_memory": "memory",
    "list_models": "network.catalogue",
    "load": "model.loading",
    "plan_shards": "classification",
    "quantize": "calibration",
    "serve": "serving",
}
_FOLDERS = frozenset(
    "bench calibration classification evaluation executors export folding images kernels look model network "  # noqa: SIM905
    "quantisation ray roofline serving storage weights".split()
)
_PUBLIC_FOLDERS = ("bench", "export", "look", "ray")
_FILES = frozenset("arguments errors files forks memory terminal text".split())  # noqa: SIM905

if not TYPE_CHECKING:  # type checkers see the imports above, and report names that do not exist

    def __getattr__(name):
        if name in _MODULES:
            value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        elif name in _FOLDERS or name in _FILES:
            value = importlib.import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*__all__, *_PUBLIC_FOLDERS})


serve_former_names()
start_program()
