"""fastres in a pipeline of Ray: ``fastres.ray.Classifier`` for ``map_batches`` on tables of image bytes.

``classifier`` runs the model on a batch. ``batches`` finds the images in it and adds the columns, in the format of the
batch: NumPy, pandas or Arrow. ``share`` asks Ray for the GPU and the cores of this process. The model, the decoders and
the columns are those of ``fastres.classify`` (``fastres.classification``). Here, too, ``import ray`` is Ray itself.
"""

from __future__ import annotations

from .needs import needs

needs("fastres.ray", ["ray", "pyarrow"])

from .classifier import Classifier  # noqa: E402

__all__ = ["Classifier"]
