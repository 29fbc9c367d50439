# SPDX-License-Identifier: Apache-2.0
"""The other end of `process`: reads requests of `wire` on stdin and answers them on stdout until stdin ends.

Also runs on the emulated CPU, so it needs nothing but numpy.
"""

import os
import sys
from collections.abc import Callable
from typing import IO

from ..limits import limit_memory
from . import wire

Answer = Callable[[int, str, IO[bytes]], wire.Arrays]
"""What a request of this verb and key asks for; its arguments are read from the pipe before anything can fail."""


def serve(answer: Answer) -> None:
    """Serves; what libraries print goes to stderr, so that it does not fall between tensors.

    A model that asks for more memory than is available gets an error of its own, and nobody else's is taken.
    """
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limit_memory()
    requests = sys.stdin.buffer
    while verb := requests.read(1):
        key = wire.read_text(requests)
        try:
            found = answer(verb[0], key, requests)
        except wire.Broken:
            raise
        except Exception as error:  # runtimes' errors share no base class
            replies.write(bytes([wire.FAILED]))
            wire.write_text(replies, str(error) or type(error).__name__)
        else:
            replies.write(bytes([wire.DONE]))
            wire.write_tensors(replies, found)
        replies.flush()
