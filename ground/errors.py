# SPDX-License-Identifier: Apache-2.0
"""Errors a user can meet when an artifact is built, read or run.

TurbopocketError (exit code 1: the request was wrong)
└── ParityFailed (exit code 3: an artifact does not compute what PyTorch computes)

`quant.errors` holds the same pair for compression (`QuantError`, and `OverBudget` with exit code 2).
"""


class TurbopocketError(Exception):
    """Says what was asked, what was found and what is allowed; `hint` is the one action to take, if any."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ParityFailed(TurbopocketError):
    """A runtime's output is further from PyTorch's than its limit; the message names the guilty layer."""

    exit_code = 3
