# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as the text encoders want it: a fixed number of ids, and no word lost in silence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError
from ...ground.reading import one_sentence, read_text
from ..manifest import Manifest
from ..runner import component_spec

MOST_IDS = 4096
"""Of a prompt: published text encoders read 77 to 512."""


@dataclass(frozen=True)
class Tokens:
    """`ids` [length] int64, padded, and `mask` [length] int64, 1 for a token and 0 for padding; `cut` is the end of the
    text that found no room, or None."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    cut: str | None


class Tokenizer:
    """Turns text into exactly `length` ids by the rules of a `tokenizer.json`, its padding included.

    `replacements` are tokens that stand for several vectors, each with the text that names all of them; they take the
    tokens' places in the text first, as in diffusers' `maybe_convert_prompt`.
    """

    def __init__(self, path: Path, length: int, replacements: Mapping[str, str] | None = None) -> None:
        with one_sentence(f"{path} cannot be read as a tokenizer"):
            self._rules = tokenizers.Tokenizer.from_str(read_text(path))
        self._path = path
        padding = self._rules.padding
        if padding is None:
            # CLIP's two tokenizers pad with different ids, so there is nothing safe to assume.
            raise TurbopocketError(
                f"{path} does not say which id fills the end", hint="enable_padding(...) before saving it"
            )
        self.pad_id: int = padding["pad_id"]
        self.length = length
        self._replacements = replacements or {}
        self._rules.no_padding()
        self._rules.no_truncation()

    def encode(self, text: str) -> Tokens:
        """The ids of `text` between start and end mark; a text too long loses its end, never the end mark.

        Raises TurbopocketError when it holds tokens that can not be replaced one after the other.
        """
        with one_sentence(f"{self._path} can not turn the prompt {text[:40]!r} into ids"):
            text = self._replaced(text)
            found = self._rules.encode(text)
        ids = found.ids
        if len(ids) <= self.length:
            padding = self.length - len(ids)
            mask = [1] * len(ids) + [0] * padding
            return Tokens(np.array(ids + [self.pad_id] * padding, np.int64), np.array(mask, np.int64), None)
        kept = ids[: self.length - 1] + ids[-1:]
        first_cut = found.offsets[self.length - 1][0]
        return Tokens(np.array(kept, np.int64), np.ones(self.length, np.int64), text[first_cut:])

    def _replaced(self, text: str) -> str:
        """The text with every vector of a token named that it holds.

        Only what the rules find as a token counts, so `<cat>_1` alone does not hold `<cat>`. diffusers goes through the
        tokens in no fixed order: where another order gives another text, there is nothing to be equal to.
        """
        if not self._replacements:
            return text
        tokens = self._rules.encode(text, add_special_tokens=False).tokens
        held = sorted(set(tokens) & self._replacements.keys())
        mixed = [(a, b) for a in held for b in held if a != b and a in self._replacements[b]]
        first, last = ("", "") if mixed else (self._put(text, order) for order in (held, held[::-1]))
        if mixed or first != last:
            names = " and ".join(repr(token) for token in (mixed[0] if mixed else held))
            raise TurbopocketError(
                f"the prompt holds {names}, of which each stands for several vectors, and their names overlap; one of "
                "them at a time is allowed"
            )
        return first

    def _put(self, text: str, tokens: Sequence[str]) -> str:
        for token in tokens:
            text = text.replace(token, self._replacements[token])
        return text


def open_tokenizers(folder: Path, manifest: Manifest) -> Mapping[str, Tokenizer]:
    """{component: its tokenizer}, with the length that the component's ids have in the manifest."""
    return {
        component: Tokenizer(
            folder / place / "tokenizer.json",
            _length(manifest, component),
            manifest.prompt_replacements.get(component),
        )
        for component, place in manifest.tokenizers.items()
    }


def _length(manifest: Manifest, component: str) -> int:
    ids = manifest.pipeline.text_encoders[component].ids
    for spec in component_spec(manifest, component).loop_inputs:
        if spec.name == ids and spec.shape and isinstance(spec.shape[-1], int):
            if not 2 <= spec.shape[-1] <= MOST_IDS:
                raise TurbopocketError(f"{component} reads {spec.shape[-1]:,} ids; 2 to {MOST_IDS:,} are possible")
            return spec.shape[-1]
    raise TurbopocketError(f"{component} has a tokenizer but no input {ids} of a fixed length")
