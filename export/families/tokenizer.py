# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint as one file that a phone can read."""

from pathlib import Path

from ...runtimes.errors import TurbopocketError
from .json_object import read_json_object


def tokenizer_json(folder: Path) -> bytes:
    """Returns the `tokenizers` JSON of a CLIP tokenizer folder, be it only vocab.json and merges.txt.

    Its `padding` gives the context length and the padding token, which differs between SDXL's two tokenizers.
    Raises TurbopocketError when the folder holds no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise TurbopocketError(f"{folder} has neither tokenizer.json nor {name}")
    found = read_json_object(folder / "tokenizer_config.json").get("tokenizer_class", "CLIPTokenizer")
    if found not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise TurbopocketError(f"{folder} holds a {found}; supported: CLIPTokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(
        length=tokenizer.model_max_length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    return backend.to_str().encode("utf-8")
