# SPDX-License-Identifier: Apache-2.0
"""Every key of every config is known: built in, honoured, held to one value, or without effect; the rest is refused."""

import importlib
import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.load import load, load_shapes
from turbopocket.export.families import flux2_keys as flux2
from turbopocket.export.families import key_tables as tables
from turbopocket.export.families import pixart_keys as pixart
from turbopocket.export.families.keys import KeyTable, LeftOut, check_config, constructor_defaults
from turbopocket.ground.errors import TurbopocketError

TABLES: dict[tuple[str, str], list[KeyTable]] = {
    ("diffusers", "UNet2DConditionModel"): [tables.UNET, tables.SDXL_UNET],
    ("diffusers", "AutoencoderKL"): [tables.VAE, tables.SDXL_VAE],
    ("diffusers", "AutoencoderTiny"): [tables.TINY_VAE],
    ("diffusers", "StableDiffusionPipeline"): [tables.PIPELINE],
    ("diffusers", "StableDiffusionXLPipeline"): [tables.SDXL_PIPELINE],
    ("transformers", "CLIPTextConfig"): [tables.CLIP_TEXT],
    ("transformers", "CLIPTokenizer"): [tables.CLIP_TOKENIZER],
    ("diffusers", "PixArtTransformer2DModel"): [pixart.TRANSFORMER, pixart.SIGMA_TRANSFORMER],
    ("diffusers", "PixArtAlphaPipeline"): [pixart.PIPELINE],
    ("diffusers", "PixArtSigmaPipeline"): [pixart.PIPELINE],
    ("transformers", "T5Config"): [pixart.T5_ENCODER],
    ("transformers", "T5Tokenizer"): [pixart.T5_TOKENIZER],
    ("diffusers", "Flux2Transformer2DModel"): [flux2.TRANSFORMER],
    ("diffusers", "AutoencoderKLFlux2"): [flux2.VAE],
    ("diffusers", "Flux2KleinPipeline"): [flux2.PIPELINE],
    ("transformers", "Qwen3Config"): [flux2.QWEN3],
    ("transformers", "Qwen2Tokenizer"): [flux2.QWEN_TOKENIZER],
}
PARTS = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"}


def parameters_of(library: str, name: str) -> dict[str, Any]:
    return constructor_defaults(getattr(importlib.import_module(library), name))


@pytest.mark.parametrize(("library", "name"), TABLES)
def test_every_parameter_of_the_installed_class_is_in_its_table(library: str, name: str) -> None:
    """Red after an update of a library that brings settings: decide what they do to a picture, and list them."""
    expected = set(parameters_of(library, name)) - {"vocab", "merges"}  # the tokenizer's own files
    for table in TABLES[library, name]:
        assert expected - PARTS <= set(table)


@pytest.mark.parametrize("checkpoint", ["tiny_sdxl", "tiny_sd"])
def test_whatever_the_installed_libraries_save_is_known(
    checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import diffusers

    folder = request.getfixturevalue(checkpoint)
    class_name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    saved = tmp_path / "saved"
    getattr(diffusers, class_name).from_pretrained(folder).save_pretrained(saved)
    assert (saved / "tokenizer/tokenizer.json").is_file()
    assert load_shapes(str(saved)).text_tokens == 77


@pytest.fixture
def folder(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "broken"))


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _refused_by_both(folder: Path) -> str:
    """The sentence with which `plan` and `build` refuse the folder; without weights, so that none can be read."""
    with pytest.raises(TurbopocketError) as planned:
        load_shapes(str(folder))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(TurbopocketError) as built:
        load(str(folder))
    assert str(built.value) == str(planned.value)
    assert not str(built.value).endswith(".")
    assert "\n" not in str(built.value)
    return str(built.value)


FILES_OF_A_FOLDER = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer_2/tokenizer_config.json",
    "model_index.json",
]


