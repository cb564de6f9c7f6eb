"""Images: reading files, resizing, cropping, normalising, and the names of classes.

Knows pixels; never a model or a device.
"""

from .transforms import ImageSource, Transforms, batch_sources, load_image

__all__ = ["ImageSource", "Transforms", "batch_sources", "load_image"]
