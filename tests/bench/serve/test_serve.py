"""The load generator and its numbers, against a small server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn
from aiohttp import web

from fastres.bench.serve import command, figures, generator, servers, tables
from fastres.bench.serve.generator import _KEEP_S, BROKEN, TIMED_OUT, UNREADABLE, Job, Outcome, poisson, run
from fastres.bench.serve.servers import Running, busy_s, processor_s
from fastres.errors import FastresError, ServerError
from fastres.extras import install

Answer = Callable[[Any], Awaitable[Any]]


@contextmanager
def server(answer: Answer, keep_s: float = 75, numbers: Answer | None = None) -> Iterator[str]:
    """Yield the URL of a server in another thread, which closes connections that were idle for ``keep_s``."""
    loop = asyncio.new_event_loop()
    ports: list[int] = []

    async def start() -> None:
        app = web.Application()
        app.router.add_post("/classify", answer)
        if numbers is not None:
            app.router.add_get("/metrics", numbers)
        runner = web.AppRunner(app, keepalive_timeout=keep_s)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(site._server.sockets[0].getsockname()[1])

    loop.run_until_complete(start())
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]))
    return tmp_path


def right(index: int) -> Any:
    return web.json_response({"predictions": [{"index": index}], "milliseconds": {"decode": 1, "queue": 0, "model": 2}})


def test_arrivals_are_independent_and_the_same_for_a_seed() -> None:
    times = poisson(100, 200, seed=1)
    assert times == poisson(100, 200, seed=1) != poisson(100, 200, seed=2)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.01, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.05)  # as of the exponential distribution


def test_every_request_has_one_outcome(photos: Path) -> None:
    async def answer(request: Any) -> Any:
        content = await request.read()
        if content == b"\1":
            return web.json_response({}, status=429)
        if content == b"\2":
            request.transport.abort()
        if content == b"\3":
            await asyncio.sleep(30)
        return right(content[0])

    with server(answer) as url:
        job = Job(url, str(photos), times=tuple(number / 100 for number in range(20)), timeout=0.5)
        outcomes, cost = asyncio.run(run(job))
    assert Counter(each.status for each in outcomes) == {200: 5, 429: 5, BROKEN: 5, TIMED_OUT: 5}
    assert {each.best for each in outcomes} == {0, None}
    assert cost["processor_s"] > 0


def test_an_answer_without_a_class_is_an_outcome_of_its_own(photos: Path) -> None:
    contents = [b"<html>", b"[]", b'{"predictions": []}', b'{"predictions": [{"index": null}]}']

    async def answer(request: Any) -> Any:
        return web.Response(body=contents[(await request.read())[0]])

    with server(answer) as url:
        outcomes, _ = asyncio.run(run(Job(url, str(photos), times=(0, 0, 0, 0))))
    assert [each.status for each in outcomes] == [UNREADABLE] * 4


def test_requests_do_not_meet_the_end_of_idle_connections(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server closes idle connections a second after the client has stopped to use them, as uvicorn does."""
    monkeypatch.setattr(generator, "_KEEP_S", 0.2)
    assert uvicorn.Config("").timeout_keep_alive - _KEEP_S > 1

    async def answer(request: Any) -> Any:
        ports.append(request.transport.get_extra_info("peername")[1])
        return right((await request.read())[0])

    ports: list[int] = []
    with server(answer, keep_s=1.2) as url:
        outcomes, _ = asyncio.run(run(Job(url, str(photos), times=(0, 0.05, 1.25))))
    assert [each.status for each in outcomes] == [200, 200, 200]
    assert ports[0] == ports[1] != ports[2]


def test_latency_counts_from_the_time_at_which_a_request_was_due(photos: Path) -> None:
    busy = asyncio.Lock()

    async def answer(request: Any) -> Any:
        content = await request.read()
        async with busy:  # one at a time, 50 ms each: a request every 10 ms waits longer and longer
            await asyncio.sleep(0.05)
        return right(content[0])

    with server(answer) as url:
        outcomes, _ = asyncio.run(run(Job(url, str(photos), times=tuple(number / 100 for number in range(20)))))
    last = max(outcomes, key=lambda each: each.due)
    assert last.due == pytest.approx(0.19)
    assert last.sent - last.due < 0.5
    assert last.latency_ms > 600  # 20 × 50 ms less the 190 ms until it was due


