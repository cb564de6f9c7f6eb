"""``bench`` and ``export`` by their bare names, as the checkout's root offers them: ``python -m bench.run``.

The folders are ``fastres.bench`` and ``fastres.export``. Imported by the bare name they would become a second set of
modules, with classes that are not the first set's. :func:`serve` makes both names mean the same modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


def serve(name: str) -> None:
    """From now on ``import NAME`` and ``import NAME.x`` give ``fastres.NAME`` and ``fastres.NAME.x`` themselves."""
    sys.meta_path.insert(0, _SecondName(name))
    sys.modules[name] = importlib.import_module(f"fastres.{name}")


class _SecondName(MetaPathFinder, InspectLoader):
    """Finds ``NAME.x`` in ``fastres.NAME``; a loader too, so that ``python -m NAME.x`` gets its code."""

    def __init__(self, name: str) -> None:
        self._prefix = f"{name}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefix) or (real := importlib.util.find_spec(f"fastres.{fullname}")) is None:
            return None
        package = real.submodule_search_locations is not None
        return ModuleSpec(fullname, self, origin=real.origin, is_package=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"fastres.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has just put the second name's there

    def get_code(self, fullname: str) -> CodeType | None:
        name, loader = _real(fullname)
        return loader.get_code(name)

    def get_source(self, fullname: str) -> str | None:
        name, loader = _real(fullname)
        return loader.get_source(name)


def _real(second: str) -> tuple[str, InspectLoader]:
    """The name and the loader of the module that has the ``second`` name."""
    spec = importlib.util.find_spec(f"fastres.{second}")
    assert spec is not None
    assert isinstance(spec.loader, InspectLoader)
    return spec.name, spec.loader
