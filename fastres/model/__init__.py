"""What users hold: the model, how it is loaded, called, explained, and used as a part of another network.

Brings weights, images and executors together. Computes nothing itself.
"""

from .model import Model
from .parameters import Parameters
from .predict import Prediction

__all__ = ["Model", "Parameters", "Prediction"]
