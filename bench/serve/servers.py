"""Start servers as programs of their own, and watch their memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fastres.bench.measure.watching import ended_s, tree, used_mb
from fastres.classification.driving import every
from fastres.errors import ServerError

FASTRES, PLAIN, LITSERVE = NAMES = ("fastres", "plain", "litserve")
DESCRIPTIONS = {
    FASTRES: "fastres serve",
    PLAIN: "FastAPI + eager PyTorch, one image a call",
    LITSERVE: "LitServe + eager PyTorch",
}
_PATIENCE_S = 180.0
_GRACE_S = 40.0
_MEMORY_EVERY_S = 0.5


@dataclass
class Running:
    """A server that answers at ``url``. ``memory_mb`` is that of all its processes, in 10⁶ bytes, over time.

    ``others_cores`` is how many cores other programs used meanwhile, on average; ``None`` if that is unknown.
    """

    name: str
    url: str
    process: int | None = None
    api_key: str | None = None
    memory_mb: list[float] = field(default_factory=list)
    others_cores: float | None = None

    @property
    def form(self) -> bool:
        """True if it takes images only as the field of a form."""
        return self.name == LITSERVE

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name, those of buckets with their label; empty if the server has none."""
        headers = {"X-API-Key": self.api_key} if self.api_key else {}
        asked = urllib.request.Request(f"{self.url}/metrics", headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except (urllib.error.URLError, OSError):
            return {}
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    @contextmanager
    def watched(self, often: bool) -> Iterator[None]:
        """Measure the memory, and what other programs use of the cores, within the context.

        If not ``often``, the memory is measured at the beginning and the end only. It takes 20 ms of a core, which
        would show in the times of one request in twenty. Within the context, this process may start programs, but must
        wait for their end.
        """
        self.memory_mb = []
        self._sample()
        began, before = time.perf_counter(), self._others_s()
        with every(_MEMORY_EVERY_S, self._sample) if often else nullcontext():
            yield
        after, seconds = self._others_s(), time.perf_counter() - began
        self._sample()
        self.others_cores = None if before is None or after is None else max(0.0, after - before) / seconds

    def _sample(self) -> None:
        if self.process is not None:
            self.memory_mb.append(round(sum(map(used_mb, tree(self.process))), 1))

    def _others_s(self) -> float | None:
        """Return the time for which other programs have used the cores, in seconds, from any point in time on."""
        if self.process is None:
            return None
        own = time.process_time() + ended_s()
        try:
            return busy_s() - own - sum(map(processor_s, tree(self.process)))
        except (OSError, AttributeError):  # not Linux
            return None


def busy_s() -> float:
    """Return the time for which the cores of this process were in use by any program, in seconds since the start."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for name, *rest in map(str.split, Path("/proc/stat").read_text().splitlines()):
        if name in names:
            user, nice, system, _idle, _waiting, *others = map(int, rest[:8])
            ticks += user + nice + system + sum(others)
    return ticks / os.sysconf("SC_CLK_TCK")


def processor_s(process: int) -> float:
    """Return the processor time that a process has used, in seconds; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]  # the name in parentheses may have spaces
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def command(name: str, model: str, weights: str, port: int, options: Sequence[str] = ()) -> list[str]:
    """Return the command of a server; ``options`` are those of ``fastres serve``."""
    if name == FASTRES:
        given = ["--weights", weights, "--port", str(port), "--device", "cpu", *options]
        return [sys.executable, "-m", "fastres", "serve", model, *given]
    return [sys.executable, "-m", f"fastres.bench.serve.{name}", model, weights, str(port)]


@contextmanager
def started(name: str, model: str, weights: str, options: Sequence[str] = ()) -> Iterator[Running]:
    """Start a server, wait until it is ready, and end it with the context. Raises ``ServerError``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(name, model, weights, port, options), stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(name, url, process, log)
            yield Running(name, url, process.pid)
        finally:
            _end(process)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _wait(name: str, url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if _is_ready(url):
            return
        time.sleep(0.2)
    log.seek(0)
    last = "\n".join(log.read().splitlines()[-15:])
    status = process.poll()
    how = f"is not ready after {_PATIENCE_S:g} s" if status is None else f"ended with status {status}"
    raise ServerError(f"The server {name} {how}. It said:\n{last or 'nothing'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and all of its processes."""
    processes = tree(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for left in processes:  # LitServe ends without its processes
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
