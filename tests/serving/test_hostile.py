"""A thousand hostile requests to one server: it goes on serving, reveals nothing, and never blames itself."""

from __future__ import annotations

import io
import json
import random
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from PIL import Image

from fastres.bench.measure.watching import tree, used_mb
from tests.serving.conftest import PATIENCE, Server, encoded, form, serving

COUNT = 1200
SEED = 20_261_129
# What no error may reveal: a path, a module, a trace.
REVEALING = re.compile(rb"/(?:tmp|root|home|usr|work|proc)/|site-packages|\.py\b|Traceback|0x[0-9a-f]{6,}")

Attack = Callable[[random.Random], tuple[int | None, bytes]]  # returns the status (None: no answer) and the answer


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    options = ["--timeout", "8", "--max-bytes", "1000000", "--max-pixels", "4000000", "--workers", "2"]
    with serving(*options) as found:
        yield found
        text = found.errors.read_text()
        assert "Traceback" not in text, text


def raw(server: Server, *pieces: bytes, half_close: bool = False) -> tuple[int | None, bytes]:
    """Send bytes as they are; return the status and all that comes back until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while len(answer) < 1 << 20:
                part = connection.recv(1 << 16)
                answer += part
                if not part or _is_complete(answer):
                    break
        except OSError:  # reset or too slow; a connection that is reset cannot be half-closed either
            pass
    match = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return (int(match[1]) if match else None), answer


def _is_complete(answer: bytes) -> bool:
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(separator and length and len(body) >= int(length[1]))


def head(*lines: str, path: str = "/classify", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode("latin-1")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bombs() -> list[bytes]:
    """Return files that would take much memory or time to decode."""
    start = b"\x89PNG\r\n\x1a\n"
    big = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    small = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    zeros = zlib.compress(bytes(100_000_000), 9)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    end = png_chunk(b"IEND", b"")
    animated = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), (i, i, i)) for i in range(200)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    jpeg = bytearray(encoded(Image.new("RGB", (64, 64))))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return [
        start + big + png_chunk(b"IDAT", zeros) + end,
        start + small + png_chunk(b"iCCP", b"x\0\0" + zeros) + pixels + end,
        start + small + png_chunk(b"zTXt", b"x\0\0" + zeros) + pixels + end,
        start + small + png_chunk(b"IDAT", zeros) + end,
        start + small + end,
        bytes(jpeg),
        animated.getvalue(),
    ]


def attacks(server: Server, photo: Image.Image) -> list[Attack]:
    """Return functions that each make one hostile request."""
    small = photo.resize((160, 107))
    goods = [encoded(small), encoded(small, "PNG"), encoded(small, "WEBP"), encoded(small, progressive=True)]
    others = [b"", b"x", b"<html>", b"%PDF-1.7\n", b"GIF89a", b"II*\0" + bytes(99), b"PK\3\4" + bytes(99), bytes(5000),
              b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
              encoded(small, "BMP"), encoded(small, "TIFF"), encoded(small, "ICO"), *bombs()]  # fmt: skip

    def post(body: bytes, path: str = "/classify", **headers: str) -> tuple[int | None, bytes]:
        lines = [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]
        return raw(server, head(*lines, path=path), body)

    def cut(r: random.Random) -> tuple[int | None, bytes]:
        data = r.choice(goods)
        return post(data[: r.randrange(len(data))])

    def flipped(r: random.Random) -> tuple[int | None, bytes]:
        data = bytearray(r.choice(goods))
        for _ in range(r.choice([1, 3, 30, 300])):
            data[r.randrange(len(data))] = r.randrange(256)
        return post(bytes(data), r.choice(["/classify", "/embed", "/look"]))

    def other(r: random.Random) -> tuple[int | None, bytes]:
        return post(r.choice(others))

    def wrong_length(r: random.Random) -> tuple[int | None, bytes]:
        data = r.choice(goods)
        line = r.choice([
            f"Content-Length: {len(data) + 1000}", f"Content-Length: {len(data) // 2}", "Content-Length: -1",
            "Content-Length: 99999999999999999999999", "Content-Length: 12abc",
            "Content-Length: 5\r\nContent-Length: 6",
            "Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked, chunked", "X: y",
        ])  # fmt: skip
        return raw(server, head(line), data, half_close=True)

    def chunks(r: random.Random) -> tuple[int | None, bytes]:
        body = r.choice(
            [b"zz\r\nabc\r\n", b"-5\r\nabc", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"ffffffffffffffff\r\na", b"3\r\nabc"]
        )
        return raw(server, head("Transfer-Encoding: chunked"), body, half_close=True)

    def heads(r: random.Random) -> tuple[int | None, bytes]:
        return raw(server, r.choice([
            head(f"X: {'a' * 100_000}"), head(*(f"X-{i}: {i}" for i in range(3000))), head(path="/" + "a" * 1_000_000),
            head("X: \x00\x01"), head("Host: b"), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
            b"GET /\r\n", b"\r\n" * 5000, b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/1.0\r\n\r\n", b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n",
            b"TRACE / HTTP/1.1\r\n\r\n",
            head("X-API-Key: \xe9\xff", "Host: evil.example:99999"), head("Expect: 100-continue", "Content-Length: 9"),
            head("Upgrade: websocket", "Connection: Upgrade", method="GET", path="/"),
        ]), half_close=True)  # fmt: skip

    def paths(r: random.Random) -> tuple[int | None, bytes]:
        path = r.choice([
            "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.js/../../app.py", "//evil.example/", "/classify/",
            "/classify?top_k=0", "/classify?top_k=-1", "/classify?top_k=99999999999999999999999999", "/%00", "/%ff%fe",
            "/classify?top_k=1e9", "/classify?top_k=%00", "/look?top_k=1000", "http://evil.example/classify", "*",
        ])  # fmt: skip
        method = r.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PATCH"])
        return raw(server, head("Content-Length: 0", path=path, method=method), half_close=True)

    def forms(r: random.Random) -> tuple[int | None, bytes]:
        good, kind = form({"a.jpg": goods[0]})
        body, kind = r.choice([
            (good, "multipart/form-data"), (good, "multipart/form-data; boundary="), (good[:-30], kind),
            (good.replace(b"\r\n\r\n", b"\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n", 1), kind),
            (form({f"{i}.jpg": b"x" for i in range(3000)})), (form({"../../etc/passwd": b"x"})),
            (b"--border\r\n" * 5000, kind), (good, "multipart/form-data; boundary=" + "b" * 5000),
            (b"--border\r\nContent-Disposition: form-data; name=\"f\"\r\n\r\ntext\r\n--border--\r\n", kind),
        ])  # fmt: skip
        return post(body, **{"Content-Type": kind})

    def documents(r: random.Random) -> tuple[int | None, bytes]:
        body = r.choice(
            [b"{}", b"[" * 50_000, b'{"urls": ["http://169.254.169.254/latest/"]}', b'{"urls": NaN}', b"\xff"]
        )
        return post(body, **{"Content-Type": "application/json"})

    def leaves(r: random.Random) -> tuple[int | None, bytes]:
        data = r.choice(goods)
        request = head(f"Content-Length: {len(data)}") + data
        with socket.create_connection(("127.0.0.1", server.port), timeout=15) as connection:
            if r.random() < 0.5:  # reset, instead of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(request[: r.choice([0, 10, len(request) // 2, len(request)])])
        return None, b""

    return [cut, cut, flipped, flipped, flipped, other, wrong_length, chunks, heads, paths, forms, documents, leaves]


def test_hostile_requests_leave_the_server_serving(victim: Server, photo: Image.Image) -> None:
    good = encoded(photo)
    expected = victim.post("/classify", good)[1]["predictions"]
    every, generator = attacks(victim, photo), random.Random(SEED)
    plans = [(every[number % len(every)], random.Random(generator.random())) for number in range(COUNT)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda plan: (plan[0].__name__, *plan[0](plan[1])), plans))
    statuses = Counter(status for _, status, _ in answers)
    assert sum(statuses.values()) == COUNT
    for name, status, answer in answers:
        assert status is None or status < 500, (name, answer)
        assert not REVEALING.search(answer) or status == 200, (name, answer)
        head_text, _, content = answer.partition(b"\r\n\r\n")
        if status is not None and status >= 400 and content:  # none on HEAD
            assert b"content-type: application/json" in head_text, (name, answer)
            found = json.JSONDecoder().raw_decode(content.decode())[0]  # another answer may follow
            assert set(found["error"]) == {"type", "message"}, (name, answer)
        assert status in (None, 100, 200) or status >= 400, (name, answer)  # no redirections
    assert {200, 400, 404, 413, 415, 422, 431} <= set(statuses), statuses
    victim.until(lambda: victim.number("fastres_images_in_flight") == 0)
    assert victim.number("fastres_decoder_deaths") == 0
    assert victim.post("/classify", good)[1]["predictions"] == expected


def test_slow_senders_are_cut_off_and_do_not_hinder_others(victim: Server, photo: Image.Image) -> None:
    good = encoded(photo)
    slow_head = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(150)]
    slow_body = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(150)]
    silent = [socket.create_connection(("127.0.0.1", victim.port)) for _ in range(150)]
    try:
        for connection in slow_head:
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: a\r\n")
        for connection in slow_body:
            connection.sendall(head("Content-Length: 100000") + b"x" * 100)
        for _ in range(3):
            assert victim.post("/classify", good)[0] == 200
        answers = Counter()
        for connection in slow_head + slow_body + silent:
            connection.settimeout(PATIENCE)
            answers[connection.recv(100)[:12]] += 1
        assert answers == {b"HTTP/1.1 408": 300, b"": 150}
    finally:
        for connection in slow_head + slow_body + silent:
            connection.close()
    assert victim.post("/classify", good)[0] == 200


@pytest.mark.parametrize("half", [True, False])
def test_a_client_may_leave_with_several_requests_unanswered(half: bool, victim: Server, photo: Image.Image) -> None:
    requests = b"".join(head(f"Content-Length: {len(body)}") + body for body in (encoded(photo), b"no image") * 3)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE) as connection:
            connection.sendall(requests)
            if half:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
    victim.until(lambda: victim.number("fastres_images_in_flight") == 0)
    assert victim.post("/classify", encoded(photo))[0] == 200


def test_requests_on_one_connection_are_answered_in_turn(victim: Server, photo: Image.Image) -> None:
    good, bad = encoded(photo), b"no image"
    requests = b"".join(head(f"Content-Length: {len(body)}") + body for body in (good, bad, good))
    with socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE) as connection:
        connection.sendall(requests)
        answers = b""
        while answers.count(b"server-timing") < 2 and (part := connection.recv(1 << 16)):
            answers += part
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"415", b"200"]


def first_answer(server: Server, request: bytes) -> tuple[int | None, str]:
    """Return status and error name (or nothing) of the first answer."""
    status, answer = raw(server, request)
    found = re.search(rb'"type": ?"(\w+)"', answer)
    return status, found[1].decode() if found else ""


@pytest.mark.parametrize("wrong", [head(f"X: {'a' * 40_000}"), b"NO HTTP\r\n\r\n", head("Content-Length: -1")])
def test_an_error_does_not_take_the_place_of_an_earlier_answer(
    wrong: bytes, victim: Server, photo: Image.Image
) -> None:
    body = encoded(photo)
    request = head(f"Content-Length: {len(body)}") + body
    with socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE) as connection:
        connection.sendall(request + request + wrong)
        answers = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200"]


def test_what_follows_a_body_changes_no_header_and_is_limited(victim: Server) -> None:
    start = head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n"
    # As JSON it would be refused as a list of URLs.
    assert first_answer(victim, start + b"Content-Type: application/json\r\n\r\n") == (415, "FormatError")
    for more in (b"a: b\r\n" * 50_000, b"a: " + b"b" * 300_000):
        status, _ = raw(victim, start + more)
        assert status in (431, None)  # none if the client was still sending
    extension = b"3;" + b"x" * 300_000 + b"\r\nabc\r\n0\r\n\r\n"
    assert raw(victim, head("Transfer-Encoding: chunked") + extension)[0] in (431, None)


@pytest.mark.parametrize(
    ("wrong", "status", "kind"),
    [(head(f"X: {'a' * 40_000}"), 431, "HeaderError"), (b"NO HTTP\r\n\r\n", 400, "HttpError")],
)
def test_requests_that_no_path_gets_are_counted(wrong: bytes, status: int, kind: str, victim: Server) -> None:
    names = f'fastres_requests_total{{path="other",status="{status}"}}', f'fastres_errors_total{{type="{kind}"}}'
    before = list(map(victim.number, names))
    assert first_answer(victim, wrong) == (status, kind)
    assert list(map(victim.number, names)) == [number + 1 for number in before]


def test_an_upgrade_does_not_lose_the_body(victim: Server, photo: Image.Image) -> None:
    body, upgrade = encoded(photo), ("Upgrade: h2c", "Connection: Upgrade")
    assert first_answer(victim, head(f"Content-Length: {len(body)}", *upgrade) + body) == (400, "HttpError")
    assert raw(victim, head(*upgrade, method="GET", path="/health"))[0] == 200


def test_few_requests_wait_on_a_connection(victim: Server, photo: Image.Image) -> None:
    ask, before = head(method="GET", path="/health"), memory(victim)
    with socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE) as connection:
        connection.sendall(ask * 20)
        answers = b""
        while answers.count(b"HTTP/1.1 200") < 20:
            answers += connection.recv(1 << 16)
    greedy = [socket.create_connection(("127.0.0.1", victim.port), timeout=PATIENCE) for _ in range(8)]
    try:
        for connection in greedy:
            connection.setblocking(False)
            for _ in range(20):
                with suppress(OSError):  # the buffers are full, or the server has closed
                    connection.send(head(method="GET", path="/page.js") * 20_000)
        assert victim.post("/classify", encoded(photo))[0] == 200
        assert memory(victim) < before + 50
    finally:
        for connection in greedy:
            connection.close()


def test_a_path_is_never_completed_with_the_host_that_a_client_names(victim: Server) -> None:
    assert first_answer(victim, head("Content-Length: 0", path="/classify/")) == (404, "NotFoundError")


def memory(server: Server) -> float:
    """Return the memory of the server and its processes in 10⁶ bytes."""
    return sum(map(used_mb, tree(server.process.pid)))
