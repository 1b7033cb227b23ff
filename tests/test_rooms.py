"""Who may import whom: the table that keeps method, model and machine apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bachvid

PACKAGE = Path(bachvid.__file__).parent
ROOTS = ("actors", "driver", "models", "sampling", "methods", "storybook", "metrics", "cli")


def own(*names: str) -> tuple[str, ...]:
    return tuple(f"bachvid.{name}" for name in names)


# What a room may not import, not even inside a function.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "errors": ("bachvid", "torch", "ray", "diffusers"),
    "tokens": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "story": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "config": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "strict_yaml": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "facts": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "families": ("torch", "ray", "diffusers", *own(*ROOTS, "facts")),
    "model_files": ("torch", "ray", "diffusers", *own(*ROOTS, "facts")),
    "profiles": ("torch", "ray", "diffusers", *own(*ROOTS, "facts")),
    "words": ("bachvid", "torch", "ray", "diffusers"),
    "wording": ("torch", "ray", "diffusers", *own(*ROOTS, "plan")),
    "prompts": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "schedule": ("torch", "ray", "diffusers", *own(*ROOTS, "plan", "cluster")),
    "cache_policy": ("torch", "ray", "diffusers", *own(*ROOTS, "plan", "cluster")),
    "cluster": ("torch", "ray", "diffusers", *own(*ROOTS, "plan")),
    "ray_cluster": ("torch", "diffusers", *own(*ROOTS)),
    "memory": ("torch", "ray", "diffusers", *own(*ROOTS, "plan", "cluster")),
    "plan": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "plan_text": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "gangs": ("torch", "ray", "diffusers", *own(*ROOTS)),
    "parallel": ("ray", "diffusers", *own(*ROOTS)),
    "kv_bytes": ("ray", "diffusers", *own(*ROOTS)),
    "kv_packing": ("ray", "diffusers", *own(*ROOTS)),
    "kv_stores": ("ray", "diffusers", *own(*ROOTS)),
    "attention": ("ray", "diffusers", *own(*ROOTS)),
    "cache": ("diffusers", *own(*ROOTS)),
    "methods": ("ray", "diffusers", *own("actors", "driver", "models", "sampling", "cli")),
    "models": ("ray", *own("methods", "cache", "actors", "driver", "cli")),
    "sampling": ("ray", *own("methods", "cache", "actors", "driver", "cli")),
    "metrics": ("ray", "diffusers", *own("methods", "models", "actors", "driver", "cli")),
    "actors": ("diffusers", *own("driver", "cli")),
    "driver": ("torch", "diffusers", *own("methods", "models", "sampling", "attention", "cli")),
    "cli": ("torch", "ray", "diffusers", *own("methods", "models", "sampling", "actors")),
}


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


def files_of(room: str) -> list[Path]:
    module = PACKAGE / f"{room}.py"
    return [module] if module.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert files_of(room)
    for path in files_of(room):
        forbidden = tuple(f"{name}." for name in FORBIDDEN[room])
        bad = sorted(name for name in imports_of(path) if f"{name}.".startswith(forbidden))
        assert not bad, f"{path.name} imports {bad}"


def test_only_ray_rooms_import_ray_and_nobody_imports_xfuser_at_once() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = imports_of(path, only_at_import=True)
        assert not any(name.startswith("xfuser") for name in names), path.name
        if not path.name.startswith("ray_"):
            assert not any(f"{name}.".startswith("ray.") for name in imports_of(path)), path.name


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("bachvid", ("torch", "pydantic", "yaml")),
        ("bachvid.cli.main", ("torch", "pydantic", "yaml", "rich", "ray")),
        ("bachvid.planning.plan", ("torch", "transformers", "diffusers", "ray", "huggingface_hub")),
        ("bachvid.driver.renderer", ("torch", "transformers", "diffusers")),
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
