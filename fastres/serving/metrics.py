"""What a server tells Prometheus (``/metrics``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .failures import Refusal

OTHER = "other"  # the path of requests for what the server does not have
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one server. Times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, help_text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"fastres_{name}", help_text, registry=self.registry, buckets=buckets)

        self.requests = Counter(
            "fastres_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.errors = Counter("fastres_errors", "Errors by name", ["type"], registry=self.registry)
        self.request_seconds = histogram("request_seconds", "From the headers of a request to its answer")
        self.decode_seconds = histogram("decode_seconds", "Decoding of an image")
        self.queue_seconds = histogram("queue_seconds", "Waiting of a decoded image for the model")
        self.model_seconds = histogram("model_seconds", "Computing of a batch")
        self.batch_images = histogram("batch_images", "Images in a batch", _IMAGES)
        self.images = Counter("fastres_images", "Images that were answered", registry=self.registry)

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is that of the function ``value``."""
        Gauge(f"fastres_{name}", help_text, registry=self.registry).set_function(value)

    def batch(self, count: int, waited: Sequence[float], seconds: float) -> None:
        """Note a computed batch."""
        self.batch_images.observe(count)
        self.model_seconds.observe(seconds)
        for wait in waited:
            self.queue_seconds.observe(wait)

    def connection(self, refusal: Refusal, counted: bool) -> None:
        """Note a request that was refused before the application got it, or, if it is ``counted``, while it did."""
        self.errors.labels(refusal.kind).inc()
        if not counted:
            self.requests.labels(OTHER, str(refusal.status)).inc()

    def text(self) -> bytes:
        """Return the state in Prometheus's text format."""
        return generate_latest(self.registry)
