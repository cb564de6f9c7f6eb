"""Test the command ``python -m bench.tune``."""

from __future__ import annotations

import pytest
import torch

from fastres.bench import tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_when_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
