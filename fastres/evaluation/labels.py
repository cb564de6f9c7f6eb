"""The labels of the images that are evaluated. How they are found is in :mod:`fastres.labels`."""

from __future__ import annotations

from fastres.labels.finding import ImageLabels, find_labels

__all__ = ["ImageLabels", "find_labels"]
