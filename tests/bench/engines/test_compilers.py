"""Test torch.compile as an engine, with and without max-autotune."""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import pytest
import torch

from fastres.bench.measure.calibration import calibrated
from fastres.network.architectures import get_architecture
from tests.bench.engines.test_peers import BY_NAME, COMPILE, CPU, CUDA


@pytest.mark.slow
def test_two_ways_to_compile_are_right_side_by_side() -> None:
    import torch._inductor.config as inductor

    reason = BY_NAME["compile"].reason_absent(CPU, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    small = calibrated(dataclasses.replace(get_architecture("resnet20"), depths=(1,), widths=(16,)))
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = small(x)
        built = [BY_NAME[name].build(small, x) for name in COMPILE]
        for engine in built:  # building the second does not break the first
            torch.testing.assert_close(engine(x), expected, rtol=1e-4, atol=1e-4)
    assert not inductor.freezing
    assert not inductor.max_autotune


def test_compile_is_absent_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> NoReturn:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    for name in COMPILE:
        assert "C++ compiler" in (BY_NAME[name].reason_absent(CPU, torch.float32) or "")
        assert BY_NAME[name].reason_absent(CUDA, torch.float16) is None
