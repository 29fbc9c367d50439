# SPDX-License-Identifier: Apache-2.0
"""Who made a model and under which licence, as its model card says: the head of README.md in the model's folder."""

import re
from dataclasses import dataclass
from pathlib import Path

CARD = "README.md"
_MOST_BYTES = 200_000
_MOST_LETTERS = 200
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ModelCard:
    """What the card says; None where it says nothing."""

    license: str | None = None
    author: str | None = None


NO_CARD = ModelCard()


def model_card(folder: Path) -> ModelCard:
    """What the card in that folder says; nothing where there is none, or none that can be read.

    The head is YAML between lines of dashes (Hugging Face's "Model Cards"): `license`, or `license_name` where that is
    `other`, and `author`, of which plain values of one line are read.
    """
    path = folder / CARD
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return NO_CARD
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return NO_CARD
    head = _HEAD.match(text)
    values = dict(re.findall(r"^(\w+):[ \t]*(\S.*?)[ \t]*$", head[1], re.MULTILINE)) if head else {}
    told = {name: _plain(value) for name, value in values.items()}
    license_name = told.get("license")
    if license_name == "other":
        license_name = told.get("license_name") or license_name
    return ModelCard(license_name, told.get("author"))


def _plain(value: str) -> str | None:
    """A scalar without its quotes; None for lists, blocks and other values of more than a line."""
    value = value.strip("'\"")
    return value if value and value[0] not in "[{|>&*!" and len(value) <= _MOST_LETTERS else None
