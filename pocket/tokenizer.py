# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the bundled models: CLIP's two, a byte-pair vocabulary learned from the scene language, and T5's.

CLIP's are laid out as OpenAI's: 256 bytes, 256 bytes that end a word, merges, start of text, end of text. Every word of
a caption is one token; any other text still encodes, byte by byte.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer, T5Tokenizer

from .scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
T5_TOKENS = 120
"""As many as PixArt-Alpha's pipeline pads a prompt to."""
T5_SPACE = "\u2581"
T5_EXTRA_IDS = 100

Word = tuple[str, ...]
Pair = tuple[str, str]


def scene_words() -> list[str]:
    """Every word of the scene language, each once."""
    phrases = (*SHAPES, *COLOURS, *SIZES, *RELATIONS, *BACKGROUNDS, "a", "on", "background")
    return sorted({word for phrase in phrases for word in phrase.split()})


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in CLIP's order ("!" is 0).

    Bytes that print stand for themselves; the others, in order, for the characters from U+0100 on
    (Radford et al. 2019, GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def learn_merges(words: list[str]) -> list[Pair]:
    """Byte-pair merges, most frequent pair first, until every word is a single token."""
    split: list[Word] = [(*word[:-1], word[-1] + "</w>") for word in words]
    merges: list[Pair] = []
    while counts := Counter(pair for word in split for pair in itertools.pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merged(word, best) for word in split]
    return merges


def _merged(word: Word, pair: Pair) -> Word:
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


def write_tokenizer(folder: Path, pad_token: str, merges: Sequence[Pair] | None = None) -> None:
    """A tokenizer folder that current and older transformers, and readers of merges.txt, open.

    Args:
        pad_token: what fills up to 77 tokens; SDXL's first tokenizer uses the end token, its second "!".
        merges: the scene language's by default; each makes one token of two that the bytes or earlier merges are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(scene_words()) if merges is None else list(merges)
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(each + "</w>" for each in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer: each word of the scene language is one piece; of any other text, each printable ASCII character.

    Marks and the 100 extra ids stand where the published vocabularies have them.
    """
    marks = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>")]
    words = [(T5_SPACE + word, -2.0) for word in scene_words()]
    characters = [(character, -8.0) for character in (T5_SPACE, *map(chr, range(0x21, 0x7F)))]
    extra = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(T5_EXTRA_IDS))]
    return T5Tokenizer(vocab=[*marks, *words, *characters, *extra], extra_ids=T5_EXTRA_IDS, model_max_length=T5_TOKENS)
