"""The answers of candidates."""

from __future__ import annotations

import torch

from fastres.evaluation.candidates import Answers


def test_answers_of_logits() -> None:
    """Highest first, softmax over all classes, and no more classes than there are."""
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    answers = Answers.of_logits(logits, 5)
    assert answers.indices.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(answers.scores, logits.float().softmax(1).sort(descending=True).values)
    assert answers.logits is not None
    assert answers.logits.dtype == torch.float32
