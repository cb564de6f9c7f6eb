"""The bundled model: its images of digits, its training, and a study of what it finds similar.

Nothing else in the benchmark depends on digits but the studies.
"""

from .data import as_image, load_digits, load_scans, split, validation_split

__all__ = ["as_image", "load_digits", "load_scans", "split", "validation_split"]
