# SPDX-License-Identifier: Apache-2.0
"""What can be done about a key of a config, and the check that holds a config to a table of such decisions."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError

Check = Callable[[Any], str | None]
"""None for a value that can be used, else what is needed, as the end of a sentence."""
MOST_ITEMS = 8
"""Entries of a list with one number a block: published models have at most four blocks, and each halves the picture."""
SHOWN_LETTERS = 80


@dataclass(frozen=True)
class Graph:
    """The class builds it into its graph, whatever it is, once `check` has nothing against it."""

    check: Check | None = None


@dataclass(frozen=True)
class Honoured:
    """Used outside the class's graph; `where` says by what."""

    where: str
    check: Check | None = None


@dataclass(frozen=True)
class Only:
    """One of `values`, of which an absent key may not say otherwise; any other is refused for this `reason`."""

    values: tuple[object, ...]
    reason: str


@dataclass(frozen=True)
class NoEffect:
    """Changes no picture; `why` says why not."""

    why: str


@dataclass(frozen=True)
class LeftOut:
    """Changes no picture of ours because the class never gets it; `why` says what it would do there."""

    why: str


Treatment = Graph | Honoured | Only | NoEffect | LeftOut
KeyTable = Mapping[str, Treatment]


def check_config(
    config: Mapping[str, Any], table: KeyTable, defaults: Mapping[str, Any], path: Path, class_name: str
) -> None:
    """Returns when every key of a config is in the table with a value that can be used.

    A key that is not may be there with its class's default or with nothing (null, false, an empty list): that is how
    settings of other versions are left behind. Raises TurbopocketError for any other, by its name.
    """
    for key, value in config.items():
        if key not in table and not _says_nothing(value) and _plain(value) != _plain(defaults.get(key)):
            raise TurbopocketError(
                f"{path}: {shown(key)} is {shown(value)}, a setting of {class_name} that is not known here, so the "
                "pictures might not be the model's; known ones, or none in its place, are allowed"
            )
    for key, treatment in table.items():
        value = config.get(key, defaults.get(key))
        if isinstance(treatment, Only):
            if not any(type(value) is type(allowed) and value == allowed for allowed in treatment.values):
                supported = " or ".join(repr(allowed) for allowed in treatment.values)
                raise TurbopocketError(
                    f"{path}: {key} is {shown(value)}; supported: {supported}, because {treatment.reason}"
                )
        elif isinstance(treatment, Graph | Honoured) and treatment.check is not None and key in config:
            needed = treatment.check(value)
            if needed is not None:
                raise TurbopocketError(f"{path}: {key} is {shown(value)}; {needed}")


def given_to_class(config: Mapping[str, Any], table: KeyTable, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a checked config that its class gets: parameters of its constructor, but none `LeftOut`."""
    return {
        key: value
        for key, value in config.items()
        if key in defaults and not isinstance(table.get(key, LeftOut("not in the table")), LeftOut)
    }


def constructor_defaults(config_class: Any) -> dict[str, Any]:
    """Returns the parameters of a class's constructor that have a default, with it."""
    parameters = inspect.signature(config_class).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def whole(least: int, most: int, published: str) -> Check:
    """A check for a whole number, a list of them or a list of lists, each in the range; `published` says what is usual.

    Null passes: where a class allows it, it means its own choice.
    """

    def check(value: Any) -> str | None:
        needed = f"whole numbers from {least:,} to {most:,} are allowed, published models have {published}"
        return None if _all(value, lambda n: type(n) is int and least <= n <= most) else needed

    return check


def one_whole(least: int, most: int) -> Check:
    """A check for one whole number in the range."""

    def check(value: Any) -> str | None:
        in_range = type(value) is int and least <= value <= most
        return None if in_range else f"a whole number from {least:,} to {most:,} is needed"

    return check


def number(least: float, most: float) -> Check:
    """A check for a number in the range."""

    def check(value: Any) -> str | None:
        in_range = type(value) in (int, float) and least <= value <= most
        return None if in_range else f"a number from {least:g} to {most:g} is needed"

    return check


def numbers(positive: bool) -> Check:
    """A check for null or a list of finite numbers, above zero if `positive`."""

    def check(value: Any) -> str | None:
        if value is None or (isinstance(value, list) and value and all(map(good, value))):
            return None
        return f"a list of finite numbers{' above 0' if positive else ''} is needed"

    def good(item: Any) -> bool:
        return type(item) in (int, float) and math.isfinite(item) and (item > 0 or not positive)

    return check


def prompt_length(value: Any) -> str | None:
    """A check for how many ids a prompt has, or null; transformers writes 1e30 where nobody said."""
    is_whole = type(value) is int or (type(value) is float and value.is_integer())
    if value is None or (is_whole and value > 1):
        return None
    return "the number of a prompt's ids is needed, its start and end among them: a whole number above 1"


def flag(value: Any) -> str | None:
    """A check for true, false or null."""
    return None if value is None or isinstance(value, bool) else "true or false is needed"


def shown(value: object) -> str:
    """Returns a value as a message shows it: on one line and not too long."""
    text = repr(value)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"


def _all(value: Any, good: Callable[[Any], bool]) -> bool:
    if isinstance(value, list):
        return len(value) <= MOST_ITEMS and all(_all(item, good) for item in value)
    return value is None or good(value)


def _says_nothing(value: Any) -> bool:
    if isinstance(value, list):
        return all(item is None for item in value)
    return value is None or value is False or value in ("", {})


def _plain(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
