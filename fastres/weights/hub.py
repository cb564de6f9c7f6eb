"""Hub ids: find a model's commit on Hugging Face's hub, and download the files of it that are needed.

``huggingface_hub`` downloads, and keeps the files in its cache. A name without a commit hash means the newest commit
of a branch or tag, so the hub is asked for it, once for all files. If it cannot be asked, the cached commit is used,
with a :class:`CachedRevisionWarning`. A commit hash whose files are cached needs no request. With ``HF_HUB_OFFLINE=1``
there is no request at all.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastres.errors import DownloadError, MissingDependencyError, WeightsError
from fastres.extras import install
from fastres.terminal import is_terminal, warn
from fastres.version import __version__

from .checkpoints import is_checkpoint_name
from .hub_failures import Failure, endpoint_text, explained, is_missing_file, offline

_HUB_ID = re.compile(
    r"(?:hf[-_]hub:|https://huggingface\.co/)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_OF_FILES = (".onnx", ".pt2", ".pkl", ".h5", ".json", ".jpg", ".jpeg", ".png")  # no model's name ends like that
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"
_BARS = ("huggingface_hub.http_get", "huggingface_hub.xet_get")  # huggingface_hub's names of its progress bars
_AGENT: dict[str, Any] = {"library_name": "fastres", "library_version": __version__}


class CachedRevisionWarning(UserWarning):
    """The hub could not be asked for the newest commit of a model, or for one of its files; the cache was used."""


class UnreachableError(DownloadError):
    """The hub cannot be asked for a file, because there is no network or because it must not be asked."""


@dataclass(frozen=True)
class HubId:
    """A model's repository on the hub, and a branch, tag or commit of it; ``given`` is the text as it was passed."""

    given: str
    repository: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Return the hub id that ``text`` has the form of, such as ``"timm/resnet50.a1_in1k@main"``, or ``None``."""
        match = _HUB_ID.fullmatch(text)
        if match is None or is_checkpoint_name(match["id"]) or match["id"].lower().endswith(_OF_FILES):
            return None
        if ".." in (match["revision"] or ""):  # git does not allow it, and it could lead out of the cache
            return None
        return cls(text, match["id"], match["revision"])

    @property
    def text(self) -> str:
        """The hub id for messages."""
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"There is no folder {self.given}, and the hub id {self.repository!r}{at}"


class Snapshot:
    """One commit of a model on the hub. Its files are downloaded when they are asked for, and kept in the cache.

    ``answers`` is True if the hub has answered, the reason if it cannot be asked, and ``None`` if that is unknown.
    """

    def __init__(self, repository: str, commit: str, answers: Literal[True] | Failure | None) -> None:
        self.repository = repository
        self.commit = commit
        self._answers = answers

    @property
    def source(self) -> str:
        """The hub id with the commit's hash, which names the same files for ever."""
        return f"{self.repository}@{self.commit}"

    def file(self, name: str, progress: bool = False) -> Path | None:
        """Return the path of the file ``name`` in the cache, or ``None`` if the commit has no such file.

        ``progress`` shows a bar on stderr during a download, if that is a terminal. Raises ``UnreachableError`` if the
        file is not cached and the hub cannot be asked, and ``DownloadError`` if it cannot be downloaded.
        """
        from huggingface_hub import hf_hub_download

        known, path = _cached(self.repository, name, self.commit)
        if known:
            return path
        what = f"{name} of {self.source}"
        self._ask(name, what)
        try:
            with _bars(progress):
                return Path(hf_hub_download(self.repository, name, revision=self.commit, **_AGENT))
        except Exception as error:
            if is_missing_file(error):
                return None
            raise DownloadError(explained(error, self.repository, self.commit).text(what)) from None

    def described(self) -> str:
        """Return where the files are looked for, for messages."""
        return f"{self.source} on {endpoint_text()}"

    def _ask(self, name: str, what: str) -> None:
        """Raise ``UnreachableError`` unless the hub answers. Asked once: ``hf_hub_download`` would try for minutes."""
        if self._answers is None:
            try:
                _head(self.repository, name, self.commit)
                self._answers = True
            except Exception as error:
                missing = is_missing_file(error)
                self._answers = True if missing else explained(error, self.repository, self.commit)
        if self._answers is not True:
            raise UnreachableError(self._answers.text(what))


