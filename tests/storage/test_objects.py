"""fastres.storage.objects: objects read, written and deleted; what is repeated, and what processes share."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from fastres.errors import InputError, MissingDependencyError, StorageError
from fastres.storage import failures, filesystems, objects
from fastres.storage.objects import DeniedObject, MissingObject, Unavailable
from tests.object_store import BUCKET, CUT, DENIED, EXPIRED, RESET, UNAVAILABLE, Faults


def uploads() -> list[Any]:
    found = filesystems.filesystem(f"s3://{BUCKET}").call_s3("list_multipart_uploads", Bucket=BUCKET)
    return list(found.get("Uploads", []))


@pytest.mark.parametrize("place", ["bucket", "memory"])
def test_ranges(place: str, request: pytest.FixtureRequest) -> None:
    top = request.getfixturevalue(place)
    objects.write(f"{top}/a", b"0123456789")
    objects.write(f"{top}/b?c#%20é", b"other")
    a, b, none = (f"{top}/{name}" for name in ("a", "b?c#%20é", "none"))
    found = objects.read_many([(a, 0, 10), (b, 1, 3), (none, 0, 1), (a, 5, 99), (a, 10, 12), (a, 3, 3), (b, 0, 5)])
    assert found[:2] == [b"0123456789", b"th"]
    assert isinstance(found[2], MissingObject)
    assert found[3:] == [b"56789", b"", b"", b"other"]
    assert objects.read_many([]) == []
    assert objects.read(a, 2, 4) == b"23"
    assert io.BufferedReader(objects.open_input(a)).read() == b"0123456789"
    with pytest.raises(MissingObject, match="does not exist"):
        objects.open_input(none)
    assert (objects.info(none), objects.info(top), objects.info(f"{top}/")) == (None, None, None)


@pytest.mark.parametrize("place", ["bucket", "memory"])
def test_an_output_appears_when_it_is_complete(
    place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PART", 5 << 20)  # the least that S3 takes
    top = request.getfixturevalue(place)
    part = os.urandom(objects.PART // 3)
    for name, parts in (("empty", []), ("small", [b"x" * 10]), ("large", [part] * 7)):
        with objects.open_output(f"{top}/{name}") as file:
            for each in parts:
                file.write(each)
            assert file.tell() == sum(map(len, parts))
            assert objects.info(f"{top}/{name}") is None
        whole = b"".join(parts)
        assert objects.read(f"{top}/{name}", 0, len(whole)) == whole
        assert objects.info(f"{top}/{name}").size == len(whole)  # type: ignore[union-attr]
    for name in ("new", "small"):
        with suppress(KeyError), objects.open_output(f"{top}/{name}") as file:
            file.write(part * 7)
            raise KeyError
    assert objects.names(top) == ["empty", "large", "small"]
    assert objects.read(f"{top}/small", 0, 10) == b"x" * 10
    if place == "bucket":
        assert uploads() == []


def test_delete(bucket: str) -> None:
    urls = [f"{bucket}/x/{number}" for number in range(20)]
    for url in urls:
        objects.write(url, b"x")
    objects.delete([*urls[1:], f"{bucket}/none"])
    assert objects.names(f"{bucket}/x") == ["0"]
    assert objects.names(f"{bucket}/none") == []


# Each does something with the object ``a``, and returns what it must.
DONE: dict[str, Callable[[str], Any]] = {
    "read": lambda top: objects.read(f"{top}/a", 0, 9),
    "read_many": lambda top: objects.read_many([(f"{top}/a", 0, 9), (f"{top}/b", 0, 9)]),
    "listed": lambda top: [each.url for each in objects.listed(top)],
    "names": objects.names,
    "info": lambda top: objects.info(f"{top}/a"),
    "write": lambda top: objects.write(f"{top}/a", b"012345678"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in DONE for kind in (UNAVAILABLE, RESET)),
        *((name, CUT) for name in ("read", "read_many", "listed", "names")),  # the others get no content
    ],
)
def test_what_fails_for_a_moment_is_repeated(name: str, kind: str, bucket: str, faults: Faults) -> None:
    for each in ("a", "b"):
        objects.write(f"{bucket}/{each}", b"012345678")
    expected = DONE[name](bucket)
    method = {"info": "HEAD", "write": "PUT"}.get(name, "GET")
    faults.log.clear()
    faults.first(failures.TRIES - 1, kind, method)
    assert DONE[name](bucket) == expected
    again = len(faults.log)
    faults.log.clear()
    faults.fault = lambda method, path: None
    DONE[name](bucket)
    assert again > len(faults.log)


@pytest.mark.parametrize("kind", [UNAVAILABLE, RESET, CUT])
def test_what_fails_for_long_is_a_named_error(kind: str, bucket: str, faults: Faults) -> None:
    objects.write(f"{bucket}/a", b"012345678")
    faults.log.clear()
    faults.fault = lambda method, path: kind
    with pytest.raises(Unavailable, match=rf"'{bucket}/a' cannot be read: .* It was tried 3 times; check the network"):
        objects.read(f"{bucket}/a", 0, 9)
    assert len(faults.log) in (failures.TRIES, 2 * failures.TRIES)  # aiohttp repeats what a kept connection breaks
    with pytest.raises(Unavailable, match=rf"'{bucket}/' cannot be listed: .* tried 3 times"):
        list(objects.listed(bucket))
    (found,) = objects.read_many([(f"{bucket}/a", 0, 9)])
    assert isinstance(pickle.loads(pickle.dumps(found)), Unavailable)


def test_an_upload_survives_failures_of_a_moment(bucket: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART", 5 << 20)  # the least that S3 takes
    part = os.urandom(objects.PART)
    monkeypatch.setattr(filesystems, "TRIES", 2)
    faults.first(1, UNAVAILABLE, "PUT")
    with objects.open_output(f"{bucket}/x") as file:
        file.write(part)
        file.write(part)
    assert objects.read(f"{bucket}/x", 0, 2 * len(part)) == part * 2
    faults.fault = lambda method, path: UNAVAILABLE if method == "PUT" else None
    with pytest.raises(Unavailable, match="cannot be written"), objects.open_output(f"{bucket}/y") as file:
        file.write(part * 2)
    faults.fault = lambda method, path: None
    assert objects.names(bucket) == ["x"]
    assert uploads() == []


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (DENIED, DeniedObject, "access is denied. It needs the permission s3:GetObject. .*AWS_PROFILE"),
        (EXPIRED, StorageError, "for lack of valid credentials: .*AWS_ACCESS_KEY_ID"),
    ],
)
def test_refusals_are_not_repeated(
    kind: str, error: type[StorageError], message: str, bucket: str, faults: Faults
) -> None:
    objects.write(f"{bucket}/a", b"012345678")
    faults.log.clear()
    faults.fault = lambda method, path: kind
    with pytest.raises(error, match=message) as caught:
        objects.read(f"{bucket}/a", 0, 9)
    assert type(caught.value) is error
    with pytest.raises(StorageError, match=message.replace("s3:GetObject", "s3:ListBucket")):
        list(objects.listed(bucket))
    assert len(faults.log) == 2


def test_a_missing_bucket(bucket: str) -> None:
    for call in (
        lambda: list(objects.listed("s3://nowhere/x")),
        lambda: objects.names("s3://nowhere"),
        lambda: objects.read("s3://nowhere/x", 0, 1),
        lambda: objects.write("s3://nowhere/x", b""),
    ):
        with pytest.raises(StorageError, match=r"the bucket 'nowhere' does not exist; .*AWS_ENDPOINT_URL") as caught:
            call()
        assert type(caught.value) is StorageError


def test_credentials_and_endpoints(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    url = "s3://bucket/a"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"Could not connect .*tried 3 times; .*AWS_ENDPOINT_URL or FSSPEC_S3_ENDP"):
        objects.info(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "here")
    with pytest.raises(StorageError, match=r"Invalid endpoint: here\. Check .*AWS_ENDPOINT_URL"):
        objects.info(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"profile \(nobody\) could not be found. Credentials are found"):
        objects.info(url)
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match=r"Unable to locate credentials\. Credentials are found"):
        objects.info(url)


def test_a_server_that_never_answers(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "PAUSE", 0.0)
    monkeypatch.setattr(filesystems, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"Read timeout .* It was tried 3 times"):
            objects.info("s3://bucket/a")
        (found,) = objects.read_many([("s3://bucket/a", 0, 1)])
        assert isinstance(found, Unavailable)


def test_the_endpoint_of_fsspec(bucket: str, s3_server: str) -> None:
    objects.write(f"{bucket}/a", b"x")
    variables = {name: value for name, value in os.environ.items() if name != "AWS_ENDPOINT_URL"}
    code = f"from fastres.storage import objects; print(objects.names({bucket!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**variables, "FSSPEC_S3_ENDPOINT_URL": s3_server},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "['a']\n", done.stderr


def test_protocols_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"unknown protocol 's4'. Did you mean 's3'"):
        objects.info("s4://bucket/a")
    for protocol, advice in (("s3", r"pip install .*\[s3\]'"), ("gs", r"pip install .*\[gcs\]'")):
        with monkeypatch.context() as changes:
            changes.setattr("fsspec.get_filesystem_class", lambda name: (_ for _ in ()).throw(ImportError("none")))
            with pytest.raises(MissingDependencyError, match=advice):
                objects.info(f"{protocol}://bucket/a")
    with monkeypatch.context() as changes:
        changes.setitem(sys.modules, "adlfs", None)
        with pytest.raises(MissingDependencyError, match="Install adlfs"):
            objects.info("az://bucket/a")


def test_a_forked_process_opens_its_own(bucket: str) -> None:
    objects.write(f"{bucket}/a", b"0123")
    before = filesystems.filesystem(bucket)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        queue.put((objects.read(f"{bucket}/a", 1, 3), filesystems.filesystem(bucket) is before))

    process = context.Process(target=child)
    process.start()
    assert queue.get(timeout=30) == (b"12", False)
    process.join(30)
    assert process.exitcode == 0
    assert objects.read(f"{bucket}/a", 0, 1) == b"0"
    assert filesystems.filesystem(bucket) is before
