"""A server under more requests than it can answer, with clients that leave, and with processes that are killed."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.serving.conftest import PATIENCE, Server, encoded, form, serving


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with a queue of four images."""
    with serving("--max-queue", "4", "--max-batch", "2", "--workers", "1") as found:
        yield found
        assert "Traceback" not in found.errors.read_text()


@pytest.fixture(scope="module")
def large(photo: Image.Image) -> bytes:
    """A PNG that takes a tenth of a second to decode."""
    return encoded(photo.resize((2400, 1600)), "PNG", compress_level=1)


def until_more_are_answered(server: Server, count: float) -> None:
    server.until(lambda: server.number("fastres_images_total") > count)


def together(count: int, call: Callable[[int], object]) -> list[object]:
    """Return the results of ``count`` calls at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_more_than_the_queue_holds_is_refused_with_a_time_and_nothing_is_lost(small: Server, large: bytes) -> None:
    def ask(_: int) -> tuple[int, str]:
        status, _, headers = small.post("/classify", large)
        return status, headers.get("retry-after", "")

    answers = together(40, ask)
    statuses = Counter(status for status, _ in answers)  # type: ignore[misc]
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 4
    assert all(after.isdigit() and 1 <= int(after) <= 60 for status, after in answers if status == 429)  # type: ignore[misc]
    small.until(lambda: small.number("fastres_images_in_flight") == 0)
    assert small.post("/classify", large)[0] == 200


def test_a_form_with_more_images_than_places_is_refused_as_a_whole(small: Server, photo: Image.Image) -> None:
    data = encoded(photo)
    for count, status in ((4, 200), (5, 413)):
        body, content_type = form({f"{number}.jpg": data for number in range(count)})
        assert small.post("/classify", body, content_type=content_type)[0] == status


def test_a_client_that_leaves_frees_its_place(small: Server, large: bytes) -> None:
    left = 'fastres_requests_total{path="/classify",status="499"}'
    before = small.number(left)
    head = f"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Length: {len(large)}\r\n\r\n".encode()
    for _ in range(3):
        leaving = [socket.create_connection(("127.0.0.1", small.port)) for _ in range(4)]
        for connection in leaving:
            connection.sendall(head + large)
        small.until(lambda: small.number("fastres_images_in_flight") > 0)
        for connection in leaving:
            connection.close()
        small.until(lambda: small.number("fastres_images_in_flight") == 0)
    assert small.number(left) > before
    assert small.post("/classify", large)[0] == 200


def test_killed_processes_lose_no_request(server: Server, photo: Image.Image) -> None:
    data, stop, failures = encoded(photo), threading.Event(), []

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        while not stop.is_set():
            connection.request("POST", "/classify", data)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                failures.append((answer.status, content))

    clients = [threading.Thread(target=client) for _ in range(6)]
    for thread in clients:
        thread.start()
    try:
        for pattern in ("forkserver", "spawn_main", "forkserver"):
            time.sleep(0.5)
            # The first process with this text is the forkserver itself; the decoders are below it.
            victim = server.processes(pattern)[-1]
            answered = server.number("fastres_images_total")
            os.kill(victim, signal.SIGKILL)
            until_more_are_answered(server, answered + 50)
    finally:
        stop.set()
        for thread in clients:
            thread.join(PATIENCE)
    assert not failures
    assert server.number("fastres_decoder_deaths") == 2
    server.until(lambda: server.number("fastres_images_in_flight") == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_are_answered_before_the_end(number: int, large: bytes) -> None:
    with serving("--workers", "1", "--max-queue", "16") as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, "/classify", large) for _ in range(8)]
        server.until(lambda: server.number("fastres_images_in_flight") >= 6)
        children = server.processes()
        os.killpg(server.process.pid, number) if number == signal.SIGINT else server.process.send_signal(number)
        assert [answer.result()[0] for answer in asked] == [200] * 8
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.errors.read_text()
        server.until(lambda: not any(os.path.exists(f"/proc/{child}/cmdline") for child in children))
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/ready")


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fastres", "serve", "resnet20_digits", "--port", str(server.port)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert f"fastres: 127.0.0.1:{server.port} cannot be used: another program uses it" in ended.stderr
