# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object that says which version of its form it has: one writer, one reader."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import TurbopocketError
from .files import write_whole
from .reading import read_json, words

Parsed = TypeVar("Parsed")


def save_record(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the values, of which one is the `schema_version`, as JSON; whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_record(path: Path, what: str, newest: int, parse: Callable[[dict[str, Any], int], Parsed]) -> Parsed:
    """What `parse` makes of the object in a file and of its `schema_version`, which is one from 1 to `newest`.

    `what` is what such a file is called. Raises TurbopocketError naming the file when it is missing, no JSON, of
    another version or of another shape, which is whatever `parse` stumbles over.
    """
    try:
        values = read_json(path)
        return parse(values, schema_version(values, "it", newest))
    except (TurbopocketError, ValueError, LookupError, TypeError, AttributeError) as error:
        hint = error.hint if isinstance(error, TurbopocketError) else None
        raise TurbopocketError(f"{path}: not {what}: {words(error)}", hint) from error


def schema_version(values: Any, name: str, newest: int) -> int:
    """The `schema_version` of a JSON value that errors call `name`; TurbopocketError for none from 1 to `newest`."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        newer = isinstance(version, int) and version > newest
        known = "1" if newest == 1 else f"1 to {newest}"
        raise TurbopocketError(
            f"{name} has schema_version {version!r}: this version reads {known}",
            hint="a newer turbopocket wrote it: install that" if newer else None,
        )
    return version
