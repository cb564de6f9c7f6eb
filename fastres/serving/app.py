"""The HTTP interface of a server: its paths, their errors, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Query
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastres.images.transforms import Transforms
from fastres.version import __version__

from . import answers
from .decoding import ACCEPTED, FORMATS
from .engine import Engine, Result
from .failures import Refusal, internal, not_ready, shutting_down, too_late
from .metrics import OTHER, Metrics
from .models import Models
from .reading import File, Reader
from .settings import Settings

Value = TypeVar("Value")

_LEFT = 499  # the status that is noted if the client left before the answer
_PAGE = {"": "index.html", "page.css": "page.css", "page.js": "page.js"}
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_log = logging.getLogger("fastres.serving")


@dataclass(frozen=True)
class Served:
    """What a server knows about its model. ``identity`` has the fields of :class:`fastres.serving.answers.Identity`."""

    identity: Mapping[str, Any]
    labels: tuple[str, ...]
    transforms: Transforms
    stride: int


class Service:
    """The paths of a server, as methods, and what they share."""

    def __init__(
        self, served: Served, settings: Settings, engine: Engine, models: Models, metrics: Metrics, most_images: int
    ) -> None:
        self.served, self.settings, self.engine, self.models = served, settings, engine, models
        self.metrics, self.most_images = metrics, most_images
        self.reader = Reader(settings, most_images)
        self.started = False  # it has been ready once; requests then wait for processes that are replaced
        self.ready = self.draining = False
        self.failure: str | None = None  # why the server ends by itself
        metrics.gauge("images_in_flight", "Images that are being answered", lambda: engine.places.taken)
        metrics.gauge("images_limit", "Images that may be answered at a time", lambda: engine.places.count)
        metrics.gauge("decoder_deaths", "Decoders that died and were replaced", lambda: engine.decoders.deaths)
        metrics.gauge("ready", "1 if the server can answer", lambda: float(self.ready))

    async def classify(self, request: Request, top_k: int = Query(5, ge=1)) -> Response:
        """Return the best classes of the image in the body, or of each image of a form or at URLs."""
        self._require_classes()
        return await self._answer(request, lambda result: answers.classified(result, self.served.labels, top_k))

    async def embed(self, request: Request) -> Response:
        """Return the pooled features of the image in the body, or of each image of a form or at URLs."""
        return await self._answer(request, answers.embedded)

    async def look(self, request: Request, top_k: int = Query(5, ge=1, le=10)) -> Response:
        """Return the best classes of the image in the body, each with its class-activation map."""
        self._require_classes()
        served, count = self.served, min(top_k, len(self.served.labels))
        return await self._answer(
            request, lambda result: answers.looked(result, served.labels, served.transforms, served.stride), count
        )

    async def info(self) -> Response:
        """Return the model, and what the server takes."""
        limits = {
            "bytes": self.settings.max_bytes, "pixels": self.settings.max_pixels, "images": self.most_images,
        }  # fmt: skip
        return _json(
            {
                "model": dict(self.served.identity),
                "classes": len(self.served.labels),
                "image_size": self.served.transforms.crop,
                "limits": limits,
                "formats": ["JPEG", "PNG", "WebP"],
                "api_key": self.settings.api_key is not None,
            }
        )

    async def health(self) -> Response:
        """Return 200 as long as the server works."""
        return _json({"status": "ok"})

    async def is_ready(self) -> Response:
        """Return 200 if the server can answer requests at once, 503 while it starts and while it shuts down."""
        self._require_open()
        if not self.ready:
            raise not_ready()
        return _json({"status": "ready"})

    async def numbers(self, request: Request) -> Response:
        """Return counters and histograms for Prometheus."""
        self._require_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answer(self, request: Request, shown: Callable[[Result], dict[str, Any]], maps: int = 0) -> Response:
        deadline = time.monotonic() + self.settings.timeout
        self._require_key(request)
        self._require_open()
        self.engine.refuse_if_full()
        async with self.reader.files(request, deadline) as (found, several):
            good = [file.content for file in found if isinstance(file.content, bytes)]
            left = deadline - time.monotonic()
            computed = iter(await _unless_left(request, self.engine.answers(good, maps), left, self.settings.timeout))
        results = [next(computed) if isinstance(file.content, bytes) else file.content for file in found]
        identity = dict(self.served.identity)
        if several:
            images = [self._image(file, result, shown) for file, result in zip(found, results, strict=True)]
            return _json({"model": identity, "images": images})
        (result,) = results
        if not isinstance(result, Result):
            raise self._refusal(result)
        return _json({"model": identity, **shown(result)}, headers={"Server-Timing": _timing(result)})

    def _image(
        self, file: File, result: Result | BaseException, shown: Callable[[Result], dict[str, Any]]
    ) -> dict[str, Any]:
        if isinstance(result, Result):
            return {"name": file.name, **shown(result)}
        refusal = self._refusal(result)
        self.metrics.errors.labels(refusal.kind).inc()
        return {"name": file.name, "error": refusal.as_json()}

    def _refusal(self, error: BaseException) -> Refusal:
        if isinstance(error, Refusal):
            return error
        _log.error("An image could not be answered", exc_info=error)
        return internal()

    def _require_open(self) -> None:
        if self.draining:
            raise shutting_down()
        if not self.started:
            raise not_ready()

    def _require_classes(self) -> None:
        if not self.served.labels:
            raise Refusal(404, "ClassifierError", "The model has no classifier; use /embed.")

    def _require_key(self, request: Request) -> None:
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refusal(
                401, "KeyError", "The server wants a key: send it as X-API-Key, or as Authorization: Bearer.",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip


def application(service: Service, background: Callable[[], Awaitable[None]]) -> FastAPI:
    """Return the ASGI application of ``service``. ``background`` runs as long as the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.models.start()
        await service.engine.decoders.start()
        task = asyncio.ensure_future(background())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await service.engine.decoders.close()
            await service.models.close()
            await service.reader.close()

    origins = list(service.settings.cors_origins)
    middleware = [Middleware(_Guard, service=service)]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        )
    app = FastAPI(
        title="fastres", version=__version__, docs_url=None, redoc_url=None, middleware=middleware, lifespan=lifespan,
        redirect_slashes=False,  # it would send clients to whatever host they name
        description=f"Classifies images with {service.served.identity['name']}.",
    )  # fmt: skip
    body = _body_description(bool(service.settings.allow_urls))
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": answers.Refused, "description": text}
        for status, text in {
            400: "No image, or a form that cannot be read", 401: "No valid key", 408: "The request came too slowly",
            413: "Too many bytes, pixels or images", 415: "Not a format that the server takes",
            422: "An image that cannot be decoded", 429: "The queue is full; see Retry-After",
            503: "The server starts, shuts down, or has too many connections", 504: "No result in time",
        }.items()
    }  # fmt: skip

    def post(path: str, endpoint: Callable[..., Any], model: Any) -> None:
        app.post(path, response_model=None, responses={200: {"model": model}, **refused}, openapi_extra=body)(endpoint)

    post("/classify", service.classify, answers.Classified | answers.ClassifiedImages)
    post("/embed", service.embed, answers.Embedded | answers.EmbeddedImages)
    post("/look", service.look, answers.Looked)
    for path, endpoint in (("/info", service.info), ("/health", service.health), ("/ready", service.is_ready)):
        app.get(path, response_model=None)(endpoint)
        app.head(path, include_in_schema=False)(endpoint)  # some load balancers ask so
    app.get("/metrics", response_model=None)(service.numbers)
    for path, name in _PAGE.items():
        app.get(f"/{path}", include_in_schema=False)(_page(name))
    _add_errors(app, service)
    return app


