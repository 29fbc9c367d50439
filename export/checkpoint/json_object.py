# SPDX-License-Identifier: Apache-2.0
"""Reading the JSON files of a checkpoint."""

from pathlib import Path
from typing import Any

from ...ground.errors import TurbopocketError
from ...ground.reading import read_json


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; raises TurbopocketError when it is absent, or holds none."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise TurbopocketError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
