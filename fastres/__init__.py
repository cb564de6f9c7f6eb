"""Run ResNets as fast as the hardware allows. Inference only.

>>> import fastres
>>> model = fastres.load("resnet50")
>>> model.predict("cat.jpg")
"""

from .aliases import serve_former_names
from .classification import classify
from .errors import FastresError
from .images.transforms import Transforms
from .model import Model, Prediction
from .model.backbone import Backbone
from .model.conversion import from_module
from .model.loading import load
from .network.architectures import list_models
from .version import __version__

__all__ = [
    "Backbone",
    "FastresError",
    "Model",
    "Prediction",
    "Transforms",
    "__version__",
    "classify",
    "from_module",
    "list_models",
    "load",
]

serve_former_names()
