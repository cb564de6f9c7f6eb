"""The answers of a server that are errors: each has a name, a status, and a sentence that says what to do.

They say nothing about the server's files. What a client may cause is a :class:`Refusal`; everything else is logged here
and answered as an internal error.
"""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):
    """An answer with an error: HTTP ``status``, ``kind`` (its name in answers and metrics) and ``message``."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, dict(headers or {})

    def as_json(self) -> dict[str, str]:
        return {"type": self.kind, "message": self.message}


class ProcessDiedError(Exception):
    """The process that worked on an image ended before it answered."""


def no_place(seconds: int) -> Refusal:
    """The queue is full; a place should be free in ``seconds``."""
    return Refusal(
        429,
        "QueueFullError",
        f"The server has as many images as it can answer in good time; try again in {seconds} s.",
        {"Retry-After": str(seconds)},
    )


def too_large(limit: int) -> Refusal:
    return Refusal(
        413, "TooLargeError", f"The request has more than {limit:,} bytes, the most that this server takes; send less."
    )


def too_many_pixels(width: int, height: int, limit: int) -> Refusal:
    return Refusal(
        413,
        "TooLargeError",
        f"The image has {width} × {height} pixels; this server takes at most {limit:,}. Make the image smaller.",
    )


def too_late(seconds: float) -> Refusal:
    return Refusal(504, "TimeoutError", f"There was no result within {seconds:g} s; try again later.")


def too_slow(seconds: float) -> Refusal:
    return Refusal(
        408, "SlowRequestError", f"The request was not complete within {seconds:g} s; send it faster, or less of it."
    )


def shutting_down() -> Refusal:
    return Refusal(503, "NotReadyError", "The server is shutting down; ask another one.", {"Retry-After": "5"})


def not_ready() -> Refusal:
    return Refusal(503, "NotReadyError", "The model is being loaded; try again soon.", {"Retry-After": "2"})


def image_kills() -> Refusal:
    return Refusal(
        422, "WorkerError", "The image ended the process that worked on it, twice; convert it to another format."
    )


def internal() -> Refusal:
    return Refusal(500, "InternalError", "The server failed to answer; its log says why.")
