"""Images: read, resize, crop and normalise them, and look up class names.

This package handles pixels only. It does not know about models.
"""

from .transforms import ImageSource, Transforms, batch_sources, load_image

__all__ = ["ImageSource", "Transforms", "batch_sources", "load_image"]
