"""What a server answers: the values of the model, for each form of a request, and named errors."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres.look.cam import class_activation_maps
from tests.serving.conftest import Server, encoded, form, serving


def predictions(model: fastres.Model, image: Any, top_k: int = 5) -> list[dict[str, Any]]:
    found = model.predict(image, top_k)
    return [{"label": each.label, "index": each.index, "score": pytest.approx(each.score, abs=1e-5)} for each in found]


def turned(photo: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo, exif=exif)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "grey", "CMYK", "progressive", "palette", "alpha", "16 bit", "turned", "thin"]
)
def test_every_kind_of_image_gets_the_models_answer(
    kind: str, server: Server, model: fastres.Model, photo: Image.Image
) -> None:
    content = {
        "JPEG": lambda: encoded(photo),
        "PNG": lambda: encoded(photo, "PNG"),
        "WEBP": lambda: encoded(photo, "WEBP", quality=80),
        "grey": lambda: encoded(photo.convert("L")),
        "CMYK": lambda: encoded(photo.convert("CMYK")),
        "progressive": lambda: encoded(photo, progressive=True),
        "palette": lambda: encoded(photo.convert("P"), "PNG"),
        "alpha": lambda: encoded(photo.convert("RGBA"), "PNG"),
        "16 bit": lambda: encoded(Image.fromarray(np.asarray(photo.convert("L")).astype("uint16") * 257), "PNG"),
        "turned": lambda: turned(photo, 6),
        "thin": lambda: encoded(photo.resize((1000, 3)), "PNG"),
    }[kind]()
    status, answer, headers = server.post("/classify", content)
    assert status == 200
    assert answer["predictions"] == predictions(model, content)
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["server-timing"].startswith("decode;dur=")


def test_the_model_is_named_in_every_answer(server: Server, photo: Image.Image) -> None:
    _, answer, _ = server.post("/classify?top_k=1", encoded(photo))
    _, info, _ = server.ask("GET", "/info")
    assert len(answer["predictions"]) == 1
    assert answer["model"] == info["model"]
    assert answer["model"]["name"] == "resnet20_digits"
    assert (answer["model"]["dtype"], answer["model"]["device"]) == ("float32", "cpu")
    assert len(answer["model"]["sha256"]) == 64
    assert (info["classes"], info["limits"]["bytes"]) == (10, 2_000_000)


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_the_body_counts_whatever_its_type_is_called(content_type: str, server: Server, photo: Image.Image) -> None:
    assert server.post("/classify", encoded(photo), content_type=content_type)[0] == 200


def test_a_body_in_chunks_is_read(server: Server, photo: Image.Image) -> None:
    content = encoded(photo)
    chunks = (content[start : start + 1000] for start in range(0, len(content), 1000))
    assert server.ask("POST", "/classify", chunks)[0] == 200  # http.client sends an iterator in chunks


def test_the_files_of_a_form_are_answered_one_by_one(server: Server, model: fastres.Model, photo: Image.Image) -> None:
    good, other = encoded(photo), encoded(photo.transpose(Image.Transpose.ROTATE_90), "PNG")
    body, content_type = form({"a.jpg": good, "b.txt": b"no image", "c.png": other, "d.jpg": good[:-5000]})
    status, answer, _ = server.post("/classify?top_k=3", body, content_type=content_type)
    assert status == 200
    images = answer["images"]
    assert [image["name"] for image in images] == ["a.jpg", "b.txt", "c.png", "d.jpg"]
    assert images[0]["predictions"] == predictions(model, good, 3)
    assert images[2]["predictions"] == predictions(model, other, 3)
    assert [image.get("error", {}).get("type") for image in images] == [None, "FormatError", None, "ImageError"]


def test_embeddings_are_those_of_the_model(server: Server, model: fastres.Model, photo: Image.Image) -> None:
    content = encoded(photo)
    expected = model.embed(model.transforms.batch(content))[0]
    status, answer, _ = server.post("/embed", content)
    assert status == 200
    torch.testing.assert_close(torch.tensor(answer["embedding"]), expected, rtol=1e-4, atol=1e-5)
    body, content_type = form({"a.jpg": content})
    _, several, _ = server.post("/embed", body, content_type=content_type)
    assert several["images"][0]["embedding"] == pytest.approx(answer["embedding"], abs=1e-5)


def test_look_gives_the_maps_of_the_best_classes(server: Server, model: fastres.Model, photo: Image.Image) -> None:
    content = turned(photo, 8)
    status, answer, _ = server.post("/look?top_k=3", content)
    assert status == 200
    assert (answer["width"], answer["height"]) == (photo.height, photo.width)
    assert answer["box"] == pytest.approx(model.transforms.crop_box(photo.width, photo.height))
    assert (answer["crop"], answer["stride"]) == (model.transforms.crop, 4)
    classes = [each["index"] for each in answer["predictions"]]
    expected = class_activation_maps(model, model.transforms.batch(content), classes)[0]
    maps = torch.tensor([each["map"] for each in answer["predictions"]])
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "kind"),
    [
        ("/classify", b"", {}, 400, "ImageError"),
        ("/classify", b"GIF89a" + bytes(50), {}, 415, "FormatError"),
        ("/classify", bytes(2_000_001), {}, 413, "TooLargeError"),
        ("/classify?top_k=0", b"x", {}, 400, "InputError"),
        ("/classify?top_k=many", b"x", {}, 400, "InputError"),
        ("/look?top_k=11", b"x", {}, 400, "InputError"),
        ("/classify", b"x", {"Content-Encoding": "gzip"}, 415, "FormatError"),
        ("/classify", b"x", {"Content-Type": "multipart/form-data"}, 400, "FormError"),
        ("/classify", b"x", {"Content-Type": "multipart/form-data; boundary=b"}, 400, "FormError"),
        ("/classify", b'{"urls": ["http://127.0.0.1/"]}', {"Content-Type": "application/json"}, 403, "UrlError"),
        ("/nothing", b"x", {}, 404, "NotFoundError"),
        ("/../../etc/passwd", b"x", {}, 404, "NotFoundError"),
        ("/health", b"x", {}, 405, "MethodError"),
    ],
)
def test_errors_have_names(
    path: str, body: bytes, headers: dict[str, str], status: int, kind: str, server: Server
) -> None:
    found, answer, _ = server.ask("POST", path, body, headers)
    assert (found, answer["error"]["type"]) == (status, kind)
    assert answer["error"]["message"].endswith((".", "!"))


def test_pixels_are_limited_before_they_are_decoded(server: Server, photo: Image.Image) -> None:
    status, answer, _ = server.post("/classify", encoded(Image.new("1", (30000, 30000)), "PNG"))
    assert (status, answer["error"]["type"]) == (413, "TooLargeError")


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css"):
        status, content, headers = server.ask("GET", path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert b"//cdn" not in content
    assert b"page.js" in server.ask("GET", "/")[1]


def test_the_paths_are_described_and_metrics_counted(server: Server, photo: Image.Image) -> None:
    status, described, _ = server.ask("GET", "/openapi.json")
    assert status == 200
    assert {"/classify", "/embed", "/look", "/info", "/health", "/ready", "/metrics"} == set(described["paths"])
    post = described["paths"]["/classify"]["post"]
    assert {"image/jpeg", "multipart/form-data"} <= set(post["requestBody"]["content"])
    assert {"200", "413", "415", "422", "429", "503", "504"} <= set(post["responses"])
    before = server.number("fastres_images_total"), server.number("fastres_batch_images_sum")
    assert server.post("/classify", encoded(photo))[0] == 200
    assert server.number("fastres_images_total") == before[0] + 1
    assert server.number("fastres_batch_images_sum") == before[1] + 1
    for path in ("/health", "/ready"):
        assert server.ask("GET", path)[0] == server.ask("HEAD", path)[0] == 200
    assert "access-control-allow-origin" not in server.ask("GET", "/info", headers={"Origin": "https://a.example"})[2]


class _Files(BaseHTTPRequestHandler):
    """Files for a server to fetch."""

    content: bytes

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/photo.jpg")
            self.end_headers()
            return
        content = {"/photo.jpg": self.content, "/large": bytes(3_000_000)}.get(self.path)
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def files(photo: Image.Image) -> Iterator[int]:
    """The port of a server with a photograph."""
    _Files.content = encoded(photo)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_port
        found.shutdown()


def test_keys_urls_and_origins(files: int, model: fastres.Model, photo: Image.Image) -> None:
    options = ["--allow-urls", f"127.0.0.1:{files}", "--cors-origin", "https://a.example", "--max-bytes", "2000000"]
    key = {"X-API-Key": "a key"}
    with serving(*options, "--decoder", "exact", "--workers", "1", FASTRES_API_KEY="a key") as server:
        assert server.ask("GET", "/ready")[0] == server.ask("GET", "/")[0] == 200
        for path, method in (("/classify", "POST"), ("/embed", "POST"), ("/look", "POST"), ("/metrics", "GET")):
            for wrong in ({}, {"X-API-Key": "another"}, {"Authorization": "Basic a key"}):
                status, answer, headers = server.ask(method, path, encoded(photo), wrong)
                assert (status, answer["error"]["type"]) == (401, "KeyError")
                assert headers["www-authenticate"] == "Bearer"
        assert server.ask("POST", "/classify", encoded(photo), {"Authorization": "Bearer a key"})[0] == 200
        answer_headers = server.ask("GET", "/info", headers={"Origin": "https://a.example"})[2]
        assert answer_headers["access-control-allow-origin"] == "https://a.example"

        base = f"http://127.0.0.1:{files}"
        cases = {
            f"{base}/photo.jpg": None,
            f"{base}/redirect": "redirects are not followed",
            f"{base}/missing.jpg": "answered 404",
            f"{base}/large": "at most|the most",
            f"http://localhost:{files}/photo.jpg": "certain hosts only",
            f"http://127.0.0.1:{files + 1}/photo.jpg": "certain hosts only",
            f"http://user@127.0.0.1:{files}/photo.jpg": "certain hosts only",
            f"http://127.0.0.1:{files}@example.com/": "certain hosts only",
            f"http://127.0.0.1:{files}\\@example.com/": "certain hosts only|not valid",
            "file:///etc/passwd": "certain hosts only",
            "//[": "not valid|certain hosts",
        }
        body = json.dumps({"urls": list(cases)})
        status, answer, _ = server.ask("POST", "/classify", body, {**key, "Content-Type": "application/json"})
        assert status == 200
        for (url, said), image in zip(cases.items(), answer["images"], strict=True):
            assert image["name"] == url
            if said is None:
                assert image["predictions"] == predictions(model, _Files.content)
            else:
                assert any(part in image["error"]["message"] for part in said.split("|")), image
        for wrong in (b"{", b"[]", b'{"urls": []}', b'{"urls": [1]}', b"[" * 100_000):
            status, answer, _ = server.ask("POST", "/classify", wrong, {**key, "Content-Type": "application/json"})
            assert (status, answer["error"]["type"]) == (400, "UrlError")
