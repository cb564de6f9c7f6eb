"""The settings of a server, and their errors."""

from __future__ import annotations

from typing import Any

import pytest

import fastres
from fastres.errors import DeviceError, InputError
from fastres.serving.failures import Refusal
from fastres.serving.reading import Reader
from fastres.serving.settings import Settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"port": -1}, "port is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_queue": True}, "max_queue is True"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"max_pixels": 2.5}, "max_pixels is 2.5"),
        ({"max_wait_ms": -1}, "max_wait_ms is -1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": "soon"}, "timeout is 'soon'"),
        ({"decoder": "quick"}, "decoder is 'quick'"),
        ({"api_key": ""}, "api_key is empty"),
        ({"api_key": "a\nb"}, "printable"),
        ({"api_key": "schlüssel"}, "printable ASCII"),  # clients encode it differently
        ({"api_key": " key"}, "without spaces"),  # a header's value has none around it
        ({"allow_urls": ("http://example.com",)}, "allow_urls has 'http://example.com'"),
        ({"cors_origins": ("example.com",)}, "cors_origins has 'example.com'"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings(**options)


def test_urls_of_allowed_hosts_are_known_however_they_are_written() -> None:
    reader = Reader(Settings(allow_urls=("[::1]", "[::2]:8080", "xn--bcher-kva.example", "a.example:81")), 1)
    for url in ("http://[::1]/a", "http://[::2]:8080/", "http://bücher.example/", "HTTPS://A.Example:81/"):
        assert str(reader._checked(url)).startswith("http")
    for url in (
        "http://[::1]:8080/",
        "http://[::2]/",
        "http://a.example/",
        "http:///a",
        "ftp://[::1]/",
        "http://u@[::1]/",
    ):
        with pytest.raises(Refusal) as caught:
            reader._checked(url)
        assert caught.value.kind == "UrlError"


def test_a_cpu_has_smaller_batches_and_queues_than_a_gpu() -> None:
    settings = Settings(allow_urls=("Images.Example.com", "[::1]:80", "10.0.0.1:8080"))
    assert settings.allow_urls[0] == "images.example.com"
    assert settings.batch_for("cpu") < settings.batch_for("cuda:0")
    assert settings.queue_for("cuda:0", 2) == 2 * settings.queue_for("cuda:0", 1)
    assert Settings(max_batch=3).batch_for("cuda:0") == 3
    assert Settings(max_queue=5).queue_for("cpu", 1) == 5


@pytest.mark.parametrize(("device", "said"), [("tpu", "'tpu'"), ("mps", "mps|MPS"), ("cuda:99", "CUDA|ordinal")])
def test_devices_that_are_not_there_are_named(device: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        fastres.serve("resnet20_digits", device=device)
