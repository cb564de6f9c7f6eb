"""The table of an evaluation: one row per image, with its label and the answer of each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from fastres.classification.tables import refuse_twins
from fastres.quantisation.comparison import deviations, margins, relative_errors

from .candidates import Answers, Candidate

# The columns of a candidate: its column, then one of these.
LABEL, INDEX, SCORE, RANK, LABEL_SCORE = "_label", "_index", "_score", "_rank", "_label_score"
ERROR, NOISE, MARGIN = "_logit_error", "_logit_noise", "_margin"


@dataclass(frozen=True)
class Layout:
    """The columns of a row.

    ``references`` has the place of the candidate that another is compared with, by the other's place; it is empty if
    nothing is compared. Without labels, ``labelled`` is False.
    """

    identity: pa.Schema
    candidates: tuple[Candidate, ...]
    class_names: tuple[str, ...]
    labelled: bool
    references: Mapping[int, int]

    @property
    def schema(self) -> pa.Schema:
        fields = [*self.identity, pa.field("error", pa.string())]
        if self.labelled:
            fields += [pa.field("label", pa.string()), pa.field("label_index", pa.int32())]
        for place, candidate in enumerate(self.candidates):
            kinds = {LABEL: pa.string(), INDEX: pa.int32(), SCORE: pa.float32()}
            if self.labelled:
                kinds |= {RANK: pa.int32(), LABEL_SCORE: pa.float64()}
            if place in self.references:
                kinds |= {ERROR: pa.float32(), NOISE: pa.float32()}
            if place in self.references.values():
                kinds |= {MARGIN: pa.float32()}
            fields += [pa.field(f"{candidate.column}{name}", kind) for name, kind in kinds.items()]
        return pa.schema(fields)

    def check(self) -> None:
        """Raise ``InputError`` if two columns have one name."""
        refuse_twins(self.schema.names, "table")

    def rows(
        self, identity: pa.RecordBatch, errors: Sequence[str | None], labels: np.ndarray, answers: Sequence[Answers]
    ) -> pa.RecordBatch:
        """Return the rows of N images. ``labels`` is int64 ``[N]``, −1 for an image without a label.

        If an image has an error, all columns behind it are null, except for its label.
        """
        failed = np.array([error is not None for error in errors])
        names = pa.array(self.class_names, pa.string())
        arrays = [*identity.columns, pa.array(errors, pa.string())]
        if self.labelled:
            known = pa.array(labels.astype(np.int32), mask=labels < 0)
            arrays += [names.take(known), known]
        for place, own in enumerate(answers):
            given = answered(own)
            index = pa.array(own.indices[:, 0].numpy().astype(np.int32), mask=failed | ~given)
            arrays += [names.take(index), index, pa.array(own.scores[:, 0].numpy(), mask=failed)]
            if self.labelled:
                ranks, scores = label_ranks(own, labels)
                arrays += [
                    pa.array(ranks.astype(np.int32), mask=failed | (ranks == 0)),
                    pa.array(scores, mask=failed | np.isnan(scores)),
                ]
            if place in self.references:
                error, noise = differences(own, answers[self.references[place]])
                arrays += [pa.array(values, mask=failed | np.isnan(values)) for values in (error, noise)]
            if place in self.references.values():
                margin = _margins(own)
                arrays.append(pa.array(margin, mask=failed | np.isnan(margin)))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def answered(answers: Answers) -> np.ndarray:
    """Return which images have an answer, bool ``[N]``: not those for which the network gave NaN."""
    return ~np.isnan(answers.scores[:, 0].numpy())


def label_ranks(answers: Answers, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each label among the classes (1: it is the answer), and its probability, float64 ``[N]``.

    They are 0 and NaN if there is no label or no answer, or if the label is not among the classes that are known.
    """
    known = (labels >= 0) & answered(answers)
    wanted = torch.from_numpy(np.maximum(labels, 0))[:, None]
    if answers.logits is not None:
        logits = answers.logits.double()
        own = logits.gather(1, wanted)
        right = answers.indices[:, :1] == wanted
        # A label whose logit equals that of the answer, without being the answer, is second.
        ranks = torch.where(right, 1, ((logits > own).sum(1, keepdim=True) + 1).clamp(min=2))[:, 0].numpy()
        scores = logits.log_softmax(1).gather(1, wanted)[:, 0].exp().numpy()
    else:
        places = answers.indices == wanted
        among = places.any(1).numpy()
        ranks = np.where(among, places.int().argmax(1).numpy() + 1, 0)
        scores = np.where(among, (answers.scores.double() * places).sum(1).numpy(), np.nan)
    return np.where(known, ranks, 0), np.where(known, scores, np.nan)


def differences(found: Answers, truth: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return the relative L2 error of each image's logits, and the standard deviation of the errors, float32 ``[N]``.

    They are NaN if the logits of one of the two are unknown.
    """
    if found.logits is None or truth.logits is None:
        return _unknown(found), _unknown(found)
    given = found.logits.double(), truth.logits.double()
    return relative_errors(*given).float().numpy(), deviations(*given).float().numpy()


def _margins(answers: Answers) -> np.ndarray:
    """Return by how much the best logit exceeds the second, float32 ``[N]``; NaN if logits are unknown."""
    return _unknown(answers) if answers.logits is None else margins(answers.logits.double()).float().numpy()


def _unknown(answers: Answers) -> np.ndarray:
    return np.full(len(answers.indices), np.nan, np.float32)
