# SPDX-License-Identifier: Apache-2.0
"""Configs as they were published pass with every key that they carry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.checkpoint.load import load_shapes
from turbopocket.export.families import key_tables as tables
from turbopocket.export.families.keys import KeyTable, check_config

from ..published_sdxl import CLIP_L, FILES, INDEX, OPENCLIP_BIG_G, UNET, VAE, write_configs
from .test_families_keys import PARTS, parameters_of

EMA = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 0.6666666666666666,
       "update_after_step": 0, "use_ema_warmup": False}  # fmt: skip


LATER_UNET = {
    "attention_type": "default", "class_embeddings_concat": False, "cross_attention_norm": None, "dropout": 0.0,
    "dual_cross_attention": False, "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1,
    "num_attention_heads": None, "only_cross_attention": False, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "reverse_transformer_layers_per_block": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "timestep_post_act": None, "_name_or_path": "valhalla/sdxl-inpaint-ema",
}  # fmt: skip


LATER_VAE = {
    "latents_mean": None, "latents_std": None, "mid_block_add_attention": True, "shift_factor": None,
    "use_post_quant_conv": True, "use_quant_conv": True, "_name_or_path": "../sdxl-vae/",
}  # fmt: skip


PLAYGROUND_VAE = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}  # fmt: skip


EVERYTHING_TRANSFORMERS_ONCE_WROTE = {
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
    "typical_p": 1.0, "use_bfloat16": False, "_attn_implementation_autoset": True, "_commit_hash": None,
}  # fmt: skip


SSD_1B = {
    "transformer_layers_per_block": [0, [2, 2], [4, 4]], "mid_block_type": None,
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
}  # fmt: skip


TURBO_INDEX = {"feature_extractor": [None, None], "image_encoder": [None, None], "_name_or_path": "stabilityai/x"}


SD_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}  # fmt: skip


TOKENIZER_SD = {
    "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
    "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": True,
                  "rstrip": False, "single_word": False},
    "name_or_path": "openai/clip-vit-large-patch14", "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json", "tokenizer_class": "CLIPTokenizer",
}  # fmt: skip


TOKENIZER_LATER = {
    "added_tokens_decoder": {"49406": {"content": "<|startoftext|>", "special": True}}, "backend": "tokenizers",
    "clean_up_tokenization_spaces": True, "is_local": True, "local_files_only": True, "extra_special_tokens": {},
    "max_length": 77, "pad_to_multiple_of": None, "pad_token_type_id": 0, "padding_side": "right", "stride": 0,
    "truncation_side": "right", "truncation_strategy": "longest_first",
}  # fmt: skip


PUBLISHED: list[tuple[KeyTable, str, Mapping[str, Any]]] = [
    (tables.SDXL_UNET, "UNet2DConditionModel", UNET | LATER_UNET | EMA),
    (tables.SDXL_UNET, "UNet2DConditionModel", UNET | LATER_UNET | SSD_1B),
    (tables.SDXL_VAE, "AutoencoderKL", VAE | LATER_VAE),
    (tables.SDXL_VAE, "AutoencoderKL", VAE | PLAYGROUND_VAE),
    (tables.CLIP_TEXT, "CLIPTextConfig", CLIP_L | EVERYTHING_TRANSFORMERS_ONCE_WROTE),
    (tables.CLIP_TEXT, "CLIPTextConfig", OPENCLIP_BIG_G),
    (tables.CLIP_TOKENIZER, "CLIPTokenizer", TOKENIZER_SD),
    (tables.CLIP_TOKENIZER, "CLIPTokenizer", TOKENIZER_SD | TOKENIZER_LATER),
    (tables.SDXL_PIPELINE, "", {k: v for k, v in (INDEX | TURBO_INDEX).items() if k not in PARTS}),
    (tables.PIPELINE, "", SD_INDEX),
    (tables.PIPELINE, "", SD_INDEX | {"requires_safety_checker": False, "safety_checker": [None, None]}),
]


@pytest.mark.parametrize(("table", "name", "config"), PUBLISHED)
def test_published_configs_pass_with_all_they_carry(table: KeyTable, name: str, config: Mapping[str, Any]) -> None:
    library = "diffusers" if name in ("UNet2DConditionModel", "AutoencoderKL") else "transformers"
    defaults = parameters_of(library, name) if name else {}
    check_config(config, table, defaults, Path("config.json"), name)


def test_a_folder_with_all_that_was_ever_published_loads(tmp_path: Path) -> None:
    """The tables let it through, and so do the classes, which get no key that the tables leave out."""
    text = CLIP_L | EVERYTHING_TRANSFORMERS_ONCE_WROTE | {"output_hidden_states": True, "return_dict": False}
    files = FILES | {
        "model_index.json": INDEX | TURBO_INDEX,
        "text_encoder/config.json": text,
        "text_encoder_2/config.json": {"model_type": "clip", "text_config": OPENCLIP_BIG_G},
        "vae/config.json": VAE | LATER_VAE | PLAYGROUND_VAE,
        "unet/config.json": UNET | LATER_UNET | EMA,
        "tokenizer/tokenizer_config.json": TOKENIZER_SD,
    }
    model = load_shapes(str(write_configs(tmp_path, files)))
    vae: Any = model.modules["vae"]
    assert vae.config["latents_std"] == PLAYGROUND_VAE["latents_std"]
    assert round(sum(p.numel() for p in model.modules["text_encoder_2"].parameters()) / 1e6) == 695