@pytest.mark.parametrize("file", FILES_OF_A_FOLDER)
def test_an_unknown_key_is_refused_by_its_name(folder: Path, file: str) -> None:
    _edit(folder / file, guess_what=3)
    assert f"{file}: 'guess_what' is 3, a setting of " in _refused_by_both(folder)


@pytest.mark.parametrize("file", FILES_OF_A_FOLDER)
def test_an_unknown_key_that_says_nothing_is_let_through(folder: Path, file: str) -> None:
    _edit(folder / file, guess_what=None, or_this=False, or_that=[None, None], or_these={}, or_those="")
    assert load_shapes(str(folder)).text_tokens == 77


def test_a_key_that_only_the_library_knows_is_let_through_with_its_default_alone() -> None:
    defaults = {"new": (1, 2)}
    check_config({"new": [1, 2]}, {}, defaults, Path("config.json"), "a Class")
    with pytest.raises(TurbopocketError, match=r"config.json: 'new' is \[1, 3\], a setting of a Class that is not"):
        check_config({"new": [1, 3]}, {}, defaults, Path("config.json"), "a Class")


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("unet/config.json", "class_embed_type", "timestep", "class labels steer such a model"),
        ("unet/config.json", "num_class_embeds", 10, "class labels steer such a model"),
        ("unet/config.json", "encoder_hid_dim", 32, "other states than a text encoder's"),
        ("unet/config.json", "encoder_hid_dim_type", "text_image_proj", "other states than a text encoder's"),
        ("unet/config.json", "addition_embed_type", "image", "the pooled text and the picture's sizes"),
        ("unet/config.json", "addition_embed_type", None, "the pooled text and the picture's sizes"),
        ("unet/config.json", "attention_type", "gated", "takes boxes or pictures beside the prompt"),
        ("unet/config.json", "num_attention_heads", 4, "attention_head_dim"),
        ("unet/config.json", "dual_cross_attention", True, "pictures steer such a model"),
        ("unet/config.json", "quantization_config", {"quant_method": "torchao"}, "weights are read as floating point"),
        ("unet/config.json", "_use_default_values", ["sample_size"], "settings to forget"),
        ("vae/config.json", "out_channels", 4, "red, green and blue"),
        ("vae/config.json", "auto_map", {"AutoModel": "code.py"}, "only what lies in the folder is read"),
        ("text_encoder/config.json", "use_attention_mask", True, "hides a prompt's padding"),
        ("text_encoder/config.json", "pruned_heads", {"0": [1]}, "other shapes"),
        ("text_encoder/config.json", "model_type", "t5", "no other text encoder"),
        ("tokenizer/tokenizer_config.json", "truncation_side", "left", "loses its end"),
        ("tokenizer/tokenizer_config.json", "padding_side", "left", "filled up at the end"),
        ("tokenizer/tokenizer_config.json", "split_special_tokens", True, "stay whole"),
        ("tokenizer/tokenizer_config.json", "tokenizer_class", "T5Tokenizer", "the text encoders are CLIP's"),
        ("model_index.json", "requires_aesthetics_score", True, "followed by a score"),
    ],
)
def test_a_key_of_one_value_is_refused_with_the_reason(
    folder: Path, file: str, key: str, value: object, reason: str
) -> None:
    _edit(folder / file, **{key: value})
    said = _refused_by_both(folder)
    assert f"{file}: {key} is {value!r}; supported: " in said
    assert reason in said


