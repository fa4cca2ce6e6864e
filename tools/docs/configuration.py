"""Tables of all configuration keys, from the pydantic models: key, type, default, docstring."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_distkv.config.base import FrozenConfig
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.config.train import TrainConfig

# What each command's --config file holds.
FILES: dict[str, type[FrozenConfig]] = {
    "up": ClusterConfig,
    "serve": InstanceConfig,
    "lend": LenderConfig,
    "train": TrainConfig,
}
_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "min_length": "at least {}"}


class Key(NamedTuple):
    """One key of a file; `path` is dotted, as a sentence would name it."""

    path: str
    field: FieldInfo
    section: type[FrozenConfig] | None  # what it holds, where that has keys of its own


def keys_of(kind: type[FrozenConfig], prefix: str = "") -> Iterator[Key]:
    """All keys of a file, sections before what they hold."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        yield Key(prefix + name, field, section)
        if section is not None:
            yield from keys_of(section, f"{prefix}{name}.")


def render_configuration() -> str:
    """A table for each command's file, then one for each section, whatever files have it."""
    parts = [f"## The file of `distkv {command}`\n\n{_table(kind)}" for command, kind in FILES.items()]
    for (path, section), commands in _sections().items():
        files = " and ".join(f"`distkv {command}`" for command in commands)
        note = f" {' '.join(section.__doc__.split())}" if section.__doc__ else ""
        parts.append(f"## `{path}`\n\nIn the file of {files}.{note}\n\n{_table(section, f'{path}.')}")
    return "\n\n".join(parts)


def _sections() -> dict[tuple[str, type[FrozenConfig]], list[str]]:
    found: dict[tuple[str, type[FrozenConfig]], list[str]] = {}
    for command, kind in FILES.items():
        for key in keys_of(kind):
            if key.section is not None:
                found.setdefault((key.path, key.section), []).append(command)
    return found


def _table(kind: type[FrozenConfig], prefix: str = "") -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        meaning = " ".join((field.description or "").split())
        if _section(field.annotation) is not None:
            meaning = f"{meaning} Keys: [`{prefix}{name}`](#{(prefix + name).replace('.', '')}).".strip()
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _type(field: FieldInfo) -> str:
    bounds = [
        words.format(f"{value:g}" if isinstance(value, float) else value)
        for part in field.metadata
        for name, words in _BOUNDS.items()
        if (value := getattr(part, name, None)) is not None
    ]
    return ", ".join([_words(field.annotation), *bounds])


def _words(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, FrozenConfig):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(x) for x in arguments if x is not type(None))
    if origin is Literal:
        return " or ".join(f"`{x}`" for x in arguments)
    if origin in (list, tuple):
        return f"list of {_words(arguments[0])}s"
    if origin is dict:
        return "mapping"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, FrozenConfig):
        changed = {key: getattr(field.default, key) for key in field.default.model_fields_set}
        return ", ".join(f"`{key}: {value}`" for key, value in changed.items())
    if field.default in (None, (), {}):
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _section(annotation: Any) -> type[FrozenConfig] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, FrozenConfig) else None
    return next((found for x in get_args(annotation) if (found := _section(x)) is not None), None)
