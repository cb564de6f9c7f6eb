"""What a network sees in a photograph: filters, feature maps and class-activation maps, as figures and numbers.

Uses a model from outside, as any program could.
"""

from .figures import cam_figure, features_figure, filters_figure, look

__all__ = ["cam_figure", "features_figure", "filters_figure", "look"]
