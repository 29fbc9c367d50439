# SPDX-License-Identifier: Apache-2.0
"""The byte-pair vocabulary and its files."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from turbopocket.pocket.tokenizer import (
    END,
    MAX_TOKENS,
    START,
    byte_alphabet,
    learn_merges,
    scene_words,
    write_tokenizer,
)

CAPTION = "a large red circle left of a small blue square on a white background"


@pytest.fixture(scope="module", params=[END, "!"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, request.param)
    loaded: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return loaded


def test_every_word_of_a_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(CAPTION).input_ids) == [
        START,
        *(f"{word}</w>" for word in CAPTION.split()),
        END,
    ]


def test_every_word_of_the_language_becomes_one_token(tokenizer: CLIPTokenizer) -> None:
    assert all(len(tokenizer.tokenize(word)) == 1 for word in scene_words())


def test_captions_are_padded_to_77_with_the_pad_token(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(CAPTION, padding="max_length", max_length=MAX_TOKENS).input_ids
    assert len(ids) == MAX_TOKENS == tokenizer.model_max_length
    assert set(ids[len(CAPTION.split()) + 2 :]) == {tokenizer.pad_token_id}


def test_the_vocabulary_is_laid_out_as_clip_s(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("!") == 0
    assert tokenizer.convert_tokens_to_ids("!</w>") == 256
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.bos_token_id + 1


def test_foreign_text_encodes_by_bytes_without_unknown_tokens(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("une tasse de café ☕", add_special_tokens=False).input_ids
    assert ids
    assert tokenizer.eos_token_id not in ids


def test_vocab_and_merges_files_hold_what_older_readers_expect(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "!")
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version")
    assert [tuple(line.split()) for line in lines[1:]] == learn_merges(scene_words())
    assert {"vocab.json", "tokenizer.json", "special_tokens_map.json"} <= {p.name for p in tmp_path.iterdir()}


def test_the_byte_alphabet_has_256_distinct_printable_letters() -> None:
    letters = byte_alphabet()
    assert len(set(letters)) == 256
    assert all(letter.isprintable() for letter in letters)
