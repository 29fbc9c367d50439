# SPDX-License-Identifier: Apache-2.0
"""Errors a user can meet; the exit code of the command line is the error's.

TurbopocketError (exit code 1: the request was wrong)
├── OverBudget (exit code 2: nothing that was allowed fits the budget)
└── ParityFailed (exit code 3: an artifact does not compute what PyTorch computes)
"""

from collections.abc import Iterator
from contextlib import contextmanager


class TurbopocketError(Exception):
    """Says what was asked, what was found and what is allowed; `hint` is the one action to take, if any."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class OverBudget(TurbopocketError):
    """The smallest choice does not fit; the message gives both numbers in bytes."""

    exit_code = 2


class ParityFailed(TurbopocketError):
    """A runtime's output is further from PyTorch's than its limit; the message names the guilty layer."""

    exit_code = 3


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Puts the layer's name before the message of an error from the block, which keeps its class: formats and fits
    know no names."""
    try:
        yield
    except TurbopocketError as error:
        raise type(error)(f"{name}: {error}", error.hint) from error
