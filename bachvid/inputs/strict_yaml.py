"""Reads what people write: strict YAML, with pydantic's errors in plain words.

Nothing is guessed or repaired. Every problem becomes a line of a ConfigError that names the file,
the path in it, the value, the rule, and the nearest known spelling.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bachvid.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)
YamlValue = None | bool | int | float | str | list["YamlValue"] | dict[object, "YamlValue"]
Location = tuple[int | str, ...]

_MAX_SHOWN = 60  # characters of a value in a message


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, and tags other than those of JSON's types."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[str] = set()
        # For a scalar with the tag !!map there are no pairs, and the class below refuses it.
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {quote(key.value)} stands here twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_TAGS = {"null", "bool", "int", "float", "str", "seq", "map"}

# Dates stay text, and what only Python has (sets, bytes, pairs) is an unknown tag.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if not tag.endswith(("timestamp", "merge"))]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None
    or tag.rpartition(":")[2] in {"null", "bool", "int", "float", "str", "seq", "map"}
}


def quote(value: object) -> str:
    """Return `value` as a message shows it: quoted if text, and cut when long."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python agrees to print
        return "a number of very many digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 4]} ..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the nearest of `known`, or nothing if none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def format_path(location: Iterable[int | str]) -> str:
    """Format a path in a document, such as `scenes[0].actions[2].text`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if part.isprintable() and len(part) <= _MAX_SHOWN else quote(part)
            path += f".{name}" if path else name
    return path


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises ConfigError if it is missing, a folder or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def parse_yaml(text: str, *, source: str) -> YamlValue:
    """Parse one YAML document. Raises ConfigError, with line and column, if it is not one."""
    try:
        # An alias can contain itself, and a chain of them can expand without bound.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(
                    f"{source}: has the alias *{event.anchor}; write the value again instead"
                )
        value: YamlValue = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: cannot be read: {error.problem}") from None
    except yaml.YAMLError as error:  # a ReaderError: a character that YAML does not allow
        raise ConfigError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be read") from None
    except ConfigError:
        raise
    except (ValueError, LookupError) as error:  # a tag with a value that it cannot have: !!int x
        raise ConfigError(f"{source}: a value that its tag does not allow: {error}") from None
    return value


def parse_mapping(text: str, *, source: str, keys: Sequence[str]) -> dict[object, YamlValue]:
    """Parse a YAML document that must be a mapping of `keys`. Raises ConfigError otherwise."""
    value = parse_yaml(text, source=source)
    if value is None:
        raise ConfigError(f"{source}: is empty; it needs the keys {', '.join(keys)}")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source}: is {quote(value)}; it must be a mapping with the keys {', '.join(keys)}"
        )
    return value


def parse_override(override: str, model: type[BaseModel]) -> tuple[str, str, YamlValue]:
    """Parse `section.key=value` for a `model` of sections, the value in YAML.

    Raises ConfigError if there is no such key.
    """
    path, equals, text = override.partition("=")
    source = f"--set {override}"
    if not equals:
        raise ConfigError(f"{source}: has no '='; write section.key=value")
    sections = {name: field.annotation for name, field in model.model_fields.items()}
    known = {
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel)
        for key in section.model_fields
    }
    if path in sections:
        keys = ", ".join(sorted(name for name in known if name.startswith(f"{path}.")))
        raise ConfigError(f"{source}: {path} is a section; set one of {keys}")
    if path not in known:
        guess = did_you_mean(path, sorted(known))
        raise ConfigError(f"{source}: unknown key {quote(path)}.{guess}")
    section, _, key = path.partition(".")
    return section, key, parse_yaml(text, source=source)


def validate(model: type[ModelT], value: object, *, source: Callable[[Location], str]) -> ModelT:
    """Build `model` from plain data.

    `source` names the origin of a location: the file, or the option that set it.
    Raises ConfigError with one line per problem.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [
            f"{source(details['loc'])}: {_explain(model, details)}"
            for details in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    location, value = details["loc"], details["input"]
    path = f"{format_path(location)}: " if location else ""
    kind, context = details["type"], details.get("ctx", {})
    match kind:
        case "extra_forbidden":
            known = _known_keys(model, location[:-1])
            guess = did_you_mean(str(location[-1]), known)
            return f"{path}unknown key.{guess or ' Known here: ' + ', '.join(known) + '.'}"
        case "invalid_key":
            return f"{path}a key must be text; put it in quotes"
        case "missing":
            return f"{path}missing, and it has no default"
        case "literal_error":
            expected = str(context["expected"])
            guess = did_you_mean(
                str(value), expected.replace("'", "").replace(" or ", ", ").split(", ")
            )
            return f"{path}is {quote(value)}: must be {expected}.{guess}"
        case "value_error":
            return f"{path}{context['error']}"
        case "string_type" if isinstance(value, list | dict):
            return f"{path}is {quote(value)}: must be text"
    rule = _RULES.get(kind, details["msg"])
    return f"{path}is {quote(value)}: {rule.format(**context)}"


_RULES = {
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than_equal": "must be >= {ge}",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "model_type": "must be a mapping",
    "string_type": "must be text; put it in quotes",
    "string_unicode": "must be Unicode text",
    "tuple_type": "must be a list",
}


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    for part in location:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model), None)
