"""Who may import whom: an allow-list for every room, and no circle anywhere."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bachvid

PACKAGE = Path(bachvid.__file__).parent
MOST_LINES, MOST_LINES_OF_FUNCTION = 350, 60

# Rooms from the ground up; what a room may import of the others, and which heavy libraries, also
# inside a function. A room imports only what stands above it here.
GROUND = ("errors", "units", "atomic")
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "units": (),
    "atomic": (),
    "layout": GROUND,
    "inputs": (*GROUND, "layout"),
    "catalog": (*GROUND, "layout", "inputs"),
    "prompts": (*GROUND, "inputs", "catalog", "transformers"),
    "attention": (*GROUND, "layout", "torch"),
    "kv": (*GROUND, "layout", "torch"),
    "methods": (*GROUND, "layout", "inputs", "catalog", "prompts", "attention", "kv", "torch"),
    "models": (
        *(*GROUND, "layout", "inputs", "catalog", "prompts", "attention"),
        *("torch", "diffusers", "transformers"),
    ),
    "planning": (*GROUND, "layout", "inputs", "catalog", "prompts", "methods"),
    "engine": (
        *(*GROUND, "layout", "inputs", "catalog", "prompts", "attention", "kv", "methods"),
        *("models", "planning", "torch"),
    ),
    "scheduling": (*GROUND, "inputs", "prompts", "methods", "planning", "engine"),
    "output": (*GROUND, "inputs", "planning", "engine"),
    "ray_backend": (
        *(*GROUND, "layout", "catalog", "prompts", "attention", "kv", "methods", "models"),
        *("planning", "engine", "scheduling", "ray"),
    ),
    "driver": (
        *(*GROUND, "inputs", "prompts", "kv", "planning", "engine", "scheduling", "output"),
        "ray_backend",
    ),
    "storybook": (*GROUND, "inputs", "catalog", "torch", "diffusers", "transformers"),
    "metrics": (*GROUND, "inputs", "catalog", "methods", "planning", "output", "storybook"),
    "cli": (
        *(*GROUND, "inputs", "catalog", "planning", "ray_backend", "driver", "metrics", "torch"),
    ),
}
ENTRANCES = ("__init__", "__main__")  # the package itself: its names, and the command line
HEAVY = ("torch", "diffusers", "transformers", "ray")


def imports_of(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Return the modules that a file imports, not those for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(tree.body)
    names: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if only_at_import and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_arrows_point_upwards_in_the_table() -> None:
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        below = [
            other for other in allowed if other in ROOMS and other in order[order.index(room) :]
        ]
        assert not below, f"{room} stands above {below}"


def test_every_room_has_a_row() -> None:
    assert {room_of(path) for path in FILES} == {*ROOMS, *ENTRANCES}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed = {room, "__version__", *ROOMS[room]}
    for path in (path for path in FILES if room_of(path) == room):
        for name in imports_of(path):
            first, _, rest = name.partition(".")
            found = rest.split(".")[0] if first == "bachvid" else first
            if first == "bachvid" or first in HEAVY:
                assert found in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_import_circle() -> None:
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found = {part for full in imports_of(path) for part in (full, full.rpartition(".")[0])}
        graph[name] = (found & modules) - {name}
    for start in graph:
        reached: set[str] = set()
        left = [start]
        while left:
            new = graph[left.pop()] - reached
            reached |= new
            left += new
        assert start not in reached, f"{start} imports itself, by way of {sorted(reached)}"


def test_files_and_functions_are_short_or_say_why() -> None:
    for path in FILES:
        text = path.read_text()
        tree = ast.parse(text)
        reason = f"Over {MOST_LINES} lines: "
        assert text.count("\n") <= MOST_LINES or reason in (ast.get_docstring(tree) or ""), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MOST_LINES_OF_FUNCTION, f"{path}: {node.name} has {length} lines"


def test_nobody_imports_xfuser_at_once() -> None:
    for path in FILES:
        names = imports_of(path, only_at_import=True)
        assert not any(name.startswith("xfuser") for name in names), path.name


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("bachvid", ("torch", "pydantic", "yaml")),
        ("bachvid.cli.main", ("torch", "pydantic", "yaml", "rich", "ray")),
        (
            "bachvid.planning.plan",
            ("torch", "transformers", "diffusers", "ray", "huggingface_hub"),
        ),
        ("bachvid.driver.renderer", ("torch", "transformers", "diffusers")),
        ("bachvid.engine.results", ("torch", "transformers", "diffusers", "ray")),
    ],
)
def test_importing_a_module_loads_nothing_heavy(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sorted(set({unwanted}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", bachvid.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(bachvid, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Storry'"):
        _ = bachvid.Storry
