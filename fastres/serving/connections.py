"""HTTP connections with limits that uvicorn does not have: on the size of a request's head, on the time for it, and on
the requests that wait behind another one. Every error is JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .failures import Refusal
from .settings import HEADER_SECONDS, HEADERS

_BEHIND = 32  # requests that wait on one connection for the answer to another one
_OF_BODIES = {b"content-length", b"transfer-encoding"}


class Connection(HttpToolsProtocol):
    """A connection that is closed if a request's head is too long, comes too slowly, or is no HTTP.

    An error never takes the place of the answer to an earlier request: the connection then ends after that answer.
    ``note`` is called with each refusal, and whether the application knows the request.
    """

    def __init__(self, *arguments: Any, note: Callable[[Refusal, bool], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._note = note
        self._clock: asyncio.TimerHandle | None = None  # runs while a head is awaited, or the rest of a refused body
        self._head = 0  # the bytes of the head so far
        self._no_body = 0  # the bytes since the last ones that belonged to a body: a chunk's size, trailers
        self._in_body = self._refused = False
        self._answering: Any = None  # the request that is being answered; others may have arrived behind it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)
        # uvicorn tells only the last request of a connection, and uvloop raises if another one is answered.
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._clock is None and (self.cycle is None or self.cycle.response_complete):
            self._start_clock()
        if self._in_body:
            self._no_body += len(data)
        else:
            self._head += len(data)
        super().data_received(data)
        if (self._no_body if self._in_body else self._head) > HEADERS:
            self._refuse_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # what follows a body in chunks must not change the headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        self._stop_clock()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEADERS:
            self._refuse_head()
        elif len(self.pipeline) >= _BEHIND:
            self._refuse(Refusal(429, "QueueFullError", "Too many requests wait on this connection."))
        elif len(self.connections) >= (self.limit_concurrency or math.inf):
            self._refuse(Refusal(503, "NotReadyError", "The server has too many connections.", {"Retry-After": "1"}))
        elif self.parser.should_upgrade() and {name for name, _ in self.headers} & _OF_BODIES:  # it would get lost
            self._refuse(Refusal(400, "HttpError", "The server speaks HTTP/1.1 only; send no Upgrade with a body."))
        else:
            super().on_headers_complete()
            self._in_body, self._no_body = True, 0

    def on_body(self, body: bytes) -> None:
        self._no_body = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._head, self._no_body = False, 0, 0
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:  # uvicorn would read further requests before these are answered
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, "HttpError", "The request is no valid HTTP/1.1."))

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(HEADER_SECONDS, self._refuse_slow)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _refuse_head(self) -> None:
        self._refuse(Refusal(431, "HeaderError", f"The head of the request has more than {HEADERS:,} bytes."))

    def _refuse_slow(self) -> None:
        if self._head and not self._in_body:
            self._refuse(Refusal(408, "SlowRequestError", f"The head was not complete in {HEADER_SECONDS:g} s."))
        else:  # nothing came, or the request has its answer already
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer without the application, after the answers to earlier requests, and close the connection."""
        self._stop_clock()
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._note(refusal, self._in_body)
        earlier: Any = self.cycle
        if self._in_body and self.pipeline:  # the last of those that wait
            self.pipeline.popleft()
            earlier = self.pipeline[0][0] if self.pipeline else self._answering
        elif self._in_body:
            earlier = None
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if earlier is not None and not earlier.response_complete:
            earlier.keep_alive = False  # uvicorn closes the connection after its answer
            return
        if not self._in_body or not self.cycle.response_started:
            self.transport.write(_answer(refusal))
        self.transport.close()


def _answer(refusal: Refusal) -> bytes:
    body = json.dumps({"error": refusal.as_json()}).encode()
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), "x-content-type-options": "nosniff",
        **refusal.headers, "connection": "close",
    }  # fmt: skip
    lines = [f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
