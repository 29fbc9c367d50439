# SPDX-License-Identifier: Apache-2.0
"""Typed settings from TOML and from a command line: unknown keys and odd values are refused in one sentence each.

A section is a `Section`, or the frozen dataclass that a stage takes as its options; such a dataclass has
`__pydantic_config__ = {"extra": "forbid"}`.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from ..ground.errors import TurbopocketError
from ..ground.reading import read_text, words

_BARE = "_"


class Section(BaseModel):
    """Values by known keys, which nothing changes any more. Recipes of a kind are shipped in a folder of their own."""

    shipped_in: ClassVar[str] = "."
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """Returns the types of the values by key."""
        return {name: field.annotation for name, field in cls.model_fields.items()}

    def to_toml(self) -> str:
        """Returns all values with every default filled in, as TOML that reads back the same."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def keys_without_value(self) -> list[str]:
        """Returns the dotted keys that `to_toml` leaves out, since TOML has no word for none."""
        return list(_without_value(self.model_dump(mode="json")))


Settings = TypeVar("Settings", bound=Section)


def read_settings(source: str | Path, kind: type[Section]) -> tuple[str, str]:
    """Returns the text of a .toml file, or of a shipped recipe of this kind by name, and what errors call it.

    Raises TurbopocketError when there is none, or it can not be read; the message lists the shipped ones.
    """
    path = Path(source)
    if str(source) in shipped_recipes(kind):  # whatever lies here under that name: ./NAME is that
        return (_shipped(kind) / f"{source}.toml").read_text(), str(source)
    if path.suffix != ".toml" and not path.exists():
        raise TurbopocketError(
            f"recipe {str(source)!r} is neither a .toml file nor a shipped recipe; "
            f"shipped are {', '.join(shipped_recipes(kind))}"
        )
    try:
        return read_text(path), str(path)
    except TurbopocketError as error:
        raise TurbopocketError(f"recipe {error}", error.hint) from error


def shipped_recipes(kind: type[Section]) -> tuple[str, ...]:
    """Returns the names of the recipes of this kind in the package."""
    return tuple(sorted(entry.name[:-5] for entry in _shipped(kind).iterdir() if entry.name.endswith(".toml")))


def _shipped(kind: type[Section]) -> Traversable:
    return resources.files("turbopocket.export.recipes") / kind.shipped_in


def parse_settings(kind: type[Settings], text: str, name: str) -> Settings:
    """Returns the settings that TOML holds; `name` is what errors call it."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # broken syntax, absurd numbers, absurd nesting
        raise TurbopocketError(f"{name} is not TOML: {words(error)}") from error
    return make_settings(kind, values, name)


def make_settings(kind: type[Settings], values: Mapping[str, Any], name: str) -> Settings:
    """Returns checked settings from nested values, as a TOML file holds them."""
    try:
        return kind.model_validate_json(to_json(values, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        raise TurbopocketError(f"{name}: {_explain(error, kind)}") from error
    except TurbopocketError as error:
        raise TurbopocketError(f"{name}: {error}", error.hint) from error


def with_values(settings: Settings, values: Mapping[str, Any], assigned: Sequence[str] = ()) -> Settings:
    """Returns `settings` with a command line's values by dotted key, None leaving one as it is, and its KEY=VALUEs.

    The key of a KEY=VALUE is written as in TOML (`compress.pin."unet.conv_out"`), and so is the value, but for text,
    which may go without its quotes. Raises TurbopocketError for a text of another form, a key that is not known or is
    given twice, and a value that does not suit it.
    """
    asked = {tuple(dotted.split(".")): value for dotted, value in values.items() if value is not None}
    for text in assigned:
        path, value = parse_assignment(text)
        if clash := next((each for each in asked if each[: len(path)] == path[: len(each)]), None):
            raise TurbopocketError(f"--set {text}: {'.'.join(clash)} is given more than once")
        asked[path] = value
    nested = settings.model_dump()
    for path, value in asked.items():
        _put(nested, path, value)
    return make_settings(type(settings), nested, "command line")


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """Returns the key as its parts, and the value of a KEY=VALUE. Raises TurbopocketError for any other text."""
    key, equals, written = (part.strip() for part in text.partition("="))
    try:
        nested: Any = tomllib.loads(f"{key} = 0") if equals and "\n" not in text else None
    except (ValueError, RecursionError):
        nested = None
    if not isinstance(nested, dict) or not written:
        raise TurbopocketError(f"--set {text!r} is not KEY=VALUE", hint="like --set compress.budget=8MB")
    path = []
    while isinstance(nested, dict):
        ((part, nested),) = nested.items()
        path.append(part)
    try:
        value = tomllib.loads(f"{_BARE} = {written}")[_BARE]
    except (ValueError, RecursionError):
        value = written
    return tuple(path), value


def _without_value(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _without_value(value, f"{above}{key}.")
        elif value is None:
            yield f"{above}{key}"


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets one of nested values. Raises TurbopocketError where something else than a section is on the way."""
    section = values
    for depth, part in enumerate(path[:-1], start=1):
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise TurbopocketError(
                f"command line: {'.'.join(path)} is no key, since {'.'.join(path[:depth])} is a value, not a section"
            )
    section[path[-1]] = value


def _explain(error: ValidationError, kind: type[Section]) -> str:
    """Returns the first complaint in the house's words: key, what was found, what is known."""
    first = error.errors()[0]
    if isinstance(first.get("ctx", {}).get("error"), Exception):
        return str(first["ctx"]["error"])
    path = [str(part) for part in first["loc"]]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *above, key = path
        where = f" in [{'.'.join(above)}]" if above else ""
        return f"unknown key `{key}`{where}: known are {_listed(_keys(kind, above))}"
    if first["type"] in ("model_type", "dataclass_type"):
        return f"{'.'.join(path)} = {first['input']!r}: it is a section, with {_listed(_keys(kind, path))}"
    return f"{'.'.join(path)} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(kind: type[Any], path: Sequence[str]) -> list[str]:
    """The keys of the section at `path` below one of the given kind."""
    section = kind
    for part in path:
        section = _types(section)[part]
    return list(_types(section))


def _types(section: type[Any]) -> dict[str, Any]:
    if is_dataclass(section):
        return {field.name: field.type for field in fields(section)}
    keys: dict[str, Any] = section.keys()
    return keys


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