class _Guard:
    """Turns errors into answers, counts requests, and adds the headers that all answers have."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = _LEFT

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            pass
        finally:
            metrics = self._service.metrics
            route = scope.get("route")
            path = getattr(route, "path", OTHER)
            metrics.requests.labels(path, str(status)).inc()
            if scope.get("method") == "POST":
                metrics.request_seconds.observe(time.monotonic() - began)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Have ``app`` answer every error as JSON, with its name."""
    from fastapi.exceptions import RequestValidationError

    def refused(refusal: Refusal) -> Response:
        service.metrics.errors.labels(refusal.kind).inc()
        return _json({"error": refusal.as_json()}, refusal.status, refusal.headers)

    async def of_refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refused(error)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kinds = {404: "NotFoundError", 405: "MethodError"}
        texts = {
            404: "There is nothing at this path; see /openapi.json.",
            405: "This path does not take this method; see /openapi.json.",
        }
        message = texts.get(error.status_code, str(error.detail))
        return refused(Refusal(error.status_code, kinds.get(error.status_code, "HttpError"), message, error.headers))

    async def of_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return refused(Refusal(400, "InputError", f"{first['loc'][-1]}: {first['msg']}."))

    async def of_any(request: Request, error: Exception) -> Response:
        return refused(internal())

    app.add_exception_handler(Refusal, of_refusal)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(Exception, of_any)


async def _unless_left(request: Request, answer: Awaitable[Value], left: float, timeout: float) -> Value:
    """Return what ``answer`` returns. Cancel it if the client leaves (``ClientDisconnect``) or it is late (504)."""
    task = asyncio.current_task()
    assert task is not None
    reason: Exception | None = None
    ended = False

    def cancel(why: Exception) -> None:
        nonlocal reason
        if reason is None and not ended:
            reason = why
            task.cancel()

    late = task.get_loop().call_later(max(left, 0), cancel, too_late(timeout))
    leaving = asyncio.ensure_future(request.receive())
    leaving.add_done_callback(lambda _: cancel(ClientDisconnect()))
    try:
        return await answer  # in this task: another one would cost two rounds of the event loop
    except asyncio.CancelledError:
        if reason is None or (sys.version_info >= (3, 11) and task.uncancel() > 0):
            raise  # others have cancelled the task
        raise reason from None
    finally:
        ended = True
        late.cancel()
        leaving.cancel()


def _page(name: str) -> Callable[[], Awaitable[Response]]:
    content = (files("fastres.serving") / "page" / name).read_bytes()
    media_type = _TYPES[name.rpartition(".")[2]]

    async def page() -> Response:
        return Response(content, media_type=media_type, headers={**_SECURITY, "Cache-Control": "no-cache"})

    return page


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")


def _timing(result: Result) -> str:
    return ", ".join(f"{name};dur={value:.3f}" for name, value in result.milliseconds.items())


def _body_description(urls: bool) -> dict[str, Any]:
    """Return what a request's body may be, for the OpenAPI document."""
    binary = {"type": "string", "format": "binary"}
    content: dict[str, Any] = {f"image/{name.lower()}": {"schema": binary} for name in FORMATS}
    content["application/octet-stream"] = {"schema": {**binary, "description": f"a {ACCEPTED} file"}}
    parts = {"type": "object", "properties": {"image": {"type": "array", "items": binary}}}
    content["multipart/form-data"] = {"schema": parts}
    if urls:
        listed = {"type": "array", "items": {"type": "string", "format": "uri"}}
        schema = {"type": "object", "properties": {"urls": listed}, "required": ["urls"]}
        content["application/json"] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}
