"""The settings of a server, checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fastres.arguments import whole_number
from fastres.classification.requests import GPU_BATCH
from fastres.errors import InputError
from fastres.images.jpeg import FAST, check_decoder

CPU_BATCH = 8  # fewer than fastres classify: as fast, and the next batch begins sooner
QUEUE_BATCHES = 8  # full batches of one model that may wait
HEADERS = 32 << 10  # bytes of a request's head
HEADER_SECONDS = 10.0  # to send it
HELD_REQUESTS = 16  # of the largest size: what all requests together may hold in memory
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[0-9]+)?")


@dataclass(frozen=True)
class Settings:
    """See :func:`fastres.serving.serve` for the meaning. Raises ``InputError``."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int | None = None
    decoder: str = FAST
    max_batch: int | None = None
    max_wait_ms: float = 0.0
    max_queue: int | None = None
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    timeout: float = 30.0
    api_key: str | None = None
    allow_urls: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "port": whole_number(self.port, "port", 0),
            "max_bytes": whole_number(self.max_bytes, "max_bytes"),
            "max_pixels": whole_number(self.max_pixels, "max_pixels"),
            "max_wait_ms": _number(self.max_wait_ms, "max_wait_ms", zero=True),
            "timeout": _number(self.timeout, "timeout"),
            "allow_urls": tuple(host.lower() for host in self.allow_urls),
            "cors_origins": tuple(self.cors_origins),
        }
        for name in ("workers", "max_batch", "max_queue"):
            if getattr(self, name) is not None:
                checked[name] = whole_number(getattr(self, name), name)
        check_decoder(self.decoder)
        if checked["port"] > 65535:
            raise InputError(f"port is {self.port}; give a number from 0 (any free port) to 65535")
        if self.api_key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", self.api_key):
            raise InputError(
                "api_key is empty or has characters that a header cannot have; give printable ASCII, without spaces "
                "around it"
            )
        for host in checked["allow_urls"]:
            if not _HOST.fullmatch(host):
                raise InputError(f"allow_urls has {host!r}; give hosts, such as images.example.com or 10.0.0.1:8080")
        for origin in checked["cors_origins"]:
            if not re.fullmatch(r"https?://[^/\s]+|\*", origin):
                raise InputError(f"cors_origins has {origin!r}; give origins, such as https://www.example.com, or *")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def batch_for(self, device: str) -> int:
        """Return the largest batch on ``device``."""
        return self.max_batch or (CPU_BATCH if device == "cpu" else GPU_BATCH)

    def queue_for(self, device: str, models: int) -> int:
        """Return how many images may be in the server at a time."""
        return self.max_queue or QUEUE_BATCHES * self.batch_for(device) * models


def _number(value: Any, name: str, zero: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number < math.inf) or (not number and not zero):
        raise InputError(f"{name} is {value!r}; give a number {'of at least' if zero else 'above'} 0")
    return number
