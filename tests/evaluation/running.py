"""Run fastres.evaluate in tests: in this process, without a progress bar."""

from __future__ import annotations

from typing import Any

import fastres

DIGITS = "resnet20_digits"


def evaluate(source: Any, models: Any = DIGITS, output: Any = None, **options: Any) -> fastres.evaluation.Evaluation:
    return fastres.evaluate(source, models, output, **{"workers": 0, "progress": False, **options})
