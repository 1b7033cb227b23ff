"""RenderConfig: everything about a render that is not the story. Pure data, no torch.

It is above the methods, because each method has its own class for the section `method`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, create_model

from bachvid.errors import ConfigError
from bachvid.inputs.sections import (
    CacheConfig,
    ClusterConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    ResolvedModel,
    ResolvedOutput,
    ResolvedSampling,
    ResolvedVideo,
    SamplingConfig,
    Section,
    VideoConfig,
)
from bachvid.inputs.strict_yaml import (
    Location,
    YamlValue,
    did_you_mean,
    format_path,
    parse_mapping,
    parse_override,
    quote,
    read_text,
    validate,
)
from bachvid.methods.base import MethodConfig
from bachvid.methods.registry import DEFAULT_METHOD, METHODS, method_class
from bachvid.units import join_words

INDECISIVE = ("output", "cache", "cluster", "parallel")  # sections that do not decide the pixels


def _default_method() -> MethodConfig:
    return method_class(DEFAULT_METHOD).Config()  # type: ignore[call-arg]  # it has a default name


class RenderConfig(Section):
    """The config as written, in sections. None means the model's value."""

    model: ModelConfig = ModelConfig()
    video: VideoConfig = VideoConfig()
    sampling: SamplingConfig = SamplingConfig()
    method: SerializeAsAny[MethodConfig] = _default_method()
    output: OutputConfig = OutputConfig()
    cache: CacheConfig = CacheConfig()
    cluster: ClusterConfig = ClusterConfig()
    parallel: ParallelConfig = ParallelConfig()

    @classmethod
    def from_yaml(cls, path: Path | None, overrides: Sequence[str] = ()) -> RenderConfig:
        """Read a config file, and overrides `section.key=value` with values in YAML.

        Raises ConfigError with one line per problem, naming the file or the override.
        """
        values: dict[object, YamlValue] = {}
        if path is not None:
            values = parse_mapping(read_text(path), source=str(path), keys=list(cls.model_fields))
        origins = {override.partition("=")[0]: f"--set {override}" for override in overrides}

        def source(location: Location) -> str:
            return origins.get(format_path(location[:2]), str(path))

        named = [text for text in overrides if text.startswith("method.name=")]
        for override in named:  # first: it decides which keys the section has
            _override(values, override, cls, path)
        schema = _schema(_method_name(values, source))
        section = values.get("method")
        if named and isinstance(section, dict):  # the file may have keys of another method
            known = method_class(str(section["name"])).Config.model_fields
            values["method"] = {key: value for key, value in section.items() if key in known}
        for override in overrides:
            if override not in named:
                _override(values, override, schema, path)
        return cls._from(schema, values, source)

    @classmethod
    def from_values(cls, values: Mapping[str, object], *, source: str) -> RenderConfig:
        """Read a config, or a resolved one, from plain data. Raises ConfigError."""
        schema = _schema(_method_name(values, lambda _: source))
        return cls._from(schema, values, lambda _: source)

    @classmethod
    def _from(
        cls, schema: type[RenderConfig], values: object, source: Callable[[Location], str]
    ) -> RenderConfig:
        return cls(**dict(validate(schema, values, source=source)))


class ResolvedConfig(Section):
    """A config with every value that a render needs, checked against its model and method."""

    model: ResolvedModel
    video: ResolvedVideo
    sampling: ResolvedSampling
    method: SerializeAsAny[MethodConfig]
    output: ResolvedOutput
    cache: CacheConfig
    cluster: ClusterConfig
    parallel: ParallelConfig

    @property
    def sha256(self) -> str:
        """The hash, in hex, of all that decides the pixels."""
        decisive = self.model_dump(
            mode="json",
            exclude={
                **dict.fromkeys(INDECISIVE, True),
                "model": {"device", "threads", "offload"},
                "method": {"profile"},
            },
        )
        canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _schema(method: str) -> type[RenderConfig]:
    """Return RenderConfig with the section of one method, so that its keys are checked."""
    section = method_class(method).Config
    return create_model(
        "RenderConfig", __base__=RenderConfig, method=(section, section(name=method))
    )


def _method_name(values: Mapping[Any, object], source: Callable[[Location], str]) -> str:
    section = values.get("method")
    name = section.get("name", DEFAULT_METHOD) if isinstance(section, dict) else DEFAULT_METHOD
    if isinstance(name, str) and name in METHODS:
        return name
    known = join_words(map(repr, METHODS), "or")
    guess = did_you_mean(str(name), list(METHODS))
    raise ConfigError(
        f"{source(('method', 'name'))}: method.name: is {quote(name)}: must be {known}.{guess}"
    )


def _override(
    values: dict[object, YamlValue], override: str, schema: type[RenderConfig], path: Path | None
) -> None:
    """Write `section.key=value` into the values of a config. Raises ConfigError."""
    section, key, value = parse_override(override, schema)
    written = values.setdefault(section, {})
    if not isinstance(written, dict):
        raise ConfigError(f"{path}: {section}: is {quote(written)}: must be a mapping")
    written[key] = value
