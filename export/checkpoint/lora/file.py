# SPDX-License-Identifier: Apache-2.0
"""A LoRA as a user asks for it, on the command line and in a recipe alike: FILE or FILE:STRENGTH."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ....ground.errors import TurbopocketError

SUFFIX = ".safetensors"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and the factor, any finite number, by which its change of the weights is multiplied."""

    file: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: object) -> Self:
        """Returns what `text` asks for. A last colon is the path's own, unless a number or nothing but it follows it.

        So `C:/style.safetensors` is a path, and what follows `style.safetensors:` must be a number. Raises
        TurbopocketError when `text` names no file, or a strength that is not a finite number.
        """
        if not isinstance(text, str):
            raise TurbopocketError(f"a LoRA is {text!r}; allowed: text, FILE or FILE:STRENGTH")
        file, colon, strength = text.rpartition(":")
        if not (colon and (_NUMBER.fullmatch(strength) or file.lower().endswith(SUFFIX))):
            file, strength = text, "1"
        if not file or "\0" in file:
            raise TurbopocketError(f"LoRA {text!r} names no file; allowed: FILE or FILE:STRENGTH")
        if not _NUMBER.fullmatch(strength) or not math.isfinite(float(strength)):
            raise TurbopocketError(f"LoRA {text!r} asks for strength {strength!r}; allowed: a finite number, like 0.8")
        return cls(Path(file), float(strength))

    def __str__(self) -> str:
        """Returns the text that `parse` reads back as the same: without a strength of 1 where that is clear."""
        plain, whole = str(self.file), f"{self.file}:{self.strength!r}"
        return plain if self.strength == 1 and type(self).parse(plain) == self else whole
