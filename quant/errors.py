# SPDX-License-Identifier: Apache-2.0
"""Errors a user can meet when weights are measured, planned or compressed.

QuantError (exit code 1: the request was wrong)
└── OverBudget (exit code 2: nothing that was allowed fits the budget)
"""

from collections.abc import Iterator
from contextlib import contextmanager


class QuantError(Exception):
    """Says what was asked, what was found and what is allowed; `hint` is the one action to take, if any."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class OverBudget(QuantError):
    """The smallest choice does not fit; the message gives both numbers in bytes."""

    exit_code = 2


@contextmanager
def of_layer(name: str) -> Iterator[None]:
    """Puts the layer's name before the message of a QuantError from the block: formats and fits know no names."""
    try:
        yield
    except QuantError as error:
        raise QuantError(f"{name}: {error}", error.hint) from error
