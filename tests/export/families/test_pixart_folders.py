# SPDX-License-Identifier: Apache-2.0
"""PixArt's folders as people have them: tied tensors, older names, T5's tokenizers, and what is refused."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from turbopocket.export.checkpoint.hub import wanted_files
from turbopocket.export.checkpoint.load import load, load_shapes, tokenizer_json
from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.distill.teacher import require_plain
from turbopocket.export.families.tokenizers import T5
from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.drawing.tokenizer import Tokenizer

from ...conftest import WORDS
from ...pixart_checkpoints import write_alpha, write_sigma

TEXT_FILE = "text_encoder/model.safetensors"
SHARED, EMBEDDED = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pixart")
    for name, write in {"sigma": write_sigma, "alpha": write_alpha}.items():
        write(base / name)
    return {name: base / name for name in ("sigma", "alpha")}


@pytest.fixture
def sigma(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(folders["sigma"], tmp_path / "sigma"))


@pytest.fixture
def alpha(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(folders["alpha"], tmp_path / "alpha"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_loads_with_what_its_pipeline_says(sigma: Path, alpha: Path) -> None:
    for folder, name, tokens, side in ((sigma, "pixart-sigma", 300, 32), (alpha, "pixart-alpha", 120, 256)):
        for model in (load(str(folder)), load_shapes(str(folder))):
            assert model.family.name == name
            assert model.text_tokens == tokens
            assert model.image_size == (side, side)
            assert set(model.modules) == {"text_encoder", "transformer", "vae"}


@pytest.mark.parametrize("stored", [(SHARED,), (EMBEDDED,), (SHARED, EMBEDDED)], ids="+".join)
def test_a_tied_embedding_is_read_under_either_name_and_kept_once(stored: tuple[str, ...], sigma: Path) -> None:
    tensors = load_file(sigma / TEXT_FILE)
    table = tensors.pop(SHARED)
    save_file(tensors | {name: table.clone() for name in stored}, sigma / TEXT_FILE)
    encoder: Any = load(str(sigma)).modules["text_encoder"]
    assert torch.equal(encoder.encoder.embed_tokens.weight, table)
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()


def test_two_different_tables_of_a_tied_embedding_are_refused(sigma: Path) -> None:
    tensors = load_file(sigma / TEXT_FILE)
    other = tensors[SHARED].clone()
    other[-1, -1] += 1
    save_file(tensors | {EMBEDDED: other}, sigma / TEXT_FILE)
    with pytest.raises(TurbopocketError, match=f"{SHARED} and {EMBEDDED} are one table, and two different ones are st"):
        load(str(sigma))


def without_t5_folder(sigma: Path) -> None:
    shutil.rmtree(sigma / "text_encoder")


def without_t5_in_the_index(sigma: Path) -> None:
    """As repositories write it that hold a transformer for pipelines of which the rest lies elsewhere."""
    edit(sigma / "model_index.json", text_encoder=[None, None])


def without_t5_weights(sigma: Path) -> None:
    (sigma / TEXT_FILE).unlink()


MISSING: dict[Callable[[Path], None], str] = {
    without_t5_folder: "has no folder 'text_encoder', which its model_index.json names",
    without_t5_in_the_index: "has no 'text_encoder', which every PixArtSigmaPipeline needs",
    without_t5_weights: "text_encoder has no weights: no model.safetensors",
}


@pytest.mark.parametrize("change", MISSING, ids=lambda change: change.__name__)
def test_a_folder_without_its_t5_is_refused_in_one_sentence(change: Callable[[Path], None], sigma: Path) -> None:
    change(sigma)
    with pytest.raises(TurbopocketError, match=MISSING[change]) as refused:
        load(str(sigma))
    assert "\n" not in str(refused.value)


def test_a_stored_position_table_is_refused_by_name(sigma: Path) -> None:
    """Positions are computed for the size that is built; a table in the file is of one size, which nobody states."""
    file = sigma / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"pos_embed.pos_embed": torch.zeros(1, 16, 96)}, file)
    with pytest.raises(TurbopocketError, match=r"1 tensors are not in the model of config.json: pos_embed.pos_embed"):
        load(str(sigma))


SCHEDULERS = {
    "SASolverScheduler": "scheduler class 'SASolverScheduler' ",
    "FlowMatchEulerDiscreteScheduler": "scheduler class 'FlowMatchEulerDiscreteScheduler': the model was trained on",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_without_a_sampler_here_is_refused_alike_by_plan_and_build(
    scheduler: str, sigma: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    edit(sigma / "model_index.json", scheduler=["diffusers", scheduler])
    edit(sigma / "scheduler/scheduler_config.json", _class_name=scheduler)
    planned, built = turbopocket("plan", sigma), turbopocket("build", sigma, "--out", tmp_path / "art")
    assert (planned.code, built.code) == (1, 1)
    assert SCHEDULERS[scheduler] in planned.err
    assert planned.err.splitlines()[-1] == built.err.splitlines()[-1]
    assert "Traceback" not in planned.err


def test_an_encoder_without_its_embedding_is_refused(sigma: Path) -> None:
    tensors = load_file(sigma / TEXT_FILE)
    del tensors[SHARED]
    save_file(tensors, sigma / TEXT_FILE)
    with pytest.raises(TurbopocketError, match=r"2 tensors are missing: encoder.embed_tokens.weight, shared.weight"):
        load(str(sigma))


def test_the_transformers_former_name_is_known(alpha: Path) -> None:
    """The published folders name the class that all transformers had."""
    edit(alpha / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(alpha / "transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    assert type(load(str(alpha)).denoiser).__name__ == "PixArtTransformer2DModel"


PROMPTS = ("a red cat", "  A RED Cat\n", "", "the blue circle, on 7 dogs é", "a cat " * 200, "<pad> a cat</s>")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [9, 120])
def test_our_tokenizer_gives_the_ids_and_the_mask_that_the_pipeline_gives(
    prompt: str, length: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    from diffusers import PixArtSigmaPipeline
    from transformers import T5Tokenizer

    tokenizer = folders["sigma"] / "tokenizer"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(tokenizer, T5, length))
    found = Tokenizer(tmp_path / "tokenizer.json", length).encode(prompt)
    text = PixArtSigmaPipeline._text_preprocessing(None, prompt)
    theirs = T5Tokenizer.from_pretrained(tokenizer)
    expected = theirs(text, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(found.ids, expected.input_ids[0])
    np.testing.assert_array_equal(found.mask, expected.attention_mask[0])
    assert (found.cut is None) == (len(theirs(text[0]).input_ids) <= length)


@pytest.fixture
def spiece(sigma: Path) -> Path:
    """The folder of a tokenizer as it is published: spiece.model, no tokenizer.json."""
    trainer: Any = pytest.importorskip("sentencepiece").SentencePieceTrainer
    tokenizer = sigma / "tokenizer"
    (tokenizer / "words.txt").write_text("\n".join(f"{a} {b}" for a in WORDS for b in WORDS))
    marks = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>", "minloglevel": 2}
    prefix = str(tokenizer / "spiece")
    trainer.train(input=str(tokenizer / "words.txt"), model_prefix=prefix, vocab_size=30, **marks)
    for name in ("words.txt", "spiece.vocab", "tokenizer.json"):
        (tokenizer / name).unlink()
    special = {"additional_special_tokens": [f"<extra_id_{index}>" for index in range(100)]}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, "legacy": True}
    config |= {"sp_model_kwargs": {}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | special))
    return tokenizer


def test_a_spiece_model_becomes_a_tokenizer_json(spiece: Path, tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(spiece, T5, 30))
    found = Tokenizer(tmp_path / "tokenizer.json", 30).encode("A red CAT on the square")
    expected = T5Tokenizer.from_pretrained(spiece)("a red cat on the square", padding="max_length", max_length=30)
    assert found.ids.tolist() == expected.input_ids
    assert load(str(spiece.parent)).text_tokens == 300


def test_a_hub_repository_gives_its_spiece_model() -> None:
    names = ["model_index.json", "tokenizer/spiece.model", "tokenizer/readme.md", "transformer/config.json"]
    assert wanted_files(names, ["tokenizer"], ()) == ["model_index.json", "tokenizer/spiece.model"]


def test_a_spiece_model_without_its_package_is_refused(spiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else there(name))
    with pytest.raises(TurbopocketError, match="which reads that, is not installed") as refused:
        load(str(spiece.parent))
    assert "pip install sentencepiece" in str(refused.value.hint)


BROKEN = {b"": "spiece.model has 0 bytes; 1 to ", b"\x0e\x00 no model": "cannot be read as a T5 tokenizer: "}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_spiece_model_is_refused(content: bytes, spiece: Path) -> None:
    (spiece / "spiece.model").write_bytes(content)
    with pytest.raises(TurbopocketError, match=BROKEN[content]) as refused:
        load(str(spiece.parent))
    assert "\n" not in str(refused.value)


TRANSFORMER, TEXT, TOKENIZER = "transformer/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sigma", TRANSFORMER, {"use_additional_conditions": True}, "the pipeline of PixArt-Sigma tells no sizes"),
    (
        "sigma",
        TRANSFORMER,
        {"norm_type": "ada_norm_zero"},
        "norm_type is 'ada_norm_zero'; supported: 'ada",
    ),
    ("sigma", TRANSFORMER, {"out_channels": 9}, "out_channels is 9; 4, or 8 of which half is a variance, are allowed"),
    (
        "sigma",
        TRANSFORMER,
        {"in_channels": 3, "out_channels": 6},
        "takes 3 channels, the VAE's",
    ),
    ("sigma", TRANSFORMER, {"caption_channels": 64}, "takes text 64 wide, text_encoder gives 32"),
    ("sigma", TRANSFORMER, {"sample_size": 15}, "a multiple of patch_size, 2, is needed"),
    ("sigma", TRANSFORMER, {"cross_attention_dim": 64}, "such a model does not run on a prompt alone"),
    ("sigma", TRANSFORMER, {"magic": 3}, "'magic' is 3, a setting of a PixArtTransformer2DModel that is not known"),
    ("alpha", TRANSFORMER, {"sample_size": 64, "use_additional_conditions": True}, "sizes at 128 alone"),
    ("sigma", TEXT, {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; supported: 'gated-gelu'"),
    ("sigma", TEXT, {"dense_act_fn": "relu"}, "dense_act_fn is 'relu'"),
    ("sigma", TEXT, {"is_decoder": True}, "is_decoder is True"),
    ("sigma", TEXT, {"vocab_size": 100}, "text_encoder has 100 embeddings"),
    ("sigma", TOKENIZER, {"sp_model_kwargs": {"nbest_size": 4}}, "drawn by lot"),
    ("sigma", TOKENIZER, {"tokenizer_class": "CLIPTokenizer"}, "tokenizer_class is 'CLIPTokenizer'; supported: 'T5"),
    ("sigma", "model_index.json", {"tokenizer": ["transformers", "CLIPTokenizer"]}, "supported: ['transformers', 'T5"),
]


@pytest.mark.parametrize(("name", "file", "changes", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_can_not_be_drawn_is_refused_alike_by_plan_and_build(
    name: str, file: str, changes: dict[str, Any], says: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    edit(folder / file, **changes)
    with pytest.raises(TurbopocketError) as planned:
        load_shapes(str(folder))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(TurbopocketError) as built:
        load(str(folder))
    assert says in str(planned.value)
    assert str(built.value) == str(planned.value)
    assert "\n" not in str(built.value)


ASKED: dict[str, tuple[str, str]] = {
    "[target]\nname = 'coreml'": ("Core ML packages have no component transformer", ""),
    "[image]\nsizes = ['32x32', '48x32']": ("its graph says where patches lie; one size is allowed", "each size"),
    "[image]\nsizes = ['40x36']": ("size 40x36: width and height for sigma are multiples of 8; 40x32 is near", ""),
    "[sampler]\nimage_to_image = true": ("diffusers has no pipeline of PixArt that does", ""),
}


@pytest.mark.parametrize("recipe", ASKED)
def test_what_can_not_be_built_is_refused_alike_by_plan_and_build(
    recipe: str, sigma: Path, tmp_path: Path, turbopocket: Callable[..., Any]
) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    asked = (sigma, "--recipe", tmp_path / "recipe.toml")
    planned, built = turbopocket("plan", *asked), turbopocket("build", *asked, "--out", tmp_path / "art")
    assert (planned.code, built.code) == (1, 1)
    says, hint = ASKED[recipe]
    assert says in planned.err
    assert hint in planned.err
    assert planned.err.splitlines()[-1] == built.err.splitlines()[-1]
    assert not (tmp_path / "art").exists()


def test_a_lora_is_refused_before_weights_are_read(sigma: Path) -> None:
    (sigma / TEXT_FILE).unlink()
    with pytest.raises(TurbopocketError, match=r"a LoRA was given for sigma, which has a transformer; allowed: LoRA"):
        load(str(sigma), [LoraFile(sigma / "lora.safetensors")])


def test_it_is_no_teacher(sigma: Path) -> None:
    with pytest.raises(TurbopocketError, match="it has a transformer, a teacher must have a UNet"):
        require_plain(load_shapes(str(sigma)))


def test_a_transformers_own_folder_and_file_are_no_models(sigma: Path) -> None:
    with pytest.raises(TurbopocketError, match="a PixArtTransformer2DModel only") as refused:
        load_shapes(str(sigma / "transformer"))
    assert refused.value.hint == f"give the whole model: {sigma}"
    with pytest.raises(TurbopocketError) as alone:
        load_shapes(str(sigma / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert "\n" not in str(alone.value)
