"""Second names for modules: the former names of moved modules, and ``bench`` and ``export`` in the repository's root.

Pickled models, commands and programs refer to a module by the name that it had when they were written. Importing a
second name returns the module itself, not a copy, so that its classes are the same classes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

# Former names of modules, by the package that they are in now. ``old:new`` if the module was also renamed.
_MOVED = {
    "network": "architectures plan steps",
    "folding": "fusion",
    "roofline": "ceilings gpu_shapes prediction:estimate",
    "executors": "arena cpu gpu graphs micro_batches processor recent",
    "images": "categories classification.pixels:jpeg decoding",
    "weights": "checkpoints config_fields download fitting folders inspection:inspect layouts timm_config "
    "transformers_config",
    "model": "backbone compiled explain inputs loading outputs parameters predict",
    "look": "cam pictures",
    "commands": "classification.command:classify cli demo environment look_command:look",
    "bench.digits": "bench.similarity:similarity bench.train_digits:training",
    "bench.estimates": "bench.predict:rooflines",
    "bench.measure": "bench.ceilings:ceilings bench.host:host bench.layers:layers",
    "bench.tuning": "bench.vetting:vetting",
    "kernels.inspection": "kernels.inspection_tma:tma_command kernels.inspection_tables:tuned_tables",
}
FORMER_NAMES = {
    f"fastres.{old}": f"fastres.{room}.{new or old}"
    for room, names in _MOVED.items()
    for old, _, new in (name.partition(":") for name in names.split())
}


def serve_former_names() -> None:
    """Make the names in :data:`FORMER_NAMES` importable, and runnable with ``python -m``."""
    sys.meta_path.append(_SecondNames(FORMER_NAMES.get, moved=True))


def serve(name: str) -> None:
    """Make ``import NAME`` and ``import NAME.x`` return the modules ``fastres.NAME`` and ``fastres.NAME.x``."""
    prefix = f"{name}."
    finder = _SecondNames(lambda full: f"fastres.{full}" if full.startswith(prefix) else None, moved=False)
    sys.meta_path.insert(0, finder)
    sys.modules[name] = importlib.import_module(f"fastres.{name}")


class _SecondNames(MetaPathFinder, InspectLoader):
    """Finder of modules by their second names, and loader, so that ``python -m NAME`` gets the module's code.

    ``moved`` means that the second name is in a different package from the module. The module's relative imports would
    fail under that name, so ``python -m`` runs the module under its real name.
    """

    def __init__(self, real_name: Callable[[str], str | None], *, moved: bool) -> None:
        self._real_name = real_name
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = self._real_name(fullname)
        if name is None or (real := importlib.util.find_spec(name)) is None:
            return None
        package = real.submodule_search_locations is not None
        return ModuleSpec(fullname, self, origin=real.origin, is_package=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = self._real_name(spec.name)
        assert name is not None
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # the import system has just set the second name's spec

    def get_code(self, fullname: str) -> CodeType | None:
        name, loader = self._real(fullname)
        if self._moved:
            source = f"import runpy\nrunpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
            return compile(source, f"<{fullname}, now {name}>", "exec")
        return loader.get_code(name)

    def get_source(self, fullname: str) -> str | None:
        name, loader = self._real(fullname)
        return loader.get_source(name)

    def _real(self, second: str) -> tuple[str, InspectLoader]:
        """Return the real name and the loader of the module with the second name ``second``."""
        name = self._real_name(second)
        assert name is not None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert isinstance(spec.loader, InspectLoader)
        return spec.name, spec.loader
