"""The bundled model ``resnet20_digits``: its images of digits, its training, and a similarity search with it.

In the benchmark, only the studies depend on this package.
"""

from .data import as_image, load_digits, load_scans, split, validation_split

__all__ = ["as_image", "load_digits", "load_scans", "split", "validation_split"]
