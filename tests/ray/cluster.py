"""A real Ray cluster on this machine: a head without cores and two nodes with two each, on a loopback address.

Ray's daemons are children of the process that starts the cluster. A reaper of Ray's ends them if that process dies.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
# Ray replaces 127.0.0.1 by the machine's address.
ADDRESS = "127.0.0.2"
CORES = 2  # of each node, as Ray counts; the machine may have fewer
STORE = 80 << 20  # bytes; Ray accepts no less than 75 MB
# A node is dead after five seconds without a sign of life; Ray's default is half a minute.
SOON = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 5}
PATIENCE = 60  # seconds until a test gives up to wait for a process


class LocalCluster:
    """A running cluster, with what tests do to it. ``nodes`` are the two nodes that run tasks."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self.folder = cluster, folder
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        """The address to pass to ``ray.init``, also in another process."""
        return self._cluster.address

    def driver(self, code: str) -> subprocess.Popen[str]:
        """Start another driver of this cluster: Python ``code`` that begins when Ray is connected."""
        start = (
            f"import ray\nray.init({self.address!r}, log_to_driver=False, logging_level='ERROR', namespace='tests')\n"
        )
        return subprocess.Popen([sys.executable, "-c", start + code], stdout=subprocess.PIPE, text=True)

    def add_node(self, cpus: int = CORES, **options: Any) -> Any:
        """Start a node and wait until it is ready."""
        node = self._cluster.add_node(
            num_cpus=cpus, object_store_memory=STORE, node_ip_address=ADDRESS, include_log_monitor=False, **options
        )
        self.nodes.append(node)
        return node

    def kill_node(self, node: Any) -> None:
        """Kill a node as a power cut does: its raylet, and with it the workers. Wait until the cluster knows."""
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()
        self.nodes.remove(node)
        until(lambda: node.node_id not in {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]})
        self._cluster.remove_node(node, allow_graceful=False)

    def node_of(self, pid: int) -> Any:
        """Return the node that has started a process."""
        return next(node for node in self.nodes if node.all_processes["raylet"][0].process.pid == _parent(pid))

    def restore(self) -> None:
        """Start nodes until there are two again."""
        while len(self.nodes) < 2:
            self.add_node()


def kill(pid: int) -> None:
    """Kill a process of the cluster, such as an actor, by SIGKILL; return when it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists() or _state(pid) == "Z")


def until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition()`` is true; fail after ``PATIENCE`` seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def processes(folder: Path) -> list[int]:
    """Return the processes of the cluster whose files are in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            mine = os.fsencode(folder) in path.read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if mine and int(path.parent.name) != os.getpid() and _state(int(path.parent.name)) != "Z":
            found.append(int(path.parent.name))
    return found


def title(pid: int) -> str:
    """Return the command line of a process; Ray puts the name of the actor into it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def quiet() -> None:
    """Turn off the log lines and the progress bars of Ray Data. Its import configures the logger."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False


@contextmanager
def running() -> Iterator[LocalCluster]:
    """Start a cluster and connect this process to it as the driver. At the end, stop all and delete its files."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a short path: Ray's sockets lie deep inside
    with pytest.MonkeyPatch.context() as patch:
        # Inherited by all processes of the cluster, and so by the actors.
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.delenv("OMP_NUM_THREADS", raising=False)  # Ray sets it in each actor
        patch.delenv("RAY_ADDRESS", raising=False)
        (folder / "ray").mkdir()
        cluster = Cluster()
        try:
            local = LocalCluster(cluster, folder)
            cluster.add_node(
                num_cpus=0,
                object_store_memory=STORE,
                node_ip_address=ADDRESS,
                include_dashboard=False,
                _system_config=SOON,
            )
            local.restore()
            ray.init(local.address, log_to_driver=False, logging_level="ERROR", namespace="tests")
            quiet()
            yield local
        finally:
            ray.shutdown()
            cluster.shutdown()
            for pid in processes(folder):  # that Ray has left
                kill(pid)
            shutil.rmtree(folder)
