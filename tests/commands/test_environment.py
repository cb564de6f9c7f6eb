"""``fastres env``: its lines about the GPU and Triton."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastres.commands import environment
from fastres.kernels.inspection.ptx import RECOMMENDED


@pytest.mark.parametrize(
    ("capability", "hip", "triton", "is_noted"),
    [
        ((9, 0), None, "3.6.0", True),
        ((9, 0), None, "3.7.1", False),
        ((9, 0), None, None, False),
        ((8, 0), None, "3.6.0", False),
        ((9, 0), "7.0", "3.6.0", False),
        (None, None, "3.6.0", False),
    ],
)
def test_the_fence_that_triton_leaves_out_on_hopper_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    hip: str | None,
    triton: str | None,
    is_noted: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    major, minor = capability or (0, 0)
    properties = SimpleNamespace(name="a GPU", total_memory=2**34, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(environment, "installed_version", {"triton": triton}.get)
    facts = environment.environment()
    assert facts["triton"] == triton
    if is_noted:
        assert str(facts["triton_note"]).startswith(f"triton {triton} leaves out a fence")
        assert f"{RECOMMENDED} or newer" in str(facts["triton_note"])
    else:
        assert facts["triton_note"] is None
