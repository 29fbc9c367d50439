# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint as one file that a phone can read."""

from pathlib import Path
from typing import Any

from ...runtimes.errors import TurbopocketError
from .json_object import read_json_object

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")


def tokenizer_json(folder: Path) -> bytes:
    """Returns the `tokenizers` JSON of a CLIP tokenizer folder, be it only vocab.json and merges.txt.

    Its `padding` gives the context length and the padding token, which differs between SDXL's two tokenizers.
    Raises TurbopocketError when the folder holds no whole CLIP tokenizer.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    length = config.get("model_max_length")
    if not isinstance(length, int):
        raise TurbopocketError(f"{folder}: model_max_length is {length!r}; the number of ids is needed")
    if (found := config.get("tokenizer_class", CLASSES[0])) not in CLASSES:
        raise TurbopocketError(f"{folder} holds a {found}; supported: {CLASSES[0]}")
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise TurbopocketError(f"{folder} has neither tokenizer.json nor {name}")
    tokenizer = _read(folder)
    rules = tokenizer.backend_tokenizer
    rules.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return rules.to_str().encode("utf-8")


def _read(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TurbopocketError(f"{folder} cannot be read as a CLIP tokenizer: {str(error).rstrip('.')}") from error