def test_stable_diffusion_has_no_use_for_the_conditions_of_sdxl(tiny_sd: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_sd, tmp_path / "broken"))
    _edit(broken / "unet/config.json", addition_embed_type="text_time")
    assert "addition_embed_type is 'text_time'; supported: None" in _refused_by_both(broken)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "_attn_implementation", "somebody/kernel"),
        ("text_encoder/config.json", "attn_implementation", "somebody/kernel:function"),
        ("text_encoder/config.json", "_attn_implementation_internal", "somebody/kernel"),
        ("text_encoder_2/config.json", "experts_implementation", "somebody/kernel"),
        ("text_encoder/config.json", "auto_map", {"AutoConfig": "somebody/code--module.Class"}),
        ("unet/config.json", "auto_map", {"AutoModel": "somebody/code--module.Class"}),
        ("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["somebody/code--module.Class", None]}),
        ("tokenizer/tokenizer_config.json", "gguf_file", "somebody/model.gguf"),
        ("tokenizer/tokenizer_config.json", "fast_tokenizer_files", ["../../tokenizer.4.0.0.json"]),
        ("tokenizer/tokenizer_config.json", "trust_remote_code", True),
        ("tokenizer/tokenizer_config.json", "init_inputs", ["somebody/model"]),
        ("tokenizer/special_tokens_map.json", "gguf_file", "somebody/model.gguf"),
        ("model_index.json", "unet", ["my_module", "UNet2DConditionModel"]),
        ("model_index.json", "tokenizer", ["my_module", "CLIPTokenizer"]),
        ("model_index.json", "scheduler", ["my_module", "EulerDiscreteScheduler"]),
        ("model_index.json", "extra", ["my_module", "Extra"]),
    ],
)
def test_no_config_makes_a_library_fetch_or_import_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, key: str, value: object
) -> None:
    """With hub access on: the sentence must come before any library has seen the key."""
    tried: list[str] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(str(address)))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(str(address)))
    _edit(folder / file, **{key: value})
    assert Path(file).name in _refused_by_both(folder)
    assert tried == []


def test_ways_to_compute_attention_that_transformers_names_change_nothing(folder: Path) -> None:
    _edit(folder / "text_encoder/config.json", _attn_implementation="flash_attention_2")
    config: Any = load(str(folder)).modules["text_encoder"].config
    assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet/config.json", "sample_size", 30_000),
        ("unet/config.json", "sample_size", -16),
        ("unet/config.json", "sample_size", 0),
        ("unet/config.json", "sample_size", True),
        ("unet/config.json", "sample_size", 16.5),
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "layers_per_block", [1, 10**9, 1]),
        ("unet/config.json", "transformer_layers_per_block", [1, [1, 10**9], 2]),
        ("unet/config.json", "block_out_channels", [32, 32, 10**9]),
        ("unet/config.json", "block_out_channels", [32] * 1000),
        ("unet/config.json", "cross_attention_dim", 10**9),
        ("unet/config.json", "norm_num_groups", 0),
        ("unet/config.json", "attention_head_dim", "8"),
        ("unet/config.json", "conv_in_kernel", 10**6),
        ("unet/config.json", "norm_eps", float("nan")),
        ("vae/config.json", "layers_per_block", 10**9),
        ("vae/config.json", "block_out_channels", [32] * 40),
        ("vae/config.json", "latent_channels", 10**9),
        ("vae/config.json", "scaling_factor", 0),
        ("vae/config.json", "scaling_factor", float("inf")),
        ("vae/config.json", "scaling_factor", "0.13"),
        ("text_encoder/config.json", "num_hidden_layers", 10**9),
        ("text_encoder/config.json", "vocab_size", 10**8),
        ("text_encoder/config.json", "hidden_size", 10**9),
        ("text_encoder/config.json", "max_position_embeddings", 10**9),
        ("text_encoder/config.json", "intermediate_size", -1),
        ("text_encoder_2/config.json", "projection_dim", 10**9),
    ],
)
def test_numbers_beyond_all_models_are_refused_before_anything_is_made(
    folder: Path, file: str, key: str, value: object
) -> None:
    _edit(folder / file, **{key: value})
    start = time.process_time()
    said = _refused_by_both(folder)
    assert f"{file}: {key} is " in said
    assert "allowed" in said or "needed" in said
    assert time.process_time() - start < 5


