# SPDX-License-Identifier: Apache-2.0
"""Ids equal those of transformers' CLIPTokenizer as the pipelines call it, for both padding ids of SDXL."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.tokenizer import Tokenizer, open_tokenizers
from turbopocket.runtimes.manifest import Manifest

from ..conftest import write_toy_tokenizer

TEXTS = [
    "a red circle on the blue square",
    "A  RED\tcircle!",
    "",
    "  white cat  ",
    "naïve café, 12 cats' 🐈",
    "the " * 74,
    "the " * 75,
    "the " * 76 + "cat on a square!",
    "!",
]


@pytest.fixture(params=["tokenizer", "tokenizer_2"])
def clip(request: pytest.FixtureRequest, tiny_sdxl: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tiny_sdxl / request.param)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_ids_are_those_of_the_clip_tokenizer(clip: Any, tmp_path: Path, text: str) -> None:
    expected = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    rules = clip.backend_tokenizer
    rules.enable_padding(pad_id=clip.pad_token_id, pad_token=clip.pad_token)
    rules.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer(tmp_path / "tokenizer.json", 77).encode(text)
    assert found.ids.dtype == np.int64
    assert found.ids.tolist() == expected


def test_text_that_fits_exactly_is_not_cut(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path / "tokenizer.json")
    tokens = Tokenizer(tmp_path / "tokenizer.json", 6).encode("a red circle on")
    assert tokens.cut is None
    assert tokens.ids.tolist() == [0, 3, 4, 5, 6, 1]


def test_cut_words_are_returned_as_they_were_written(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path / "tokenizer.json")
    tokens = Tokenizer(tmp_path / "tokenizer.json", 4).encode("a red  Blue   circle ")
    assert tokens.cut == "Blue   circle "
    assert tokens.ids.tolist() == [0, 3, 4, 1]


def test_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    write_toy_tokenizer(tmp_path / "tokenizer.json", pad_id=None)
    with pytest.raises(TurbopocketError, match="does not say which id fills the end"):
        Tokenizer(tmp_path / "tokenizer.json", 8)


def test_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TurbopocketError, match=r"tokenizer.json cannot be read as a tokenizer: "):
        Tokenizer(tmp_path / "tokenizer.json", 8)


def test_length_comes_from_the_encoder_input(toy_artifact: Path, toy_manifest: Manifest) -> None:
    opened = open_tokenizers(toy_artifact, toy_manifest)
    assert list(opened) == ["text_encoder"]
    assert opened["text_encoder"].encode("red").ids.tolist() == [0, 4, 1, 15, 15, 15, 15, 15]


def test_encoder_without_fixed_length_is_refused(toy_artifact: Path, toy_manifest: Manifest) -> None:
    as_json = toy_manifest.model_dump()
    as_json["components"]["text_encoder"]["inputs"][0]["shape"] = [1, "tokens"]
    with pytest.raises(TurbopocketError, match="text_encoder has a tokenizer but no input input_ids of a fixed"):
        open_tokenizers(toy_artifact, Manifest.model_validate(as_json))


def test_truncation_stored_in_the_file_does_not_hide_the_cut_words(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    write_toy_tokenizer(path)
    rules = tokenizers.Tokenizer.from_file(str(path))
    rules.enable_truncation(4)
    rules.save(str(path))
    assert Tokenizer(path, 4).encode("a red blue circle").cut == "blue circle"


def _replacing(manifest: Manifest, replacements: dict[str, dict[str, str]]) -> Manifest:
    return Manifest.model_validate(manifest.model_dump() | {"prompt_replacements": replacements})


def test_replacements_of_the_manifest_come_before_the_tokenizer(toy_artifact: Path, toy_manifest: Manifest) -> None:
    manifest = _replacing(toy_manifest, {"text_encoder": {"red": "red blue"}})
    found = open_tokenizers(toy_artifact, manifest)["text_encoder"].encode("a red circle")
    assert found.ids.tolist() == [0, 3, 4, 7, 5, 1, 15, 15]


def test_only_a_whole_token_is_replaced(toy_artifact: Path, toy_manifest: Manifest) -> None:
    """`reddish` has the letters of `red`, and is one unknown word."""
    manifest = _replacing(toy_manifest, {"text_encoder": {"red": "red blue"}})
    assert open_tokenizers(toy_artifact, manifest)["text_encoder"].encode("reddish").ids.tolist()[:3] == [0, 2, 1]


@pytest.mark.parametrize("first", ["a", "red"])
def test_replacements_that_depend_on_their_order_are_refused(tmp_path: Path, first: str) -> None:
    write_toy_tokenizer(tmp_path / "tokenizer.json")
    replacements = dict(sorted({"a": "a red", "red": "red blue"}.items(), reverse=first == "red"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", 8, replacements)
    assert tokenizer.encode("red").ids.tolist()[:4] == [0, 4, 7, 1]
    with pytest.raises(TurbopocketError, match="the prompt holds 'red' and 'a', of which each stands for several"):
        tokenizer.encode("a red circle")


@pytest.mark.parametrize(
    ("replacements", "said"),
    [
        ({"unet": {"a": "b"}}, "prompt_replacements names unet, which has no tokenizer"),
        ({"text_encoder": {"": "b"}}, "at least 1 character"),
    ],
)
def test_replacements_that_no_prompt_can_have_are_refused(
    toy_manifest: Manifest, replacements: dict[str, dict[str, str]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _replacing(toy_manifest, replacements)
