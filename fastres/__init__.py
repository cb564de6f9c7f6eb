"""fastres runs ResNets as fast as the hardware allows. Inference only.

>>> import fastres
>>> model = fastres.load("resnet50")
>>> model.predict("cat.jpg")
"""

from .architectures import list_models
from .backbone import Backbone
from .classification import classify
from .errors import FastresError
from .loading import from_module, load
from .model import Model, Prediction
from .version import __version__

__all__ = [
    "Backbone",
    "FastresError",
    "Model",
    "Prediction",
    "__version__",
    "classify",
    "from_module",
    "list_models",
    "load",
]