def cached_files(name: HubId, files: Iterable[str]) -> list[Path]:
    """Return those of the ``files`` of a hub id that are in the cache; none without huggingface_hub."""
    try:
        found = [_cached(name.repository, file, name.revision or _MAIN)[1] for file in files]
    except (ImportError, ValueError):  # ValueError: a name that the hub does not allow
        return []
    return [path for path in found if path is not None]


def find_snapshot(name: HubId, config: str) -> Snapshot:
    """Return the commit that ``name`` means. Its file ``config`` is then in the cache.

    Raises ``MissingDependencyError`` without huggingface_hub, ``WeightsError`` for a name that the hub does not allow
    and if the commit has no such file, and ``DownloadError`` for the failures of the hub and of the network.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no folder {name.given}. If it is a hub id, install huggingface_hub: {install('huggingface')}"
        ) from error
    revision = name.revision or _MAIN
    try:
        _, cached = _cached(name.repository, config, revision)
    except ValueError as error:  # the hub's own rules for names
        raise WeightsError(
            f"There is no folder {name.given}, and it is not a valid hub id. Pass the path of a folder that "
            "transformers or timm saved, or a hub id such as 'microsoft/resnet-50'."
        ) from error
    commit = None if cached is None else cached.parent.name
    if constants.HF_HUB_OFFLINE:
        answers = offline(name.repository)
        if commit is None:
            raise DownloadError(answers.text(name.text))
        return Snapshot(name.repository, commit, answers)
    if commit is not None and _COMMIT.fullmatch(revision):
        return Snapshot(name.repository, commit, None)
    return _newest(name, revision, config, commit)


def _newest(name: HubId, revision: str, config: str, cached: str | None) -> Snapshot:
    """Ask the hub for the commit of a branch or tag. ``cached`` is the commit that the cache has for it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit = _head(name.repository, config, revision)
        if commit != cached:  # asked for by the name of the revision, so that the cache notes its commit
            with _bars(False):
                commit = Path(hf_hub_download(name.repository, config, revision=revision, **_AGENT)).parent.name
    except Exception as error:
        if is_missing_file(error):
            raise WeightsError(
                f"{name.repository} on {endpoint_text()} has no {config}, so neither transformers nor timm saved it. "
                "To load a checkpoint file from there, download it, and pass its path as weights=."
            ) from None
        failure = explained(error, name.repository, revision)
        if cached is None or isinstance(error, RevisionNotFoundError):
            raise DownloadError(failure.text(name.text)) from None
        warn(
            f"The newest commit of {name.repository} cannot be had from {endpoint_text()}: {failure.reason}. The "
            f"cached one is used. To load it without asking the hub, name it: {name.repository}@{cached}",
            CachedRevisionWarning,
            stacklevel=7,  # the caller of fastres.load
        )
        return Snapshot(name.repository, cached, failure)
    return Snapshot(name.repository, commit, True)


def _head(repository: str, file: str, revision: str) -> str:
    """Return the hash of the commit to which a revision leads; raises whatever huggingface_hub raises."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import FileMetadataError

    url = hf_hub_url(repository, file, revision=revision)
    commit = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, **_AGENT).commit_hash
    if commit is None:
        raise FileMetadataError("it does not answer as a hub does, with the header X-Repo-Commit")
    return commit


def _cached(repository: str, file: str, revision: str) -> tuple[bool, Path | None]:
    """Return whether the cache knows of a file, and its path, which is ``None`` if it is known that there is none."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    return found is not None, None if found is None or found is _CACHED_NO_EXIST else Path(found)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Within the context, hide huggingface_hub's progress bars unless they are ``shown`` on a terminal.

    If the environment sets ``HF_HUB_DISABLE_PROGRESS_BARS``, huggingface_hub does as it says.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    free = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not (shown and is_terminal(sys.stderr))
    hidden = [bar for bar in _BARS if free and not are_progress_bars_disabled(bar)]
    for bar in hidden:
        disable_progress_bars(bar)
    try:
        yield
    finally:
        for bar in hidden:
            enable_progress_bars(bar)
