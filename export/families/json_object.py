# SPDX-License-Identifier: Apache-2.0
"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from ...runtimes.errors import TurbopocketError


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds; raises TurbopocketError when it is absent, or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TurbopocketError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TurbopocketError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TurbopocketError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content
