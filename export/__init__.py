"""Export models to deployment formats: ONNX, int8 ONNX, ``torch.export`` and server repositories.

An exporter reads the Plan and writes files; nothing in ``fastres`` depends on it but the command line.
"""

import importlib
import importlib.util
from typing import Any

if __name__ == "export":
    from fastres.aliases import serve

    serve("export")


def __getattr__(name: str) -> Any:
    """Import a module of this package when it is first used: ``fastres.export.runtime.Session``."""
    full = f"{__name__}.{name}"
    if name.startswith("_") or importlib.util.find_spec(full) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(full)
