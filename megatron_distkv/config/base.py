"""What every configuration model shares: frozen, no unknown keys, one sentence for a mistake."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_distkv.config.shipped import find_config
from megatron_distkv.errors import ConfigError


class FrozenConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


def parse_config(kind: type[ConfigT], values: dict[str, Any], where: str) -> ConfigT:
    """`values` as a `kind`; raises ConfigError with one sentence that names the key, what is wrong and where."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_sentence(kind, error, where)) from None


def load_config(kind: type[ConfigT], path: Path) -> ConfigT:
    """The YAML (or JSON) file at `path` (or the shipped one of that name) as a `kind`; raises ConfigError."""
    return parse_config(kind, read_config(path), str(find_config(path)))


def read_config(path: Path) -> dict[str, Any]:
    """The same, not looked into yet: where options are to be added. Raises ConfigError where it is no mapping."""
    path = find_config(path)
    try:
        values: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return values


def add_options(values: dict[str, Any], section: str, options: Mapping[str, Any]) -> None:
    """Options of the command line win over the section's keys; None: not given. What is no section is left as it is,
    for `parse_config` to say so."""
    given = {key: value for key, value in options.items() if value is not None}
    before = values.get(section, {})
    if given and isinstance(before, dict):
        values[section] = {**before, **given}


def _first_sentence(kind: type[FrozenConfig], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or kind.__name__
    if first["type"] == "extra_forbidden":
        known = ", ".join(_keys_at(kind, first["loc"][:-1]))
        return f"{where}: unknown key '{key}'; known keys here: {known}"
    if first["type"] == "missing":
        return f"{where}: the key '{key}' is missing"
    return f"{where}: {key}: {first['msg'].removeprefix('Value error, ')} (got {first.get('input')!r})"


def _keys_at(kind: type[FrozenConfig], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        field = kind.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, FrozenConfig):
            break
        kind = field.annotation
    return list(kind.model_fields)
