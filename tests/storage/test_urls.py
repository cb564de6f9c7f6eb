"""fastres.storage.urls: what is a URL, and what messages show of it."""

from __future__ import annotations

import pytest

from fastres.errors import InputError
from fastres.storage import urls


def test_what_is_a_url() -> None:
    assert [name for name in ("s3://b/x", "GS://b", "hf://datasets/x", "memory://x") if not urls.is_url(name)] == []
    assert [
        name for name in ("photos/a.jpg", "/a/b", "s3:/b/x", "c://x", "", "a b://c", 3, None) if urls.is_url(name)
    ] == []


def test_what_is_nearly_a_url() -> None:
    assert [name for name in ("s3:/b/x", "s3:b", "simplecache::s3://b/x") if not urls.is_mistaken_url(name)] == []
    assert [name for name in ("s3://b/x", "photos/a.jpg", "./s3:/x", "c:/x", "a") if urls.is_mistaken_url(name)] == []


def test_parts() -> None:
    assert urls.protocol_of("S3://Bucket/x") == "s3"
    assert urls.checked("S3://Bucket/X y?z#%20") == "s3://Bucket/X y?z#%20"
    assert urls.bucket_of("s3://bucket/a/b.jpg") == urls.bucket_of("s3://bucket") == "bucket"
    assert urls.joined("s3://bucket/a", "b") == urls.joined("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert urls.last_name("s3://bucket/a/b.jpg") == "b.jpg"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "incomplete"),
        ("gs:///", "incomplete"),
        ("s3:///photos/a.jpg", "has no bucket"),
        ("file:///photos/a.jpg", "pass its path, such as '/photos/a.jpg'"),
        ("sftp://me:secret@host/photos", "has a password"),
    ],
)
def test_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        urls.checked(url)
    assert "secret" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    shown = urls.url_text("https://me:pass%20word@host/a.jpg?size=3&X-Amz-Signature=abcd&sv=1&sig=xyz")
    assert shown == "https://…@host/a.jpg?size=3&X-Amz-Signature=…&sv=1&sig=…"
    assert urls.url_text("s3://bucket/a?b&c=d@e:f") == "s3://bucket/a?b&c=d@e:f"
    assert urls.redacted("see 'https://h/x?token=abc' and more") == "see 'https://h/x?token=…' and more"
