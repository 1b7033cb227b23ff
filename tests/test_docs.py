"""The documents name what is there: files, names, commands, and code that they quote."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from bachvid.cli.main import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING"))]
)
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
QUOTED = re.compile(r"(?:^|\n)[^\n]*?[Ff]rom `([^`]+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
FOLDERS = {path.name for path in ROOT.iterdir()} | {"bachvid"}
document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def unindented(code: str) -> str:
    """A method is quoted without its class."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def commands_of(text: str) -> list[list[str]]:
    """The `bachvid` commands of a document, in words, without comments and placeholders."""
    blocks = [block for language, block in BLOCK.findall(text) if language in ("", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"bachvid \w", line)]


@document
def test_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text()
    named = [code for code in inline_code(text) if re.fullmatch(r"[\w.-]+(/[\w.*-]*)+", code)]
    named = [name for name in named if name.split("/")[0] in FOLDERS - {"runs"}]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", BLOCK.sub("", text))
    assert named + links, "nothing is named"
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), f"{path.name} names {name}"
    for link in links:
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


@document
def test_python_names_resolve(path: Path) -> None:
    for name in inline_code(path.read_text()):
        if re.fullmatch(r"bachvid(\.\w+)+", name):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), name


@document
def test_code_that_is_quoted_stands_in_its_file(path: Path) -> None:
    text = path.read_text()
    quotes = QUOTED.findall(text)
    assert quotes or path.parent.name != "docs" or "```python" not in text
    for file, code in quotes:
        assert unindented(code) in unindented((ROOT / file).read_text()), f"{path.name}: {file}"


@document
def test_commands_are_those_of_the_command_line(path: Path) -> None:
    for command, *words in commands_of(path.read_text()):
        found = main.get_command(click.Context(main), command)
        assert found is not None, f"bachvid {command}"
        found.make_context(command, words)  # raises UsageError for an option that is not there