def test_clients_of_a_closed_loop_have_one_request_at_a_time(photos: Path) -> None:
    now, most = [0], [0]

    async def answer(request: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return right((await request.read())[0])

    with server(answer) as url:
        outcomes, _ = asyncio.run(run(Job(url, str(photos), clients=3, seconds=0.5)))
    assert most == [3]
    assert {each.photo for each in outcomes} == {0, 1, 2, 3}
    assert all(each.best == each.photo for each in outcomes)


def outcome(due: float, sent: float, done: float, status: int | str = 200, **more: Any) -> Outcome:
    return Outcome(0, due, sent, done, status, **more)


def test_the_summary_counts_and_ranks() -> None:
    times = {"decode": 2.0, "queue": 1.0, "model": 5.0}
    good = [outcome(n / 10, n / 10, n / 10 + n / 1000, milliseconds=times) for n in range(1, 101)]
    found = figures.summary([*good, outcome(1, 1, 1.5, 429), outcome(2, 2, 9, TIMED_OUT)], 10.0)
    assert found["statuses"] == {"200": 100, "429": 1, TIMED_OUT: 1}
    assert found["no_answer"] == 1
    assert (found["latency_ms"]["p50"], found["latency_ms"]["p99"], found["latency_ms"]["max"]) == (50, 99, 100)
    assert found["refused_latency_ms"]["p50"] == 500
    assert found["images_per_s"] == pytest.approx(100 / 10.1, rel=1e-3)
    assert found["server_ms"]["beside"]["p50"] == pytest.approx(43)
    assert figures.warnings(found) == []
    assert figures.warnings(found, 0.05) == []
    assert figures.warnings(found, 1.234) == ["other programs used 1.2 cores"]
    (doubt,) = figures.warnings(figures.summary([outcome(0, 1, 2)], 1.0))
    assert doubt == "one request in a hundred was sent 1000 ms late or more"


def test_answers_that_differ_for_one_photograph_are_counted() -> None:
    known: dict[int, int] = {}
    answers = [outcome(0, 0, 1, best=3), outcome(0, 0, 1, best=3), outcome(0, 0, 1, 429)]
    assert figures.disagreements(answers, known) == 0
    assert figures.disagreements([outcome(0, 0, 1, best=4)], known) == 1


def test_batches_are_the_difference_of_two_readings() -> None:
    def reading(ones: int, eights: int) -> dict[str, float]:
        names = ("decode", "queue", "model")
        return {
            'fastres_batch_images_bucket{le="1.0"}': ones,
            'fastres_batch_images_bucket{le="8.0"}': ones + eights,
            "fastres_batch_images_count": ones + eights,
            "fastres_batch_images_sum": ones + 8 * eights,
            **{f"fastres_{name}_seconds_sum": 0.01 * (ones + eights) for name in names},
            **{f"fastres_{name}_seconds_count": ones + eights for name in names},
        }

    found = figures.between(reading(5, 1), reading(6, 10))
    assert found is not None
    assert (found["batches"], found["mean_batch"], found["batches_up_to"]) == (10, 7.3, {"1.0": 1, "8.0": 9})
    assert found["mean_ms"] == {"decode": 10, "queue": 10, "model": 10}
    assert figures.between({}, {}) is None


def test_names_of_curves_that_end_together_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_yscale("log")
    ends = [(1.0, height, f"curve {height}", "black") for height in (1000.0, 990.0, 1010.0, 10.0, 11.0)]
    axis.set_ylim(1, 10_000)
    axis.plot([end[0] for end in ends], [end[1] for end in ends], "o")
    tables._label(axis, ends)
    canvas.draw()
    boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(lower.y1 <= upper.y0 + 2 for lower, upper in itertools.pairwise(boxes))
    assert [text.get_text() for text in sorted(axis.texts, key=lambda text: text.get_window_extent().y0)] == [
        "curve 10.0", "curve 11.0", "curve 990.0", "curve 1000.0", "curve 1010.0",
    ]  # fmt: skip


def level(what: str, **more: Any) -> dict[str, Any]:
    numbers = random.Random(what)
    found = figures.summary([outcome(n / 10, n / 10, n / 10 + numbers.random() / 10) for n in range(50)], 5.0)
    memory = {"first": 500.0, "most": 600.0, "last": 510.0}
    return {"load": what, **found, "wrong": 1, "batches": None, "memory_mb": memory, "doubts": ["late"], **more}


def rounds() -> list[dict[str, Any]]:
    """Return two rounds, the second with twice the rates."""
    made = []
    for factor in (1, 2):
        server = {
            "one_at_a_time": level("one"),
            "saturated": level("full", images_per_s=50.0 * factor),
            "loads": [level("10 %"), level("200 %")],
        }
        made.append({"offline_images_per_s": 55.0 * factor, "servers": {"fastres": server, "plain": server}})
    return made


def test_rounds_are_joined_by_medians_and_counts_added() -> None:
    found = command.medians(rounds())
    assert found["offline_images_per_s"] == 82.5
    fastres = found["servers"]["fastres"]
    assert fastres["capacity_images_per_s"] == 75
    assert fastres["loads"][1]["requests"] == 100
    assert fastres["loads"][1]["statuses"] == {"200": 100}
    document = {
        "model": "resnet50",
        "environment": {"cpu": "a processor"},
        "same_best_class": figures.agreement({"fastres": {0: 1, 1: 2}, "plain": {0: 1, 1: 3, 2: 5}}, "fastres"),
        **json.loads(json.dumps(found)),
    }
    text = tables.text(document)
    assert "91%" in text
    assert "16 answers with another best class" in text
    assert "the same best class as with fastres: plain 50.0%" in text
    assert "Doubtful: fastres, 10 %: late" in text
    assert tables.drawing(document, "png").startswith(b"\x89PNG")
    assert b"plain p99" in tables.drawing(document, "svg") or b"<svg" in tables.drawing(document, "svg")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(FastresError, match="above 0"):
        command.main(["--out", str(tmp_path), "--seconds", "0"])
    with pytest.raises(FastresError, match="--rounds is 0"):
        command.main(["--out", str(tmp_path), "--rounds", "0"])
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--servers", "apache"])


@pytest.mark.parametrize(("absent", "extra"), [("aiohttp", "serve,bench"), ("skimage", "demo")])
def test_a_missing_package_is_named(tmp_path: Path, absent: str, extra: str) -> None:
    program = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {absent!r} else find(name, *rest)
sys.modules[{absent!r}] = None
from fastres.commands.cli import main
sys.exit(main(["bench", "serve", "--out", {str(tmp_path)!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"not installed ({'scikit-image' if absent == 'skimage' else absent}): {install(extra)}" in ended.stderr


def test_a_server_at_a_url_needs_its_key_also_for_the_metrics(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A whole run against a small server, which wants a key, and whose batches have one image."""
    count = [0]

    def refused(request: Any) -> bool:
        return bool(request.headers.get("X-API-Key") != "secret")

    async def answer(request: Any) -> Any:
        if refused(request):
            return web.json_response({}, status=401)
        count[0] += 1
        return right(len(await request.read()) % 7)

    async def numbers(request: Any) -> Any:
        times = "".join(f"fastres_{name}_seconds_{part} {count[0]}\n" for name in ("decode", "queue", "model")
                        for part in ("count", "sum"))  # fmt: skip
        parts = ("count", "sum", 'bucket{le="1.0"}')
        batches = "".join(f"fastres_batch_images_{part} {count[0]}\n" for part in parts)
        return web.Response(text=f"# HELP of all\n{batches}{times}", status=401 if refused(request) else 200)

    monkeypatch.setattr(command, "DISTINCT", 5)
    out = tmp_path / "out"
    given = ["--out", str(out), "--seconds", "0.5", "--rates", "40", "20"]
    with server(answer, numbers=numbers) as url:
        assert command.main([*given, "--url", f"{url}/", "--api-key", "secret"]) == 0
        found = json.loads((out / "serve.json").read_text())
        with pytest.raises(FastresError, match=r"No request was answered with status 200; .* [\d,]+ 401"):
            command.main(["--out", str(out), "--seconds", "0.2", "--url", url])
    assert found["environment"]["weights"] == "those of the server"
    (measured,) = found["servers"].values()
    assert [level["load"] for level in measured["loads"]] == ["20/s", "40/s"]
    for level in (measured["one_at_a_time"], *measured["loads"]):
        assert list(level["statuses"]) == ["200"]
        assert level["wrong"] == 0
        assert level["batches"]["batches"] == level["requests"] > 0
    assert {path.name for path in out.iterdir()} == {"serve.json", "serve.md", "serve.png", "serve.svg"}


def test_what_other_programs_use_is_what_neither_the_server_nor_this_program_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = "import time\nwhile time.process_time() < {}: pass"
    before = busy_s()
    with subprocess.Popen([sys.executable, "-c", work.format(60)]) as busy:
        try:
            subprocess.run([sys.executable, "-c", work.format(0.5)], check=True)
            used = processor_s(busy.pid)
            assert 0 < used <= busy_s() - before + 0.1
        finally:
            busy.kill()
    assert processor_s(busy.pid) == 0
    monkeypatch.setattr(servers, "busy_s", itertools.count(100, 5).__next__)  # the cores: 5 s
    monkeypatch.setattr(servers, "tree", lambda process: [process])  # earlier tests may have left processes here
    steps = itertools.count()
    monkeypatch.setattr(servers, "processor_s", lambda process: 2.0 * next(steps))  # the server: 2 s
    running = Running("server", "", os.getpid())
    first, second = running._others_s(), running._others_s()
    assert first is not None
    assert second is not None
    assert second - first == pytest.approx(5 - 2, abs=0.2)
    assert Running("at a URL", "")._others_s() is None


def test_a_server_that_does_not_start_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ServerError, match="ended with status 2") as caught,
        servers.started("fastres", "resnet18", "/nothing/here.pth"),
    ):
        pass
    assert "There is no file" in str(caught.value)
