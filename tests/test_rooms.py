"""The rooms (subpackages) of the code base: their allowed imports, their docstrings, and the tests that mirror them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastres": "fastres", "kernels": "fastres.kernels", "export": "fastres.export", "bench": "fastres.bench"}

# Each room and the rooms that it may import, from the bottom up. ``leaves`` are the files of fastres/ itself, ``top``
# its ``__init__.py`` and ``__main__.py``. kernels.launch and the commands of bench/ are single files, listed by name.
MAY_IMPORT = {
    "leaves": "",
    "kernels.launch": "leaves",
    "kernels.routing": "leaves kernels.launch",
    "kernels": "leaves kernels.launch kernels.routing",
    "kernels.inspection": "leaves kernels.launch kernels.routing kernels",
    "storage": "leaves",
    "network": "leaves",
    "folding": "network",
    "roofline": "leaves kernels.launch kernels.routing kernels network",
    "onednn": "leaves",
    "executors": "leaves kernels.launch kernels.routing kernels kernels.inspection network folding roofline onednn",
    "quantisation": "leaves network folding executors",
    "images": "leaves network",
    "pages": "",
    "weights": "leaves network images",
    "model": "leaves kernels.launch kernels.routing network folding roofline executors quantisation images weights",
    "classification": "leaves storage network executors images weights model",
    "classification.browsing": "leaves storage executors images pages classification",
    "ray": "leaves storage executors images model classification",
    "labels": "leaves storage images classification",
    "calibration": "leaves storage images network executors quantisation weights model classification labels",
    "evaluation": "leaves storage images pages network folding executors quantisation weights model classification "
    "labels calibration",
    "look": "leaves images model",
    "serving": "leaves network executors images model classification look",
    "commands": "leaves kernels.inspection network executors images weights model classification "
    "classification.browsing ray calibration evaluation look serving",
    "top": "leaves network images model classification ray calibration evaluation look serving commands",
    "export": "leaves kernels network executors quantisation images weights model calibration",
    "bench.report": "leaves",
    "bench.pretend_gpu": "leaves kernels.routing",
    "bench.engines": "leaves network folding executors top export",
    "bench.digits": "leaves network look commands top bench.report bench.engines",
    "bench.measure": "leaves kernels.routing kernels network folding roofline executors images model commands top "
    "bench.report bench.engines",
    "bench.kernels": "kernels.launch kernels.routing kernels network executors bench.measure",
    "bench.tuning": "leaves kernels.routing kernels kernels.inspection network folding roofline executors bench.report "
    "bench.measure",
    "bench.estimates": "leaves kernels.launch kernels.routing network folding roofline executors top bench.report "
    "bench.tuning",
    "bench.study": "leaves network folding executors commands top bench.report bench.engines bench.digits",
    "bench.tune": "leaves kernels.routing kernels bench.report bench.measure bench.tuning",
    "bench.visit": "leaves kernels.launch kernels.routing kernels kernels.inspection network folding executors "
    "commands top bench.report bench.engines bench.pretend_gpu bench.measure bench.tuning bench.estimates bench.tune",
    "bench.run": "leaves network executors model top bench.report bench.engines bench.measure",
    "bench.classify": "leaves network executors images classification commands top bench.report bench.engines "
    "bench.measure",
    "bench.quantisation": "leaves network executors quantisation commands top bench.report bench.measure bench.digits "
    "bench.study bench.classify",
    "bench.shards": "leaves network executors images classification commands top bench.report bench.measure "
    "bench.classify",
    "bench.serve": "leaves network images classification commands bench.report bench.engines bench.measure "
    "bench.classify",
    "bench.layouts": "leaves network folding executors bench.report bench.measure",
    "bench.calls": "leaves network executors model top bench.report bench.measure",
    "bench.gpu": "leaves kernels.routing bench.visit",
    "bench": "leaves",
}

# Rooms that import upwards only when they run, and the rooms that they then import.
COMMANDS = {
    "classification": ("classification.browsing",),
    "commands": ("bench.digits", "bench.engines", "bench.measure", "bench.run", "bench.serve", "export"),
    "evaluation": ("export",),
    "kernels.inspection": ("executors", "folding", "network"),
}

# Folders of tests that belong to no room.
OTHER_TESTS = {"docs", "gpu", "on_pretend_gpu"}


def modules() -> dict[str, Path]:
    """Return every module of the package, by name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            if folder == "fastres" and inside.parts[0] in FOLDERS:  # a link
                continue
            parts = inside.with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


