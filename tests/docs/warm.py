"""Run ``fastres`` commands without importing torch each time, in forks of a process that has already imported it.

A page has a dozen commands, and importing torch takes most of the time of a short one. ``python warm.py SOCKET``
imports torch, then runs the commands of its clients. Each runs in its own fork, with the client's folder, variables,
input and output. The client is the ``fastres`` that a page finds on its PATH. A fork runs the real ``main``. SIGTERM to
the client goes on to the fork, which also gets it if the client is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CLIENT = """\
    #!{python} -IS
    import json, os, signal, socket, sys
    server = socket.socket(socket.AF_UNIX)
    server.connect({address!r})
    request = json.dumps({{"arguments": sys.argv, "folder": os.getcwd(), "variables": dict(os.environ)}}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    signal.signal(signal.SIGTERM, lambda *_: server.sendall(b"t"))
    sys.exit(int(server.recv(16) or 70))
"""


@contextlib.contextmanager
def warmed(folder: Path, variables: Mapping[str, str]) -> Iterator[Path]:
    """Create a folder with a ``fastres`` for the PATH. Its server runs until the context ends."""
    address = os.fspath(folder / "socket")
    client = folder / "bin" / "fastres"
    client.parent.mkdir()
    client.write_text(textwrap.dedent(CLIENT).format(python=sys.executable, address=address))
    client.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], env=variables, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield client.parent
        finally:
            server.terminate()


def run(request: Mapping[str, Any], descriptors: list[int]) -> int:
    """In a fork: take over the client's folder, variables and files, and run the command."""
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.argv = request["arguments"]
    try:
        runpy.run_module("fastres", run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()


def answer(client: socket.socket) -> None:
    """Run the command of ``client`` in a fork of a fork, and send it the exit status."""
    header, descriptors, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as stream:
        text = stream.read(int.from_bytes(header, "big"))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        client.close()
        os._exit(run(json.loads(text), descriptors) & 0xFF)
    runs = threading.Event()
    runs.set()
    threading.Thread(target=end_with, args=(client, child, runs), daemon=True).start()
    _, status = os.waitpid(child, 0)
    runs.clear()
    client.sendall(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())


def end_with(client: socket.socket, child: int, runs: threading.Event) -> None:
    """Send SIGTERM to ``child`` when ``client`` got one, or is gone."""
    there = True
    while there:
        there = bool(client.recv(1))
        if runs.is_set():
            os.kill(child, signal.SIGTERM)


def main(address: str) -> None:
    import fastres.commands.cli
    import fastres.export.onnx  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the intermediate forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(client)
                os._exit(0)
            client.close()


if __name__ == "__main__":
    main(sys.argv[1])
