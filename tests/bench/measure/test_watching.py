"""Watching programs: what their progress bars say, their steady rates, and their memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastres.bench.measure import watching
from fastres.bench.measure.watching import Bar, Program, Sample, children, level, memory_mb, tree, used_mb, watch
from fastres.classification.run import rows_bar
from fastres.errors import FastresError

LINE = "\rclassify:  {share}%|██▌       | {rows}/200 [00:01<00:09, 20.00image/s, errors=0]"


def shown(*rows: int) -> Bar:
    """Return a bar that has shown these rows of 200, one line a second."""
    bar = Bar()
    for second, each in enumerate(rows):
        bar.feed(LINE.format(share=each // 2, rows=each).encode(), float(second))
    return bar


def test_a_bar_is_read_however_its_text_is_cut() -> None:
    text = "".join(LINE.format(share=rows // 2, rows=rows) for rows in (0, 16, 16, 32)).encode()
    for size in (1, 7, 64, len(text)):
        bar = Bar()
        for start in range(0, len(text), size):
            bar.feed(text[start : start + size], float(start))
        assert ([rows for _, rows in bar.points], bar.total) == ([0, 16, 32], 200), size


def test_only_the_bar_of_the_rows_is_read() -> None:
    bar = Bar()
    bar.feed("\rListing images: 12 [00:00]\rWriting the table:  10%|█  | 20/200 [00:01<00:09]\r\n".encode(), 0.0)
    assert (bar.points, bar.rows) == ([], 0)
    bar.feed("fastres: warning: classify 3/4 [\r\nclassify 1/2:  50%|█████     | 50/100 [00:01<".encode(), 2.5)
    assert (bar.points, bar.rows, bar.total) == ([(2.5, 50)], 50, 100)


def test_the_bar_of_the_program_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with rows_bar("classify 1/2", 1234, 0, 0, True) as tell:
        tell(1234, 5)
    bar = Bar()
    bar.feed(capsys.readouterr().err.encode(), 1.0)
    assert (bar.rows, bar.total) == (1234, 1234)


def test_the_steady_rate_leaves_out_both_ends() -> None:
    assert shown(0, 5, 20, 60, 120, 180, 181, 200).steady_rate() == (180 - 20) / 3
    assert shown(0, 5, 20, 60, 120, 180, 181, 200).steady_rate(edge=0.25) == 60
    assert shown(0, 100, 200).steady_rate() is None, "one moment is no rate"
    assert shown().steady_rate() is None


def test_a_level_is_a_median_near_a_share_of_the_rows() -> None:
    samples = [
        Sample(float(rows), rows, mb, mb + 1) for rows, mb in ((0, 1), (18, 5), (20, 9), (22, 6), (97, 7), (100, 2))
    ]
    assert level(samples, "resident_mb", 100, 0.2) == 6
    assert level(samples, "own_mb", 100, 0.2) == 7
    assert level(samples, "resident_mb", 100, 1.0) == 7, "not that of processes that are ending"
    assert level(samples, "resident_mb", 100, 0.5) is None


def test_memory_counts_children_of_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while len(found := tree(process.pid)) < 2 or not all(used_mb(each) > 1 for each in found):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        assert len(found) == 2
        assert process.pid in children(os.getpid())
        process.communicate(b"\n")
    assert used_mb(process.pid) == 0, "it has ended"
    assert tree(process.pid) == [process.pid]


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_memory_without_files_counts_what_a_process_has_written(kind: int) -> None:
    """The memory is mapped here: that of an object may be some that this process has kept (``fastres.memory``)."""
    chunk = b"x" * 1_000_000
    with mmap.mmap(-1, 64 * len(chunk), flags=kind | mmap.MAP_ANONYMOUS) as written:
        before = memory_mb(os.getpid())
        while written.tell() < len(written):
            written.write(chunk)
        resident, own = (after - first for after, first in zip(memory_mb(os.getpid()), before, strict=True))
    assert own == pytest.approx(64, rel=0.1)
    assert resident == pytest.approx(own, rel=0.1)
    assert memory_mb(2**22 + 1) == (0, 0), "no process has this number"


def test_a_program_that_fails_is_named_with_its_message(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    program = Program([str(tmp_path / "none"), "-o", str(tmp_path / "x.csv"), "--json"], cores[:1], {})
    try:
        assert os.sched_getaffinity(program.process.pid) == {cores[0]}
        assert os.sched_getaffinity(0) == set(cores), "only the program is pinned"
        with pytest.raises(FastresError, match=r"fastres classify .*none.* ended with status 2: fastres.*none"):
            watch([program], lambda rows: None)
    finally:
        program.close()


def test_closing_ends_a_program_and_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program here ignores SIGTERM, and so does its child."""
    monkeypatch.setattr(watching, "GRACE_S", 0.2)
    (tmp_path / "fastres").mkdir()
    (tmp_path / "fastres" / "__init__.py").touch()
    (tmp_path / "fastres" / "__main__.py").write_text(
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    monkeypatch.setattr(watching.fastres, "__file__", str(tmp_path / "fastres" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    program = Program([], sorted(os.sched_getaffinity(0)), {})
    deadline = time.monotonic() + 30
    while len(found := tree(program.process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == 2
    program.close()
    while any(used_mb(each) for each in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(used_mb(each) for each in found)