def test_labels_of_a_classifier_are_not_made(folder: Path) -> None:
    """A hundred million of them would be names in memory; CLIP has no use for one."""
    _edit(folder / "text_encoder/config.json", num_labels=10**8)
    start = time.process_time()
    load_shapes(str(folder))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"norm_num_groups": 7}),
        ("unet/config.json", {"act_fn": "no_such_function"}),
        ("unet/config.json", {"act_fn": 5}),
        ("unet/config.json", {"down_block_types": 5}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"]}),
        ("unet/config.json", {"time_embedding_type": "no_such_type"}),
        ("unet/config.json", {"time_embedding_dim": 33, "time_embedding_type": "fourier"}),
        ("unet/config.json", {"freq_shift": "a"}),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock3D"}),
        ("unet/config.json", {"out_channels": 8}),
        ("unet/config.json", {"addition_time_embed_dim": None}),
        ("unet/config.json", {"addition_time_embed_dim": 32}),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 96}),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"] * 3}),
        ("vae/config.json", {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}),
        ("vae/config.json", {"latents_std": [1.0, 1.0, 0.0, 1.0], "latents_mean": [0.0] * 4}),
        ("vae/config.json", {"latents_mean": [0.0, float("nan"), 0.0, 0.0], "latents_std": [1.0] * 4}),
        ("vae/config.json", {"latents_mean": 0.5}),
        ("text_encoder/config.json", {"num_attention_heads": 7}),
        ("text_encoder/config.json", {"hidden_act": "no_such_function"}),
        ("text_encoder/config.json", {"eos_token_id": "two"}),
        ("text_encoder/config.json", {"layer_norm_eps": "small"}),
        ("text_encoder_2/config.json", {"projection_dim": None}),
    ],
)
def test_a_config_whose_graph_does_not_run_is_one_sentence_for_plan_and_build(
    folder: Path, file: str, changes: dict[str, Any]
) -> None:
    _edit(folder / file, **changes)
    said = _refused_by_both(folder)
    assert file.split("/")[0] in said.lower()
    assert str(folder) in said


@pytest.mark.parametrize("content", ['{"a": ' * 100_000, '{"a": ' + "9" * 5_000 + "}", "\x00"])
def test_absurd_json_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "unet/config.json").write_text(content)
    assert "unet/config.json is not JSON" in _refused_by_both(folder)


def test_a_config_that_never_ends_is_not_read(folder: Path) -> None:
    (folder / "vae/config.json").unlink()
    (folder / "vae/config.json").symlink_to("/dev/zero")
    assert "vae/config.json is not a plain file" in _refused_by_both(folder)


def test_the_index_says_which_scheduler_is_made(folder: Path) -> None:
    """As in diffusers, which makes the class of the index with the settings of the scheduler's folder."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    _edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    expected = diffusers.StableDiffusionXLPipeline.from_pretrained(folder).scheduler
    assert load_shapes(str(folder)).scheduler_config["_class_name"] == type(expected).__name__ == "DDIMScheduler"


@pytest.mark.filterwarnings("ignore:The configuration file of the unet:FutureWarning")  # what is tested here
@pytest.mark.parametrize(("saved_by", "size"), [("0.6.0", 16), ("0.8.1", 80), ("0.9.0", 16), ("0.42.0", 16)])
def test_an_old_unet_draws_at_the_size_of_diffusers_pipeline(
    tiny_sd: Path, tmp_path: Path, saved_by: str, size: int
) -> None:
    import diffusers

    old = Path(shutil.copytree(tiny_sd, tmp_path / "old"))
    _edit(old / "unet/config.json", _diffusers_version=saved_by, sample_size=size)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(old)
    assert load_shapes(str(old)).image_size.height == pipeline.unet.config.sample_size * pipeline.vae_scale_factor


def test_nothing_left_out_reaches_a_class(folder: Path) -> None:
    left_out = {key for key, treatment in tables.CLIP_TEXT.items() if isinstance(treatment, LeftOut)}
    assert {"dtype", "return_dict", "id2label", "output_hidden_states"} <= left_out
    _edit(folder / "text_encoder/config.json", return_dict=False, output_attentions=True, dtype="float16")
    config: Any = load(str(folder)).modules["text_encoder"].config
    assert (config.return_dict, config.output_attentions, config.dtype) == (True, False, None)
