# SPDX-License-Identifier: Apache-2.0
"""What a library raises while it reads a user's file, as the end of one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...ground.errors import TurbopocketError

MOST_LETTERS = 300


@contextmanager
def one_sentence(start: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes a TurbopocketError that says `start`, a colon, and its words.

    `start` names what was being read, and for what. Rust's panics are no `Exception`, so all but the two that end a
    program are meant.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, TurbopocketError):
        raise
    except BaseException as error:
        raise TurbopocketError(f"{start}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    text = f"there is no {text}" if isinstance(error, KeyError) else text
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
