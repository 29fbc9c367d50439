# SPDX-License-Identifier: Apache-2.0
"""The small files beside the graphs: what optimum's ONNX Runtime pipelines and our own readers need."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtimes.image_size import ImageSize
from ..checkpoint.identity import ADDED_WHEN_READ
from ..checkpoint.links import refuse_links_out
from ..checkpoint.load import tokenizer_json
from ..families.base import LoadedModel
from ..families.sizes import latent_size

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
SWIFT_FILES = ("vocab.json", "merges.txt")
CONFIG_OWNERS = {"vae_encoder": "vae", "vae_decoder": "vae"}
"""Components whose config belongs to a module of another name."""


def write_side_files(model: LoadedModel, components: Mapping[str, Any], size: ImageSize, folder: Path) -> None:
    """Writes model_index.json, one config.json a component, the scheduler's config and the tokenizers.

    `tokenizer.json` is complete for our readers; vocab.json and merges.txt, copied when the checkpoint has them,
    are for readers that know only those. `size` is the default of the pictures, which optimum
    reads in the UNet's config.
    """
    height, width = latent_size(model, size)
    drawn: dict[str, Any] = {"sample_size": height if height == width else [height, width]}
    own = {model.family.denoiser: drawn} if size != model.image_size else {}
    for component in components:
        config = model.modules[CONFIG_OWNERS.get(component, component)].config
        _write_json(folder / component / "config.json", _plain(config) | own.get(component, {}))
    write_tokenizers(model, folder, TOKENIZER_FILES)
    _write_json(folder / "scheduler" / "scheduler_config.json", dict(model.scheduler_config))
    _write_json(folder / "model_index.json", _model_index(model, components))


def write_tokenizers(model: LoadedModel, folder: Path, also: Sequence[str] = ()) -> None:
    """Writes every tokenizer.json for our readers, and the files named in `also` where the checkpoint has them.

    Raises TurbopocketError for a tokenizer of which a file is a link out of the checkpoint's folder.
    """
    for encoder, source in model.tokenizers.items():
        refuse_links_out(sorted(source.glob("*")), source.parent)
        target = folder / encoder.replace("text_encoder", "tokenizer")
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.json").write_bytes(tokenizer_json(source, model.family.tokenizer, model.text_tokens))
        for name in also:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        _say_length(target / "tokenizer_config.json", model.text_tokens)


def _say_length(path: Path, tokens: int) -> None:
    """Afterwards a tokenizer's config, if there is one, says how many ids the graphs read: others pad to that."""
    if path.is_file() and (config := json.loads(path.read_text(encoding="utf-8"))).get("model_max_length") != tokens:
        _write_json(path, {**config, "model_max_length": tokens})


def write_swift_files(model: LoadedModel, folder: Path) -> None:
    """Writes the first tokenizer's vocab.json and merges.txt where Apple's Swift package looks for them, and every
    tokenizer.json for our readers.

    Where the checkpoint has only tokenizer.json, which is all that transformers 5 saves, they come out of that.
    """
    write_tokenizers(model, folder)
    if "text_encoder" not in model.tokenizers:  # a plan for a folder of configs
        return
    source = model.tokenizers["text_encoder"]
    found = [source / name for name in SWIFT_FILES]
    if all(file.is_file() for file in found):
        for file in found:
            shutil.copyfile(file, folder / file.name)
        return
    rules = json.loads(tokenizer_json(source, model.family.tokenizer, model.text_tokens))["model"]
    merges = [" ".join(pair) for pair in rules["merges"]]
    (folder / "vocab.json").write_text(json.dumps(rules["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _model_index(model: LoadedModel, components: Mapping[str, Any]) -> dict[str, Any]:
    scheduler = model.scheduler_config["_class_name"]
    index: dict[str, Any] = {
        "_class_name": model.family.pipeline_class,
        "scheduler": ["diffusers", scheduler],
    }
    index |= {component: ["diffusers", "OnnxRuntimeModel"] for component in components}
    index |= {
        encoder.replace("text_encoder", "tokenizer"): ["transformers", model.family.tokenizer.class_name]
        for encoder in model.tokenizers
    }
    if "force_zeros_for_empty_prompt" in model.pipeline_config:
        index["force_zeros_for_empty_prompt"] = model.pipeline_config["force_zeros_for_empty_prompt"]
    return index


def _plain(config: Any) -> dict[str, Any]:
    """A config of diffusers or transformers as JSON values."""
    values: dict[str, Any] = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else dict(config)
    return {key: value for key, value in values.items() if key not in ADDED_WHEN_READ}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
