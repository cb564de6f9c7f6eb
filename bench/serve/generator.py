"""Make a load: send JPEGs to a server and note what becomes of each request. A program of its own.

It is cheap, because it often shares a machine with the server: one event loop, bytes that are ready to be sent, and
answers that are parsed after the last one has arrived.

Open loop: requests are sent at given times, whatever the server does, and latency counts from these times. A server
that stalls therefore does not stop the clock of the requests that it should have got meanwhile. Closed loop: a given
number of clients, each with one request at a time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMED_OUT, BROKEN, UNREADABLE = "timed out", "broken", "unreadable"
_FORM = (
    b'--border\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n',
    b"\r\n--border--\r\n",
)
_LEAD = 0.2  # seconds before the first request of an open loop
_KEEP_S = 3.0  # that an idle connection is kept: less than uvicorn keeps it (5), or requests meet its end


@dataclass(frozen=True)
class Job:
    """What to send. ``times`` are seconds from the start (open loop), or ``clients`` send ``seconds`` long (closed).

    ``folder`` has the JPEGs, which are sent in turn. A request without an answer after ``timeout`` seconds is given up.
    """

    url: str
    folder: str
    times: tuple[float, ...] = ()
    clients: int = 0
    seconds: float = 0.0
    timeout: float = 60.0
    api_key: str | None = None
    first: int = 0  # the photograph to begin with
    form: bool = False  # send each image as the field "image" of a form


@dataclass(frozen=True)
class Outcome:
    """One request: when it was to be sent, was sent, and was answered, in seconds from the start.

    ``status`` is HTTP's, or :data:`TIMED_OUT`, :data:`BROKEN` if the connection broke, or :data:`UNREADABLE` if the
    answer has status 200 but no class. ``best`` is the index of the best class, ``milliseconds`` what the server says
    about its times.
    """

    photo: int
    due: float
    sent: float
    done: float
    status: int | str
    best: int | None = None
    milliseconds: dict[str, float] | None = None

    @property
    def latency_ms(self) -> float:
        """From the time at which the request was to be sent."""
        return 1000 * (self.done - self.due)


def poisson(rate: float, seconds: float, seed: int) -> tuple[float, ...]:
    """Return times between 0 and ``seconds`` at which independent clients would send, on average ``rate`` a second."""
    generator, times, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < seconds:
        times.append(now)
    return tuple(times)


async def run(job: Job) -> tuple[list[Outcome], dict[str, float]]:
    """Send the requests of ``job``; return what became of them, and the time and processor time that it took."""
    import aiohttp

    bodies = [path.read_bytes() for path in sorted(Path(job.folder).glob("*.jpg"))]
    headers = {"Content-Type": "image/jpeg", **({"X-API-Key": job.api_key} if job.api_key else {})}
    if job.form:
        bodies = [_FORM[0] + body + _FORM[1] for body in bodies]
        headers["Content-Type"] = "multipart/form-data; boundary=border"
    loop = asyncio.get_running_loop()
    kept: list[tuple[int, float, float, float, int | str, bytes]] = []
    limits = aiohttp.ClientTimeout(total=job.timeout)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S)
    async with aiohttp.ClientSession(timeout=limits, connector=connector, headers=headers) as session:
        start, used = loop.time() + _LEAD * bool(job.times), time.process_time()

        async def request(number: int, due: float | None) -> None:
            photo = (job.first + number) % len(bodies)
            sent = loop.time() - start
            status: int | str
            content = b""
            try:
                async with session.post(f"{job.url}/classify", data=bodies[photo]) as answer:
                    content, status = await answer.read(), answer.status
            except asyncio.TimeoutError:
                status = TIMED_OUT
            except (aiohttp.ClientError, OSError):
                status = BROKEN
            done = loop.time() - start
            kept.append((photo, sent if due is None else due, sent, done, status, content))

        async def client(number: int) -> None:
            while loop.time() - start < job.seconds:
                await request(number, None)
                number += job.clients

        if job.times:
            tasks = []
            for number, due in enumerate(job.times):
                await asyncio.sleep(max(due - (loop.time() - start), 0))
                tasks.append(asyncio.create_task(request(number, due)))
            await asyncio.gather(*tasks)
        else:
            await asyncio.gather(*map(client, range(job.clients)))
        cost = {"seconds": loop.time() - start, "processor_s": time.process_time() - used}
    return [_parsed(*each) for each in kept], cost


def _parsed(photo: int, due: float, sent: float, done: float, status: int | str, content: bytes) -> Outcome:
    if status != 200:
        return Outcome(photo, due, sent, done, status)
    try:
        answer = json.loads(content)
        best = int(answer["predictions"][0]["index"])
    except (ValueError, LookupError, TypeError):
        return Outcome(photo, due, sent, done, UNREADABLE)
    return Outcome(photo, due, sent, done, status, best, answer.get("milliseconds"))


def main(arguments: Sequence[str]) -> None:
    """Run the job in the JSON file, and write the outcomes to the other one."""
    given, written = map(Path, arguments)
    document: dict[str, Any] = json.loads(given.read_text())
    outcomes, cost = asyncio.run(run(Job(**{**document, "times": tuple(document["times"])})))
    written.write_text(json.dumps({"outcomes": [asdict(each) for each in outcomes], "cost": cost}))


if __name__ == "__main__":
    main(sys.argv[1:])
