# SPDX-License-Identifier: Apache-2.0
"""What of FLUX.2-klein is refused: all that is more than a plan, and folders that no plan can be made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.ground.errors import TurbopocketError

from ...flux2_checkpoints import write_flux2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "flux2"
    write_flux2(folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(tiny, tmp_path / "flux2"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


VERBS = ("build", "calibrate", "measure", "compress", "lower")


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_more_than_a_plan_is_refused_in_one_sentence(
    verb: str, tiny: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    ran = turbopocket(verb, tiny, "--out", tmp_path / "art")
    assert ran.code == 1
    *_, said = (line for line in ran.err.splitlines() if "a plan is made and nothing else yet" in line)
    assert "a build lacks a sampler that walks the straight lines of flow matching, prompts in Qwen's" in said
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_distillation_is_refused_before_weights_are_read(tiny: Path, copy: Path) -> None:
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    for folder in (tiny, copy):
        with pytest.raises(TurbopocketError, match="of Flux2KleinPipeline folders a plan is made and nothing else yet"):
            load(str(folder))


def without_text_encoder(folder: Path) -> None:
    (folder / "text_encoder/config.json").unlink()


def without_its_folder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def with_more_single_blocks(folder: Path) -> None:
    edit(folder / "transformer/config.json", num_single_layers=3)


def with_fewer_joint_blocks(folder: Path) -> None:
    """Of the published kind: an index beside the config, whose shards are elsewhere."""
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as opened:
        names = [*opened.keys(), "transformer_blocks.1.attn.to_q.weight"]
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "diffusion_pytorch_model-00001-of-00001.safetensors")}
    Path(f"{weights}.index.json").write_text(json.dumps(index))


def with_another_scheduler(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])


def with_another_encoder(folder: Path) -> None:
    edit(folder / "model_index.json", text_encoder=["transformers", "Mistral3ForConditionalGeneration"])


def of_another_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="Flux2Pipeline")


def edited(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder / f"{file}/config.json", **changes)

    change.__name__ = " ".join(f"{key} {value}" for key, value in changes.items())
    return change


REFUSED: dict[Callable[[Path], None], str] = {
    without_text_encoder: "text_encoder/config.json",
    without_its_folder: "has no folder 'text_encoder', which its model_index.json names",
    with_more_single_blocks: "diffusion_pytorch_model.safetensors: 4 tensors are missing: single_transformer_blocks.2.",
    with_fewer_joint_blocks: "index.json: 1 tensors are not in the model of config.json: transformer_blocks.1.attn.to",
    with_another_scheduler: "scheduler class 'EulerDiscreteScheduler' does not go with such a model; supported: FlowM",
    with_another_encoder: "'text_encoder' is ['transformers', 'Mistral3ForConditionalGeneration']; supported: ['trans",
    of_another_pipeline: "pipeline class 'Flux2Pipeline' is not supported; supported: StableDiffusionXLPipeline, ",
    edited("transformer", num_layers=0): "num_layers is 0; whole numbers from 1 to 128 are allowed",
    edited("transformer", num_single_layers="20"): "num_single_layers is '20'; whole numbers from 1",
    edited("transformer", guidance_embeds=True): "FLUX.2-klein tells the transformer no guidance",
    edited("transformer", patch_size=2): "patch_size is 2; supported: 1",
    edited("transformer", in_channels=16): "takes 16 channels, patches of the VAE's latents have 32",
    edited("transformer", out_channels=16): "out_channels is 16; 32 are needed, as it takes",
    edited("transformer", joint_attention_dim=64): "takes text 64 wide, 3 states of text_encoder give 96",
    edited("transformer", axes_dims_rope=[8, 8, 8, 16]): "such a model does not run on a prompt alone",
    edited("text_encoder", num_hidden_layers=26, layer_types=None): "is 26; the pipeline reads the states after layers",
    edited("text_encoder", use_sliding_window=True): "every token see all before it, and no window of them",
    edited("text_encoder", layer_types=["sliding_attention"] * 28): "'full_attention' for every layer is needed",
    edited("text_encoder", vocab_size=10): "text_encoder has 10 embeddings",
    edited("vae", patch_size=[1, 1]): "patch_size is [1, 1]; supported: [2, 2]",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_folder_that_is_not_whole_is_one_sentence(change: Callable[[Path], None], copy: Path) -> None:
    change(copy)
    with pytest.raises(TurbopocketError) as refused:
        load_shapes(str(copy))
    assert REFUSED[change] in str(refused.value)
    assert "\n" not in str(refused.value)


ASKED: dict[str, str] = {
    "[target]\nname = 'coreml'": "Core ML packages have no component transformer",
    "[image]\nsizes = ['32x32', '48x32']": "its graph says where patches lie; one size is allowed",
    "[image]\nsizes = ['40x36']": "width and height for flux2 are multiples of 8; 40x32 is near",
    "[sampler]\nimage_to_image = true": "can not begin with a picture",
}


@pytest.mark.parametrize("recipe", ASKED)
def test_what_no_plan_can_be_made_of_is_one_sentence(
    recipe: str, tiny: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    ran = turbopocket("plan", tiny, "--recipe", tmp_path / "recipe.toml")
    assert ran.code == 1
    assert ASKED[recipe] in ran.err
