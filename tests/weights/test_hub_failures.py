"""Hub ids without a network, and everything that can go wrong between the hub and the cache."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastres
from fastres.errors import CorruptCheckpointError, DownloadError
from fastres.weights import CachedRevisionWarning

from .hub_server import ID, Files, HubServer, commit_of, complete, use
from .other_libraries import Logits, check_logits

constants = pytest.importorskip("huggingface_hub.constants")
NO_NETWORK = "http://127.0.0.1:9"
WEIGHTS = rf"model\.safetensors of {ID}@\w+"
Away = Callable[[], str]


class TestWithoutANetwork:
    """``away`` makes the hub unreachable: by the setting that forbids requests, or because nobody answers."""

    @pytest.fixture(params=["offline", "refused", "silent", "503", "401"])
    def away(self, request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Away:
        kind = request.param

        def away() -> str:
            if kind == "offline":
                monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            elif kind == "refused":
                use(NO_NETWORK, monkeypatch)
            elif kind == "silent":
                monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
                hub.stall = True
            else:
                hub.fail = lambda path: (int(kind), "RepoNotFound" if kind == "401" else None)
            hub.requests.clear()
            return {
                "offline": "HF_HUB_OFFLINE is set",
                "refused": "Connection refused",
                "silent": "there was no answer in time",
                "503": "the answer was 503",
                "401": r"there is no such model, or it is private \(the answer was 401\)",
            }[kind]

        return away

    def test_the_cached_commit_is_used(self, hub: HubServer, away: Away, small: Logits) -> None:
        fastres.load(ID)
        reason = away()
        if "OFFLINE" in reason:
            model = fastres.load(ID)
            assert hub.requests == []
        else:
            with pytest.warns(CachedRevisionWarning) as warned:
                model = fastres.load(ID)
            assert [warning.filename for warning in warned] == [__file__]
            assert f"name it: {ID}@{commit_of(hub)}" in str(warned[0].message)
        check_logits(small, model, sizes=((64, 64),))
        assert model.weights == f"{ID}@{commit_of(hub)}"

    def test_a_cached_commit_needs_no_hub(self, hub: HubServer, away: Away) -> None:
        pinned = fastres.load(ID).weights
        away()
        assert fastres.load(pinned).weights == pinned
        assert hub.requests == []

    @pytest.mark.parametrize("name", [ID, f"{ID}@v2"])
    def test_what_is_not_cached_is_named_with_advice(self, away: Away, name: str) -> None:
        reason = away()
        for arguments in ((name,), ("resnet18", name)):
            with pytest.raises(
                DownloadError, match=rf"no folder {name}, .* not in the local cache .*: {reason}\. [A-Z]"
            ):
                fastres.load(*arguments)

    @pytest.mark.filterwarnings("ignore::fastres.weights.CachedRevisionWarning")
    def test_weights_that_are_not_cached(self, away: Away) -> None:
        model = fastres.load(ID, weights=None)
        assert model.num_classes == 5
        reason = away()
        with pytest.raises(
            DownloadError, match=rf"model\.safetensors of {ID}@\w+ is not in the local cache .*: {reason}"
        ):
            fastres.load(ID)

    def test_preprocessing_that_is_not_cached_is_missed(self, hub: HubServer, away: Away, tmp_path: Path) -> None:
        pinned = fastres.load(ID).weights
        next((tmp_path / "cache").rglob("preprocessor_config.json")).unlink()
        reason = away()
        with pytest.warns(CachedRevisionWarning, match=rf"it is not used, but ImageNet's .*: {reason}") as warned:
            model = fastres.load(pinned)
        assert [warning.filename for warning in warned] == [__file__]
        assert model.transforms.crop == 224


class TestFailures:
    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (403, "GatedRepo", f"the model is gated. Ask for access at http://127.*/{ID}, and set HF_TOKEN"),
            (403, None, r"access is forbidden \(the answer was 403\)"),
            (404, None, r"there is no such model, or it is private \(the answer was 404\)"),
            (404, "RevisionNotFound", f"it has no revision 'main'. See its branches and tags at http://127.*{ID}"),
            (500, None, "the answer was 500. Load it again later, or set HF_ENDPOINT to a mirror"),
        ],
    )
    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_answers(
        self,
        hub: HubServer,
        status: int,
        code: str | None,
        message: str,
        file: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's attempts
        hub.fail = lambda path: (status, code) if path.endswith(file) and hub.requests[-1][0] == "HEAD" else None
        if file != "config.json":
            message = message.replace("'main'", "'[0-9a-f]{40}'")
        with pytest.raises(DownloadError, match=message) as raised:
            fastres.load(ID)
        assert raised.value.__suppress_context__, "the tracebacks of the libraries below are not shown"

    def test_a_revision_that_is_gone_is_not_taken_from_the_cache(self, hub: HubServer) -> None:
        fastres.load(ID)
        del hub.repositories[ID].revisions["main"]
        with pytest.raises(DownloadError, match="it has no revision 'main'"):
            fastres.load(ID)

    def test_a_server_that_is_no_hub(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HUGGINGFACE_HEADER_X_REPO_COMMIT", "X-Other")
        with pytest.raises(DownloadError, match="it does not answer as a hub does, with the header X-Repo-Commit"):
            fastres.load(ID)

    def test_a_download_that_is_cut_goes_on(
        self, hub: HubServer, small: Logits, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        hub.cuts = 1
        check_logits(small, fastres.load(ID), sizes=((64, 64),))
        assert [method for method, path in hub.requests if "/cdn/" in path] == ["GET", "GET"]

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [("cuts", "the connection was cut"), ("size", "Consistency check failed: file should")],
    )
    def test_a_download_that_stays_incomplete_is_not_kept(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        setattr(hub, fault, 1000)
        with pytest.raises(DownloadError, match=rf"{WEIGHTS} .* from http://127[^ ]+: {reason}") as raised:
            fastres.load(ID)
        assert "\n" not in str(raised.value)
        assert complete(tmp_path / "cache") == {"config.json", "preprocessor_config.json"}
        hub.cuts, hub.size = 0, None
        assert fastres.load(ID).num_classes == 5

    def test_a_damaged_file_of_the_right_size(self, hub: HubServer, files: Files) -> None:
        content = files["model.safetensors"]
        hub.repositories[ID].commit({**files, "model.safetensors": b"\xff" * len(content)})
        with pytest.raises(CorruptCheckpointError):
            fastres.load(ID)

    @pytest.mark.usefixtures("hub")
    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(DownloadError, match=r"file/cache cannot be written \(Not a directory\)\. Free space there"):
            fastres.load(ID)

    @pytest.mark.usefixtures("hub")
    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fastres.load(ID, weights=None)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        with pytest.raises(DownloadError, match=r"cannot be written \(No space left on device\)\. Free space"):
            fastres.load(ID)

    def test_a_server_without_tls(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        use(hub.url.replace("http:", "https:"), monkeypatch)
        with pytest.raises(DownloadError, match=r"from https://127[^ ]+: \[SSL.* Check the network"):
            fastres.load(ID)

    def test_a_password_in_the_address_is_not_shown(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        use(hub.url.replace("http://", "http://me:secret@"), monkeypatch)
        with pytest.raises(DownloadError) as raised:
            fastres.load("someone/other")
        assert "secret" not in str(raised.value)
