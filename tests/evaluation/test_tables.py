"""The rows of an evaluation: ranks, probabilities and differences, with errors, NaN and files that give few classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from fastres.errors import InputError
from fastres.evaluation.candidates import Answers, Candidate
from fastres.evaluation.tables import Layout, answered, differences, label_ranks
from fastres.images.transforms import Transforms

IDENTITY = pa.schema([("path", pa.string())])
LOGITS = torch.tensor([[3.0, 1, 0, 2], [0, 0, 5, 5], [float("nan")] * 4, [1, 2, 3, 4]], device="cpu")


def candidate(column: str) -> Candidate:
    return Candidate(
        column, column, "resnet18", "", "fastres", "float32", Transforms(32, 32), None, 4,
        run=lambda pixels: Answers.of_logits(LOGITS, 4), settings={},
    )  # fmt: skip


def test_ranks_and_probabilities_of_labels() -> None:
    answers = Answers.of_logits(LOGITS, 2)
    ranks, scores = label_ranks(answers, np.array([3, 2 if answers.indices[1, 0] == 2 else 3, 0, -1]))
    assert ranks.tolist() == [2, 1, 0, 0], "there is no rank without an answer or a label"
    expected = LOGITS.double().softmax(1)
    assert scores[0] == pytest.approx(float(expected[0, 3]))
    assert np.isnan(scores[2:]).all()


def test_a_label_that_ties_with_the_answer_is_second() -> None:
    answers = Answers.of_logits(LOGITS[1:2], 4)
    other = 5 - int(answers.indices[0, 0])  # of the classes 2 and 3, whose logits are equal
    assert label_ranks(answers, np.array([other]))[0].tolist() == [2]


def test_probabilities_do_not_underflow() -> None:
    """In float32, the probability of this label would be 0."""
    _, scores = label_ranks(Answers.of_logits(torch.tensor([[0.0, 200.0]], device="cpu"), 2), np.array([0]))
    assert scores[0] == pytest.approx(np.exp(-200.0))


def test_a_file_that_gives_two_classes() -> None:
    indices, scores = torch.tensor([[3, 1], [0, 2]], device="cpu"), torch.tensor([[0.6, 0.3], [0.9, 0.1]], device="cpu")
    answers = Answers(indices, scores, None)
    ranks, found = label_ranks(answers, np.array([1, 1]))
    assert ranks.tolist() == [2, 0]
    assert found[0] == pytest.approx(0.3)
    assert np.isnan(found[1])
    error, deviation = differences(answers, answers)
    assert len(error) == len(deviation) == 2
    assert np.isnan(error).all(), "logits are unknown"


def test_differences_from_the_reference() -> None:
    truth = Answers.of_logits(LOGITS[[0, 3]], 4)
    found = Answers.of_logits(LOGITS[[0, 3]] * 1.1, 4)
    errors, deviations = differences(found, truth)
    assert errors == pytest.approx([0.1, 0.1])
    assert deviations == pytest.approx(0.1 * LOGITS[[0, 3]].std(1, correction=0).numpy())


def test_rows() -> None:
    layout = Layout(IDENTITY, (candidate("a"), candidate("b")), ("w", "x", "y", "z"), True, {1: 0})
    paths = pa.RecordBatch.from_arrays([pa.array(["1", "2", "3", "4"])], schema=IDENTITY)
    answers = Answers.of_logits(LOGITS, 4)
    rows = layout.rows(paths, (None, None, None, "broken"), np.array([3, 0, 1, 2]), [answers, answers])
    first, _, third, last = rows.to_pylist()
    assert (first["label"], first["label_index"], first["a_label"], first["a_rank"]) == ("z", 3, "w", 2)
    assert (first["b_logit_error"], first["b_logit_noise"], first["a_margin"]) == (0, 0, 1)
    assert "a_logit_error" not in first
    assert "b_margin" not in first
    assert (third["label"], third["a_label"], third["a_index"], third["a_rank"]) == ("x", None, None, None)
    assert (last["path"], last["error"], last["label"]) == ("4", "broken", "y")
    assert all(last[name] is None for name in rows.schema.names if name.startswith(("a_", "b_")))
    assert answered(answers).tolist() == [True, True, False, True]


def test_without_labels() -> None:
    layout = Layout(IDENTITY, (candidate("a"),), ("w", "x", "y", "z"), False, {})
    assert layout.schema.names == ["path", "error", "a_label", "a_index", "a_score"]


def test_columns_have_one_meaning() -> None:
    """A column that is copied from a Parquet file may have the name of one of the table's own."""
    copied = pa.schema([*IDENTITY, ("label", pa.int64())])
    with pytest.raises(InputError, match=r"These columns occur twice.*: label\. "):
        Layout(copied, (candidate("a"),), ("w",), True, {}).check()
    same = (candidate("a"), replace(candidate("a"), name="other"))
    with pytest.raises(InputError, match="a_index, a_label, a_score"):
        Layout(IDENTITY, same, ("w",), False, {}).check()
