"""Progress bars, warnings and messages on standard error, which may be missing.

Python sets ``sys.stderr`` and ``sys.stdout`` to ``None`` in daemons and under ``pythonw``. Wrappers close them, or
replace them by objects that have only ``write``. Nothing here fails because of that: what cannot be shown is left out.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def is_usable(stream: Any) -> bool:
    """Return True if text can be written to ``stream``."""
    return hasattr(stream, "write") and not getattr(stream, "closed", False)


def is_terminal(stream: Any) -> bool:
    """Return True if ``stream`` is a terminal; False if it is something else, is closed or is ``None``."""
    try:
        return is_usable(stream) and bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def progress_bar(iterable: Iterable[Any] | None = None, *, disable: bool | None = False, **options: Any) -> tqdm[Any]:
    """Return a ``tqdm`` on standard error with these ``options``. It shows nothing if that cannot be written.

    With ``disable=None`` it is shown only on a terminal.
    """
    from tqdm import tqdm

    hidden = not is_terminal(sys.stderr) if disable is None else disable
    return tqdm(iterable, disable=hidden or not is_usable(sys.stderr), **options)


def warn(message: str, category: type[Warning], stacklevel: int = 1) -> None:
    """Do what ``warnings.warn`` does, which fails if standard error is closed."""
    with usable_streams():
        warnings.warn(message, category, stacklevel=stacklevel + 1)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Replace standard output and standard error within the context if nothing can be written to them."""
    with contextlib.ExitStack() as stack:
        if not is_usable(sys.stdout):
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not is_usable(sys.stderr):
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
