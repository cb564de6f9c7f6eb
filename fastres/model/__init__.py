"""The public model: loading, calling, explaining, and using it as part of another network.

This package connects weights, images and executors. It does no computation itself.
"""

from .model import Model
from .parameters import Parameters
from .predictions import Prediction, Predictions

__all__ = ["Model", "Parameters", "Prediction", "Predictions"]