# Single files that are listed by name.
FILES = {
    "fastres.kernels.launch",
    *(name for name in MODULES if name.startswith("fastres.bench.") and name.count(".") == 2),
}


def room(module: str) -> str:
    """Return the room of a module."""
    parts = module.split(".")[1:]
    if parts in ([], ["__main__"]):
        return "top"
    if MODULES[module].name == "__init__.py" or module in FILES:
        return ".".join(parts)
    return ".".join(parts[:-1]) or "leaves"


def imports(module: str) -> Iterator[str]:
    """Return the modules of the package that a module imports: at its top, in functions, or for annotations."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found = inner if inner in MODULES else origin
                if found in MODULES:
                    yield found


IMPORTS = {module: set(imports(module)) - {module} for module in MODULES}


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return nodes that import each other in a circle, or nothing if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_rules_are_levels() -> None:
    """Each room is listed after all rooms that it may import, so no rule allows a circle."""
    assert set(MAY_IMPORT) == {room(module) for module in MODULES}
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        assert [other for other in allowed.split() if order.index(other) >= order.index(name)] == [], name


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_what_it_may(name: str) -> None:
    lazily = COMMANDS.get(name, ())
    allowed = {name, *MAY_IMPORT[name].split(), *lazily}
    wrong = {f"{module} imports {other}" for module in MODULES if room(module) == name
             for other in IMPORTS[module] if room(other) not in allowed}  # fmt: skip
    assert not wrong
    used = {room(other) for module in MODULES if room(module) == name for other in IMPORTS[module]}
    assert allowed - {name} <= used, "a rule that no import needs"


def test_no_modules_import_each_other() -> None:
    assert cycle(IMPORTS) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}), "this test can fail"


def test_kernels_know_the_leaves_and_only_commands_know_the_benchmark() -> None:
    kernels = {name for name in MAY_IMPORT if name.split(".")[0] == "kernels"}
    for name in kernels:
        assert set(MAY_IMPORT[name].split()) <= kernels | {"leaves"}, name
    for name, allowed in MAY_IMPORT.items():
        if name.split(".")[0] not in ("bench", "export"):
            assert not [other for other in allowed.split() if other.split(".")[0] in ("bench", "export")], name


def test_commands_import_upwards_only_when_they_run() -> None:
    """The imports that :data:`COMMANDS` allows are inside functions."""
    for module, path in MODULES.items():
        above = COMMANDS.get(room(module), ())
        if above:
            at_import = {name for node in ast.parse(path.read_text(encoding="utf-8")).body
                         for name in top_level(node)}  # fmt: skip
            wrong = [name for name in at_import if any(f"fastres.{other}" in name for other in above)]
            assert not wrong, f"{module} imports {wrong} when it is imported"


def top_level(node: ast.stmt) -> Iterator[str]:
    """Return the modules that an absolute import at the top of a file names."""
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_room_says_what_lives_there(name: str) -> None:
    said = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
    assert said.count("\n\n") >= 1, (
        "the first paragraph says what belongs in a room, the second what does not, or how to use it"
    )


def test_no_file_is_long() -> None:
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_tests_mirror_the_rooms() -> None:
    """``tests/x/test_y.py`` tests ``x/y.py``: every folder of tests belongs to a room, and every room has one."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    tested = {".".join(folder.parts) for folder in folders} - {""}
    packages = {room(name) for name, path in MODULES.items() if path.name == "__init__.py"} - {"top"}
    assert tested == packages | OTHER_TESTS
