"""Limits of containers on the processor's time, and the threads that suit them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from fastres.classification.batches import default_workers
from fastres.errors import ThreadsWarning
from fastres.executors import quota


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups; the process is in none."""
    monkeypatch.setattr(quota, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(quota, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(quota, "_warned", False)
    for name in quota.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "own").write_text("")
    return tmp_path


def limit(folder: Path, quota_us: object, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota_us} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota_us}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


def test_no_groups_or_no_limit(groups: Path) -> None:
    assert quota.cores_allowed() is None
    (groups / "own").write_text("0::/docker/abc\n")
    limit(groups / "cgroup" / "docker" / "abc", "max")
    assert quota.cores_allowed() is None
    (groups / "own").unlink()
    assert quota.cores_allowed() is None


def test_version_2(groups: Path) -> None:
    (groups / "own").write_text("0::/pods/one\n")
    limit(groups / "cgroup" / "pods" / "one", 250000)
    assert quota.cores_allowed() == 2.5
    limit(groups / "cgroup" / "pods", 50000)
    assert quota.cores_allowed() == 0.5, "an outer group is stricter"


def test_the_root_of_a_container(groups: Path) -> None:
    """The name is the host's, and does not exist in the container."""
    (groups / "own").write_text("0::/kubepods/besteffort/pod1\n")
    limit(groups / "cgroup", 150000)
    assert quota.cores_allowed() == 1.5


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_version_1(groups: Path, folder: str) -> None:
    (groups / "own").write_text("4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n")
    limit(groups / "cgroup" / folder / "docker" / "abc", 50000, version=1)
    limit(groups / "cgroup" / "memory" / "docker" / "abc", 1, version=1)
    assert quota.cores_allowed() == 0.5
    limit(groups / "cgroup" / folder / "docker" / "abc", -1, version=1)
    assert quota.cores_allowed() is None


def test_threads_and_workers(groups: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert quota.suitable_threads() == cores
    (groups / "own").write_text("0::/\n")
    for given, expected in ((50000, 1), (100000, 1), (1000 * 100000, cores)):
        limit(groups / "cgroup", given)
        assert quota.suitable_threads() == expected
        assert default_workers() == min(expected, 16)


def test_programs_use_fewer_threads_unless_told(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    quota.limit_threads()
    assert given in ([], [len(os.sched_getaffinity(0))])
    (groups / "own").write_text("0::/\n")
    limit(groups / "cgroup", 50000)
    given.clear()
    quota.limit_threads()
    assert given == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    quota.limit_threads()
    assert given == [1]


def test_a_library_warns_once(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quota.warn_of_too_many_threads()
    (groups / "own").write_text("0::/\n")
    limit(groups / "cgroup", 50000)
    with pytest.warns(ThreadsWarning, match=r"torch uses 8 threads, but .* 0\.5 cores, .*torch\.set_num_threads\(1\)"):
        quota.warn_of_too_many_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quota.warn_of_too_many_threads()
