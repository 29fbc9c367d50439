# SPDX-License-Identifier: Apache-2.0
"""The one door for what a user gave: whatever goes wrong while it is read is one sentence that says what was read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TurbopocketError

MOST_BYTES = 64_000_000
"""Of one text file: CLIP's vocabulary takes a megabyte, the shard index of a model of billions of weights less."""
MOST_LETTERS = 300
"""Of a library's own words."""


@contextmanager
def one_sentence(start: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes a TurbopocketError that says `start`, a colon, and its words.

    `start` names what was being read, and for what. Rust's panics are no `Exception`; what ends or stops a program is
    none of a library's business, and is no sentence.
    """
    try:
        yield
    except TurbopocketError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TurbopocketError(f"{start}: {words(error)}") from error


def words(error: BaseException) -> str:
    """An error's own words on one line, not too long, without a full stop."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = f"there is no {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a plain file in UTF-8.

    Raises TurbopocketError when it is absent, no plain file (which may have no end), too large, or no UTF-8.
    """
    if "\0" in str(path):
        raise TurbopocketError(f"{str(path)!r} is no path: it holds a NUL")
    try:
        if not path.is_file():
            raise TurbopocketError(f"{path} {'is not a plain file' if path.exists() else 'does not exist'}")
        if (size_bytes := path.stat().st_size) > most_bytes:
            raise TurbopocketError(f"{path} has {size_bytes:,} bytes; at most {most_bytes:,} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TurbopocketError(f"{path} can not be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TurbopocketError(f"{path} is not UTF-8 text: {error}") from error


def parse_json(text: str | bytes, name: str) -> Any:
    """The values that JSON holds; `name` is what errors call it. TurbopocketError for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also broken encoding, and integers of thousands of digits
        raise TurbopocketError(f"{name} is not JSON: {words(error)}", hint="the file may be cut off") from error


def read_json(path: Path) -> Any:
    """The values in a JSON file. Raises TurbopocketError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))
