# SPDX-License-Identifier: Apache-2.0
"""The tokenizers of a checkpoint: what they do to a prompt, and each as one file that a phone can read."""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from ...ground.errors import TurbopocketError
from ...ground.reading import MOST_BYTES, one_sentence
from ..families.keys import Graph, check_config
from ..families.tokenizers import TokenizerKind
from .json_object import read_json_object

MOST_VECTORS = 10_000
"""Of one token, where each of a prompt's at most 4,096 ids could be one; counting ends there."""


@dataclass(frozen=True)
class PromptRules:
    """How prompts become ids: `tokens` of them for every encoder, after `replacements` in the text for each."""

    tokens: int
    replacements: Mapping[str, Mapping[str, str]]


def prompt_rules(
    tokenizers: Mapping[str, Path],
    encoders: Mapping[str, Any],
    kind: TokenizerKind,
    with_files: bool,
    tokens: int | None = None,
) -> PromptRules:
    """Returns how prompts become ids; `encoders` are the text encoders' configs, by the names of `tokenizers`.

    `tokens` is the number of ids where the pipeline says it, else tokenizers and encoders do. Without `with_files`
    tokenizers that are not there count as the encoders' own. Raises TurbopocketError for ones that are of another kind,
    not whole, give ids that their encoder does not have, or give two encoders different numbers of ids.
    """
    lengths, replacements = {}, {}
    for encoder, folder in tokenizers.items():
        config = encoders[encoder]
        there = has_vocabulary(folder, kind)
        said = _config(folder, kind) if with_files or there or (folder / "tokenizer_config.json").is_file() else {}
        lengths[encoder] = tokens or min(_length(said), config.max_position_embeddings)
        if with_files or there:
            tokenizer = _read(folder, kind)
            _check_ids(tokenizer, folder, encoder, config.vocab_size)
            replacements[encoder] = _multi_vector(tokenizer) if kind.multi_vector else {}
    if len(set(lengths.values())) > 1:
        found = " and ".join(f"{length} ids for {encoder}" for encoder, length in lengths.items())
        raise TurbopocketError(
            f"{next(iter(tokenizers.values())).parent}: a prompt has {found}; one number is needed, because the UNet "
            "reads the states of all encoders side by side"
        )
    return PromptRules(min(lengths.values()), {name: each for name, each in replacements.items() if each})


def has_vocabulary(folder: Path, kind: TokenizerKind) -> bool:
    """Whether a tokenizer folder holds the files that say which text is which id."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in kind.vocabulary)


def tokenizer_json(folder: Path, kind: TokenizerKind, length: int | None = None) -> bytes:
    """Returns the `tokenizers` JSON of a tokenizer folder, be it only the kind's own vocabulary files.

    Its `padding` gives the padding token, which differs between SDXL's two tokenizers, and fills up to `length` ids.
    What the pipeline does to a prompt first is its normalizer. Raises TurbopocketError when the folder holds no whole
    tokenizer of that kind.
    """
    tokenizer = _read(folder, kind)
    rules = tokenizer.backend_tokenizer
    rules.no_truncation()
    rules.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    if kind.normalizes:
        own = [rules.normalizer] if rules.normalizer is not None else []
        rules.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *own])
    return rules.to_str().encode("utf-8")


def _config(folder: Path, kind: TokenizerKind) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    check_config(config, kind.keys, {}, path, f"a {kind.class_name}")
    return config


def _length(config: Mapping[str, Any]) -> float:
    """How many ids the tokenizer's config says a prompt has; infinite when it does not say."""
    found = config.get("model_max_length", config.get("max_len"))
    return float("inf") if found is None else int(found)


def _read(folder: Path, kind: TokenizerKind) -> Any:
    """transformers' tokenizer of the folder, whose every setting is one that our runtimes repeat."""
    _config(folder, kind)
    _check_special_tokens(folder / "special_tokens_map.json", kind)
    if not has_vocabulary(folder, kind):
        missing = " and ".join(name for name in kind.vocabulary if not (folder / name).is_file())
        raise TurbopocketError(f"{folder} has neither tokenizer.json nor {missing}")
    if not (folder / "tokenizer.json").is_file() and kind.needs and importlib.util.find_spec(kind.needs) is None:
        raise TurbopocketError(
            f"{folder} has {' and '.join(kind.vocabulary)} and no tokenizer.json; the package {kind.needs}, which "
            "reads that, is not installed",
            hint=f"pip install {kind.needs} protobuf, or have transformers save the tokenizer where they are installed",
        )
    for name in ("tokenizer.json", *kind.vocabulary, "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        if not 0 < (size_bytes := (folder / name).stat().st_size) <= MOST_BYTES:
            raise TurbopocketError(f"{folder / name} has {size_bytes:,} bytes; 1 to {MOST_BYTES:,} are read")
    tokenizer_class: Any = getattr(importlib.import_module("transformers"), kind.class_name)
    with one_sentence(f"{folder} cannot be read as a {kind.title} tokenizer"):
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
    for side in ("padding_side", "truncation_side"):  # tokenizer.json may say them too
        if (found := getattr(tokenizer, side)) != "right":
            raise TurbopocketError(f"{folder}: {side} is {found!r}; supported: 'right'")
    for name in kind.marks:
        if getattr(tokenizer, name) is None:
            raise TurbopocketError(f"{folder} has no {name}; every {kind.title} tokenizer needs one")
    return tokenizer


def _check_special_tokens(path: Path, kind: TokenizerKind) -> None:
    """special_tokens_map.json is read into the same settings as tokenizer_config.json, and may hold tokens alone."""
    if path.is_file():
        for key in read_json_object(path):
            if not isinstance(kind.keys.get(key), Graph):
                raise TurbopocketError(f"{path}: {key!r} is no special token of a {kind.class_name}")


def _check_ids(tokenizer: Any, folder: Path, encoder: str, embeddings: int) -> None:
    ids = tokenizer.get_vocab()
    token = max(ids, key=ids.__getitem__)
    if ids[token] >= embeddings:
        raise TurbopocketError(
            f"{folder}: the id of {token!r} is {ids[token]}, {encoder} has {embeddings} embeddings; ids up to "
            f"{embeddings - 1} are allowed"
        )


def _multi_vector(tokenizer: Any) -> dict[str, str]:
    """Added tokens that stand for several vectors, each with the text that names all of them.

    diffusers' load_textual_inversion adds them as `<cat>`, `<cat>_1`, `<cat>_2`, …
    """
    added, found = tokenizer.added_tokens_encoder, {}
    for token in added:
        vectors = [token]
        while len(vectors) < MOST_VECTORS and (following := f"{token}_{len(vectors)}") in added:
            vectors.append(following)
        if len(vectors) > 1:
            found[token] = " ".join(vectors)
    return found
