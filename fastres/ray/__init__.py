"""fastres on a Ray cluster: ``fastres.ray.classify``, and ``fastres.ray.Classifier`` for pipelines of your own.

``driving`` gives the shards of a run to the ``actors``. ``classifier`` runs the model on a batch of ``map_batches``;
``batches`` finds the images in it and adds the columns, in the format of the batch: NumPy, pandas or Arrow. ``share``
asks Ray for the GPU and the cores of this process. The model, the decoders, the columns and the shards are those of
``fastres.classify`` (``fastres.classification``). Here, too, ``import ray`` is Ray itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastres.extras import check_dependencies

check_dependencies("fastres.ray", ["ray", "pyarrow"], "ray")

from .classifier import Classifier  # noqa: E402

if TYPE_CHECKING:
    from .driving import classify
else:

    def __getattr__(name):  # importing Ray Data takes seconds, which actors with a Classifier need not wait
        if name != "classify":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        check_dependencies("fastres.ray.classify", ["pandas"], "ray")
        from .driving import classify

        return classify


__all__ = ["Classifier", "classify"]
