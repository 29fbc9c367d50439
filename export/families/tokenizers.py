# SPDX-License-Identifier: Apache-2.0
"""The kinds of tokenizers that text encoders have."""

from collections.abc import Mapping
from dataclasses import dataclass

from .flux2_keys import QWEN_TOKENIZER
from .key_tables import CLIP_TOKENIZER
from .keys import KeyTable
from .pixart_keys import T5_TOKENIZER


@dataclass(frozen=True)
class FileLengths:
    """Bytes of published tokenizer files for each id, by the files' names; `of` says whose these are."""

    of: str
    per_id: Mapping[str, float]


CLIPS = FileLengths("CLIP's own", {"tokenizer.json": 34.1, "vocab.json": 21.5, "merges.txt": 10.7})
"""For 49,408 ids 1,681,792, 1,059,962 and 524,619 bytes."""
QWENS = FileLengths("Qwen3's own", {"tokenizer.json": 75.2, "vocab.json": 18.3, "merges.txt": 11.0})
"""For 151,936 ids 11,422,654, 2,776,833 and 1,671,853 bytes."""


@dataclass(frozen=True)
class TokenizerKind:
    """One class of transformers: its name, what is done about each key of its config, and the files of a vocabulary
    that has no tokenizer.json.

    `marks` are the special tokens that it cannot do without. `needs` is the package that reads those files, if they
    need one. `normalizes` says that the pipeline writes a prompt in lower case and without white space around it; a
    tokenizer.json of ours does so itself. `multi_vector` says that the pipeline puts several vectors in the place of
    one added token (textual inversion). `lengths` are those of files that are not there.
    """

    class_name: str
    title: str
    keys: KeyTable
    vocabulary: tuple[str, ...]
    marks: tuple[str, ...]
    needs: str | None = None
    normalizes: bool = False
    multi_vector: bool = False
    lengths: FileLengths = CLIPS

    @property
    def named(self) -> list[list[str]]:
        """Library and class, as a model_index.json names it, the usual one first."""
        return [["transformers", name] for name in (self.class_name, f"{self.class_name}Fast")]


CLIP = TokenizerKind(
    "CLIPTokenizer",
    "CLIP",
    CLIP_TOKENIZER,
    vocabulary=("vocab.json", "merges.txt"),
    marks=("pad_token", "unk_token"),
    multi_vector=True,
)

T5 = TokenizerKind(
    "T5Tokenizer",
    "T5",
    T5_TOKENIZER,
    vocabulary=("spiece.model",),
    marks=("pad_token", "unk_token", "eos_token"),
    needs="sentencepiece",
    normalizes=True,
)

QWEN = TokenizerKind(
    "Qwen2Tokenizer",
    "Qwen",
    QWEN_TOKENIZER,
    vocabulary=("vocab.json", "merges.txt"),
    marks=("pad_token", "eos_token"),
    lengths=QWENS,
)
