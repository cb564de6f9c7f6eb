"""Show what a network sees in a photograph: filters, feature maps and class-activation maps, as figures and numbers.

This package uses only the public interface of a model, as any program could.
"""

from .figures import cam_figure, features_figure, filters_figure, look

__all__ = ["cam_figure", "features_figure", "filters_figure", "look"]
