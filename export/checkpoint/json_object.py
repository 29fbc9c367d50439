# SPDX-License-Identifier: Apache-2.0
"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError

MOST_BYTES = 64_000_000
"""Of one file: CLIP's vocabulary takes a megabyte, the shard index of a model of billions of weights less."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; raises TurbopocketError when it is absent, or holds none."""
    if not path.exists():
        raise TurbopocketError(f"{path} does not exist")
    if not path.is_file():
        raise TurbopocketError(f"{path} is not a plain file")
    try:
        if (size_bytes := path.stat().st_size) > MOST_BYTES:
            raise TurbopocketError(f"{path} has {size_bytes:,} bytes; at most {MOST_BYTES:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TurbopocketError(f"{path} can not be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # broken syntax or encoding, absurd numbers, absurd nesting
        raise TurbopocketError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TurbopocketError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
