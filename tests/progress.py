"""``pytest -p tests.progress``: print every ten seconds which tests have run and which are running.

It replaces the dot for each test. A failure is printed when it happens, not only at the end.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

import pytest

SECONDS = 10  # between two lines


class Progress:
    """Counts tests as they begin and end. With xdist it counts those of all workers."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.total = self.done = self.failed = 0
        self.running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.begin(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self.begin(len(ids))

    def begin(self, total: int) -> None:
        self.total = total
        if total and not self._thread.is_alive() and not self._ended.is_set():
            self._thread.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self._lock:
            self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self._lock:
            self.done += 1
            self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
            self.say(f"FAILED {report.nodeid} ({report.when})")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
        """Print no letters, because they would mix with the lines."""
        if not isinstance(report, pytest.TestReport) or hasattr(report, "wasxfail"):
            return None
        if report.failed:
            return ("failed", "", "FAILED") if report.when == "call" else ("error", "", "ERROR")
        if report.skipped:
            return "skipped", "", "SKIPPED"
        return ("passed", "", "PASSED") if report.when == "call" else None

    def pytest_sessionfinish(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self.say(self.line())

    def line(self) -> str:
        """Return time, share, counts and the running tests, the longest-running first."""
        now = time.monotonic()
        with self._lock:
            running = sorted(self.running.items(), key=lambda pair: pair[1])
        share = 100 * self.done // max(self.total, 1)
        tests = ", ".join(f"{name.removeprefix('tests/')} ({now - since:.0f} s)" for name, since in running)
        minutes, seconds = divmod(int(now - self.start), 60)
        counts = f"{self.done} of {self.total} tests, {self.failed} failed"
        return f"{minutes:2d}:{seconds:02d} {share:3d} %  {counts}{'; now ' if tests else ''}{tests}"

    def say(self, words: str) -> None:
        print(words, file=sys.__stdout__, flush=True)

    def _report(self) -> None:
        while not self._ended.wait(SECONDS):
            self.say(self.line())


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # one process reports, for all workers
        config.pluginmanager.register(Progress(), "progress")
