# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many kinds, drawing with some of their components from ONNX files and the others in PyTorch."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from turbopocket.export.build.draft import pipeline_manifest
from turbopocket.export.checkpoint.load import load
from turbopocket.export.families.base import LoadedModel
from turbopocket.export.families.components import described
from turbopocket.export.recipe import make_recipe
from turbopocket.export.targets.registry import open_target
from turbopocket.export.verify.diffusers_reference import diffusers_picture
from turbopocket.export.verify.gaps import torch_runner
from turbopocket.ground.arrays import Arrays
from turbopocket.quant.fit import ABSMAX
from turbopocket.quant.formats import parse_format
from turbopocket.runtimes.drawing.text_to_image import draw, seeded_noise
from turbopocket.runtimes.drawing.tokenizer import open_tokenizers
from turbopocket.runtimes.manifest import Manifest
from turbopocket.runtimes.open import open_runner
from turbopocket.runtimes.runner import Runner

SDXL: dict[str, Any] = {
    "cross_attention_dim": 96,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 6 * 16 + 64,
}
"""A UNet's options for the text of the `tiny_sdxl` checkpoint."""
PROMPT = "a red circle on the blue square"
LCM = {
    "_class_name": "LCMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**shape | options)


def tiny_vae(**options: Any) -> nn.Module:
    from diffusers import AutoencoderTiny

    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (2, 1),
    }
    return AutoencoderTiny(**shape | options)


def checkpoint(base: Path, folder: Path, index: dict[str, Any] | None = None, **parts: Any) -> Path:
    """The folder `base` with other modules, as diffusers saves them, or another scheduler config."""
    shutil.copytree(base, folder)
    changed = dict(index or {})
    for name, part in parts.items():
        shutil.rmtree(folder / name)
        if isinstance(part, dict):
            (folder / name).mkdir()
            (folder / name / "scheduler_config.json").write_text(json.dumps(part))
            changed[name] = ["diffusers", part["_class_name"]]
        else:
            part.save_pretrained(folder / name)
            changed[name] = ["diffusers", type(part).__name__]
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


class Parts:
    """Some components from ONNX files, the others in float PyTorch: what is no news in a model takes no time."""

    def __init__(self, here: Runner, others: Runner, lowered: Collection[str]) -> None:
        self.here, self.others, self.lowered = here, others, lowered

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return (self.here if component in self.lowered else self.others).run(component, inputs)


@dataclass(frozen=True)
class Drawer:
    """A model that draws with its own parts lowered to ONNX."""

    model: LoadedModel
    runner: Runner
    manifest: Manifest
    artifact: Path

    def draw(self, seed: int = 7, **options: Any) -> NDArray[np.float32]:
        tokenizers = open_tokenizers(self.artifact, self.manifest)
        return draw(self.runner, self.manifest, tokenizers, PROMPT, seeded_noise(seed), **options)

    def assert_draws_like_diffusers(self, **options: Any) -> None:
        expected = diffusers_picture(self.model, self.manifest, PROMPT, 7, **options)
        assert expected.std() > 0.01, "a flat picture would prove nothing"
        np.testing.assert_allclose(self.draw(**options), expected, atol=1e-4)

    def inputs(self, component: str) -> dict[str, list[int | str]]:
        return {spec.name: spec.shape[1:] for spec in self.manifest.components[component].inputs}


def drawer(folder: Path, out: Path, *lowered: str, **sampler: Any) -> Drawer:
    """The model with the named components lowered in fp32; neither calibrated nor planned, so that it takes seconds."""
    recipe = make_recipe({"model": {"source": str(folder)}, "sampler": {"steps": 3} | sampler}, "test")
    model, target = load(str(folder)), open_target(recipe.target)
    components = target.components(model, [model.image_size], recipe.sampler.image_to_image)
    specs = {component.name: described(component) for component in components}
    for component in components:
        if component.name in lowered:
            graph = target.trace(component)
            parameters = {name: component.module.get_parameter(f"{name}.weight") for name in graph.layers}
            weights = {name: parse_format("fp32").compress(value, ABSMAX) for name, value in parameters.items()}
            specs[component.name] = target.lower(graph, weights, out)
    target.write_side_files(model, specs, model.image_size, out)
    manifest = pipeline_manifest(model, recipe, specs, target.tools)
    return Drawer(model, Parts(open_runner(out, manifest), torch_runner(components), lowered), manifest, out)
