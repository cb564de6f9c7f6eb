"""Where the processes of a run in shards meet: the work folder beside the output, on a file system that all share.

No lock is needed. Every file is complete when it gets its name, and a name with a checksum always means the same
content. So it does no harm if two processes write the same file.
"""

from __future__ import annotations

import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from fastres.errors import FastresError, OutputError
from fastres.files import other_kind, read_regular, refuse_inputs
from fastres.storage.urls import is_url

from .folder import LOCK, MANIFEST, OUTPUT, SIDECAR, TEMPORARY, clear, is_alone, remove, shared, sidecar_document
from .formats import check_output_name
from .work import sync_folder, work_folder


class Place(ABC):
    """The output of a run in shards, its work folder, and the manifest that is written beside it when it is complete.

    The methods raise ``OutputError`` if a file cannot be written or read; ``read`` and ``read_sidecar`` raise
    ``OSError``.
    """

    output: str
    folder: str
    path: Path | str  # of the output, for the report
    _replaced: Mapping[str, Any] | None = None  # the manifest of the output that will be replaced, if that is permitted

    @property
    def suffix(self) -> str:
        """The suffix of the output, in lower case."""
        return os.path.splitext(self.output)[1].lower()

    @property
    def sidecar(self) -> str:
        """The name of the manifest of the complete output."""
        return f"{self.output}{SIDECAR}"

    @abstractmethod
    def absolute(self) -> Place:
        """Return the same place under a name that does not depend on the current folder."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[None]:
        """Within the context, use the work folder, which is created if needed."""

    @abstractmethod
    def refuse_inputs(self, inputs: Iterable[str]) -> None:
        """Raise ``OutputError`` if the output or its work folder is one of the ``inputs``."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the files in the work folder; none if there is no folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file in the work folder."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file in the work folder. It gets its name when it is complete."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete files in the work folder."""

    @abstractmethod
    def write_first(self, name: str, content: bytes) -> None:
        """Write a file in the work folder, unless another process has written it; then leave it, where possible."""

    @abstractmethod
    def new_listing(self) -> AbstractContextManager[Path]:
        """Yield the path of a new local file, which is deleted at the end of the context if it is still there."""

    @abstractmethod
    def publish(self, path: Path, name: str) -> None:
        """Move a local file to the work folder."""

    @abstractmethod
    def listing(self, name: str) -> Path:
        """Return the path of a local file with the content of ``name``, which lies in the work folder."""

    @abstractmethod
    def output_size(self) -> int | None:
        """Return the number of bytes of the output, or ``None`` if there is none.

        Raises ``OutputError`` if it is no file, or its place cannot be used.
        """

    @abstractmethod
    def output_blocks(self) -> Iterator[bytes]:
        """Yield the content of the output; nothing if there is none."""

    @abstractmethod
    def writing_output(self) -> AbstractContextManager[IO[bytes]]:
        """Yield a new file. It replaces the output if the block succeeds."""

    @abstractmethod
    def write_sidecar(self, content: bytes) -> None:
        """Write the manifest of the complete output."""

    @abstractmethod
    def read_sidecar(self) -> bytes:
        """Return the manifest of the complete output."""

    @abstractmethod
    def delete_sidecar(self) -> None:
        """Delete the manifest of the output, if there is one."""

    @abstractmethod
    def discard(self) -> None:
        """Delete the rows and the manifest of an interrupted run, if there is one."""

    @abstractmethod
    def remove(self) -> None:
        """Delete what fastres has written in the work folder, and the folder. Warn of what is left behind."""

    def manifest(self) -> dict[str, Any]:
        """Return the run's manifest, or ``{}`` if it is missing or damaged."""
        with suppress(FileNotFoundError), _reading(os.path.join(self.folder, MANIFEST)):
            return _document(self.read(MANIFEST))
        return {}

    def finished(self) -> dict[str, Any]:
        """Return the manifest of the complete output, or ``{}`` if it is missing or the output has another size.

        Raises ``OutputError`` also if the file with its name is somebody's.
        """
        try:
            with _reading(self.sidecar):
                content = self.read_sidecar()
        except FileNotFoundError:
            return {}
        if (document := sidecar_document(content)) is None:
            raise OutputError(
                f"{self.sidecar!r}, where fastres writes what the output is, is a file that fastres has not written; "
                "move it away, or use another output"
            )
        is_current = document != self._replaced and document.get("bytes") == self.output_size()
        return document if is_current else {}

    def replace_output(self) -> None:
        """From now on, a present output counts as not there: a run that replaces it may have the same ``run``."""
        self._replaced = self.finished()

    @property
    def replaces(self) -> bool:
        """True if there may be an output, which will be replaced."""
        return self._replaced is not None

    @property
    def again(self) -> str:
        """What to do if the run is interrupted."""
        return "run the command again with --resume" if self.replaces else "run the command again"


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raise ``OutputError`` if the file or folder ``name`` is there and cannot be read."""
    try:
        yield
    except (FastresError, FileNotFoundError):
        raise
    except OSError as error:
        raise OutputError(
            f"{name!r} cannot be read: {error.strerror or error}; mend the cause and run the command again, or use "
            "another output"
        ) from error


def _document(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


class LocalPlace(Place):
    """An output on a file system."""

    def __init__(self, output: Path) -> None:
        check_output_name(str(output))
        if output.is_symlink():
            output = Path(os.path.realpath(output))
        self._output, self._folder = output, work_folder(output)
        self.output, self.folder, self.path = str(output), str(self._folder), output

    def absolute(self) -> LocalPlace:
        place = LocalPlace(Path(os.path.abspath(self._output)))
        place._replaced = self._replaced
        return place

    @contextmanager
    def opened(self) -> Iterator[None]:
        with shared(self._folder) as lock:
            try:
                yield
            finally:
                if set(self.names()) <= {LOCK} and is_alone(lock):  # nothing came of it
                    remove(self._folder)

    def refuse_inputs(self, inputs: Iterable[str]) -> None:
        given = [name for name in inputs if not is_url(name)]
        for own in (self._output, self._folder):
            refuse_inputs(own, given)

    def names(self) -> list[str]:
        with suppress(FileNotFoundError), _reading(self.folder):
            return os.listdir(self._folder)
        return []

    def read(self, name: str) -> bytes:
        return read_regular(self._folder / name)

    def write(self, name: str, content: bytes) -> None:
        with self._new_file(self._folder / name) as file:
            file.write(content)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with self._writing(self._folder / name):
                (self._folder / name).unlink(missing_ok=True)

    def write_first(self, name: str, content: bytes) -> None:
        with self._new_file(self._folder / name, _link) as file:
            file.write(content)

    @contextmanager
    def new_listing(self) -> Iterator[Path]:
        path = self._temporary()
        try:
            with self._writing(path):
                path.touch()
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def publish(self, path: Path, name: str) -> None:
        with self._writing(self._folder / name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, self._folder / name)
            sync_folder(self._folder)

    def listing(self, name: str) -> Path:
        return self._folder / name

    def output_size(self) -> int | None:
        try:
            facts = self._output.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{self.output!r} cannot be written: {reason}; use another output") from error
        if (kind := other_kind(facts.st_mode)) is not None:
            raise OutputError(f"{self.output!r} is {kind}; pass the name of a file")
        return facts.st_size

    def output_blocks(self) -> Iterator[bytes]:
        with suppress(FileNotFoundError), _reading(self.output), self._output.open("rb") as file:
            while block := file.read(1 << 20):
                yield block

    def writing_output(self) -> AbstractContextManager[IO[bytes]]:
        return self._new_file(self._output)

    def write_sidecar(self, content: bytes) -> None:
        with self._new_file(Path(self.sidecar)) as file:
            file.write(content)

    def read_sidecar(self) -> bytes:
        return read_regular(self.sidecar)

    def delete_sidecar(self) -> None:
        with self._writing(Path(self.sidecar)):
            Path(self.sidecar).unlink(missing_ok=True)

    def discard(self) -> None:
        if self.names():
            with self.opened(), self._writing(self._folder):
                clear(self._folder)

    def remove(self) -> None:
        remove(self._folder)

    @contextmanager
    def _new_file(self, target: Path, rename: Callable[[Path, Path], None] = os.replace) -> Iterator[BinaryIO]:
        temporary = self._temporary()
        try:
            with self._writing(target):
                with temporary.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                rename(temporary, target)
                sync_folder(target.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        """Return a new name in the work folder, which no other process uses."""
        return self._folder / f"{OUTPUT}.{uuid.uuid4().hex[:12]}{TEMPORARY}"

    @contextmanager
    def _writing(self, target: Path) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{str(target)!r} cannot be written: {error.strerror or error}. Finished rows are kept in "
                f"{self.folder!r}; fix the cause, and {self.again}"
            ) from error


def _link(path: Path, target: Path) -> None:
    """Give the file a second name, unless another file has it."""
    try:
        os.link(path, target)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        os.replace(path, target)
