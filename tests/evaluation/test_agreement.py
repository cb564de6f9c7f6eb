"""Agreement with a reference."""

from __future__ import annotations

import numpy as np
import pytest

from fastres.evaluation.agreement import agreement

NAN = np.full(4, np.nan)


def test_agreement() -> None:
    """The noise is 2 · √2 · 0.1, so the margins 0.2 and 0.1 are within it."""
    found = agreement(
        "ref", np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4]), np.array([0.1, 0.2, 0.3, 0.4]), np.full(4, 0.1),
        np.array([0.3, 1.0, 0.1, 0.2]),
    )  # fmt: skip
    assert found is not None
    assert (found.reference, found.images, found.same_class) == ("ref", 4, 0.75)
    assert found.logit_error == pytest.approx(0.25)
    assert (found.clear, found.clear_same_class) == (2, 1.0)


def test_without_logits() -> None:
    found = agreement("ref", np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0]), NAN, NAN, NAN)
    assert found is not None
    assert (found.same_class, found.logit_error, found.clear, found.clear_same_class) == (0.75, None, None, None)


def test_images_without_an_answer() -> None:
    """If both networks give NaN, they agree; the error is of the other images."""
    errors, margins = np.array([0.1, np.nan, np.nan, 0.3]), np.array([9.0, np.nan, np.nan, 9.0])
    found = agreement("ref", np.array([1, -1, -1, 2]), np.array([1, -1, 3, 2]), errors, errors, margins)
    assert found is not None
    assert (found.same_class, found.clear) == (0.75, 2)
    assert found.logit_error == pytest.approx(0.2)


def test_no_images() -> None:
    none = np.array([], dtype=np.int64)
    assert agreement("ref", none, none, NAN[:0], NAN[:0], NAN[:0]) is None
