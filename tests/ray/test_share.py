"""fastres.ray.share: what Ray has assigned decides on the device and the threads."""

from __future__ import annotations

import pytest
import torch

from fastres.errors import DeviceError
from fastres.executors.quota import suitable_threads
from fastres.ray import share
from fastres.ray.share import Share


def test_outside_ray_nothing_is_assigned() -> None:
    before = torch.get_num_threads()
    assert share.assigned() is None
    assert share.use_threads(None) == suitable_threads()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cpus", "expected"), [(0, 1), (0.5, 1), (1, 1), (2.5, 2)])
def test_threads(cpus: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setenv("OMP_NUM_THREADS", str(expected))  # Ray's own choice
    assert share.use_threads(Share(cpus, 0)) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's
    assert share.use_threads(Share(cpus, 0)) == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert share.use_threads(Share(cpus, 0)) == expected
    assert used == [expected] * 2


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert share.suitable_device(None, None).type == ("cuda" if there else "cpu")
        assert share.suitable_device(Share(1, 0), None).type == "cpu"
        assert share.suitable_device(Share(1, 0.5), None).type == "cuda"
        assert share.suitable_device(Share(1, 1), "cpu").type == "cpu"
        assert share.suitable_device(Share(1, 1), "cuda:0") == torch.device("cuda:0")
        assert share.suitable_device(None, "cuda").type == "cuda"  # the model says whether there is one
        with pytest.raises(DeviceError, match=r"Pass num_gpus=1 to map_batches"):
            share.suitable_device(Share(1, 0), "cuda")
