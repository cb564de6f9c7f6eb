"""Expand globs as Python's ``glob`` module does, but visit each real folder once and report what cannot be listed."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import deque
from collections.abc import Callable, Iterator

from .walking import Child, Place, children, folder_error, has_image_suffix, may_be_folder, place

State = tuple[str, int]  # a folder, and the number of components of the pattern that led to it


class Glob:
    """The files that a pattern matches. ``*``, ``?`` and ``[…]`` match within a name, ``**`` any number of folders.

    Names that begin with a dot are only matched by components that begin with a dot. Links to folders are followed
    last, and only to folders that the same component has not reached otherwise.
    """

    def __init__(self, pattern: str) -> None:
        self.hidden = 0  # names of images that would match, but begin with a dot
        self.top, self._components = _split(pattern)
        self._visited: set[tuple[Place, int]] = set()
        self._links: deque[State] = deque()
        self._last: tuple[str | None, list[Child]] = None, []

    def matches(self) -> dict[str, str | None]:
        """Return the matched files, sorted by path; the values are errors of what could not be read."""
        found: dict[str, str | None] = {}
        self._links.extend([(self.top, 0)] if _exists(self.top or os.curdir, os.stat) else [])
        while self._links:
            stack = [self._links.popleft()]
            while stack:
                folder, index = stack.pop()
                try:
                    if self._is_new(folder, index):
                        stack.extend(self._step(folder, index, found))
                except OSError as error:
                    found[folder] = folder_error(folder, error)["error"]
        return dict(sorted(found.items()))

    def _is_new(self, folder: str, index: int) -> bool:
        state = place(folder), index
        if state in self._visited:
            return False
        self._visited.add(state)
        return True

    def _step(self, folder: str, index: int, found: dict[str, str | None]) -> Iterator[State]:
        """Add the files in ``folder`` that the last component matches, or yield the next folders."""
        component = self._components[index]
        is_last = index == len(self._components) - 1
        if component == "**":
            for child in self._children(folder):
                if not child.name.startswith("."):
                    yield from self._next(child, index, found)
                    if is_last and not child.is_folder:
                        found[child.path] = None
            if not is_last:
                yield folder, index + 1  # the next one to be taken, so that the folder is not listed again
        elif not glob.has_magic(component):
            path = os.path.join(folder, component)
            if is_last and _exists(path, os.lstat) and not os.path.isdir(path):
                found[path] = None
            elif not is_last and _exists(path, os.stat) and os.path.isdir(path):
                yield path, index + 1
        else:
            for child in self._matching(folder, component, is_last):
                if not is_last:
                    yield from self._next(child, index + 1, found)
                elif not child.is_folder:
                    found[child.path] = None

    def _matching(self, folder: str, component: str, is_last: bool) -> Iterator[Child]:
        matches = _matcher(component)
        for child in self._children(folder):
            if matches(child.name):
                if not child.name.startswith(".") or component.startswith("."):
                    yield child
                elif is_last and not child.is_folder:
                    self.hidden += has_image_suffix(child.name)

    def _next(self, child: Child, index: int, found: dict[str, str | None]) -> Iterator[State]:
        if child.is_folder and child.is_link:
            self._links.append((child.path, index))
        elif child.is_folder:
            yield child.path, index
        elif may_be_folder(child):
            found[child.path] = child.error

    def _children(self, folder: str) -> list[Child]:
        if folder != self._last[0]:  # "**" and the component after it ask for the same folder
            self._last = folder, children(folder)
        return self._last[1]


def _exists(path: str, ask: Callable[[str], os.stat_result]) -> bool:
    """Return True if ``path`` exists. Raises ``OSError`` if that cannot be found out."""
    try:
        ask(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _matcher(component: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(fnmatch.translate(component)).match


def _split(pattern: str) -> tuple[str, list[str]]:
    """Split a pattern into the folder before its first component with wildcards, and its components from there on."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    top = "/".join(parts[:first]) + ("/" if first else "")
    stripped = top.rstrip("/")
    return stripped or top, [part for part in parts[first:] if part] + [""] * pattern.endswith("/")
