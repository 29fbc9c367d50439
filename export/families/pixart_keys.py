# SPDX-License-Identifier: Apache-2.0
"""Keys of PixArt's configs: the transformer, T5's encoder and tokenizer, the pipelines; see `key_tables`."""

from .key_tables import (
    ALWAYS,
    CHANNELS,
    DIFFUSERS,
    EPSILON,
    FILE,
    MOST_IDS,
    TOKEN,
    TOKENIZER,
    TRAINING,
    TRANSFORMERS,
    VAE,
    WIDTH,
)
from .keys import Graph, Honoured, KeyTable, LeftOut, NoEffect, Only, flag, one_whole, whole

GATED = "the encoders of PixArt are T5 1.1's, whose feed-forward layers are gated"

TRANSFORMER: KeyTable = {
    **DIFFUSERS,
    "_diffusers_version": FILE,
    "num_attention_heads": Graph(whole(1, 1024, "16")),
    "attention_head_dim": Graph(WIDTH),
    "in_channels": Graph(CHANNELS),
    "out_channels": Graph(CHANNELS),
    "num_layers": Graph(whole(1, 128, "28")),
    "dropout": TRAINING,
    "norm_num_groups": NoEffect("the class has no group normalization"),
    "cross_attention_dim": Graph(WIDTH),
    "attention_bias": Graph(),
    "sample_size": Honoured("the picture's size, and whether a pipeline tells sizes", one_whole(1, 512)),
    "patch_size": Graph(one_whole(1, 16)),
    "activation_fn": Graph(),
    "num_embeds_ada_norm": NoEffect("timesteps are embedded as sines, of which there is no fixed number"),
    "upcast_attention": NoEffect("attention is computed in fp32 either way"),
    "norm_type": Only(("ada_norm_single",), "PixArt's class has no other"),
    "norm_elementwise_affine": Graph(),
    "norm_eps": Graph(EPSILON),
    "interpolation_scale": Graph(whole(1, 64, "1 or 2")),
    "use_additional_conditions": Graph(flag),
    "caption_channels": Graph(WIDTH),
    "attention_type": Only(("default", None), "gated attention takes boxes or pictures beside the prompt"),
}
"""Of Alpha."""

SIGMA_TRANSFORMER: KeyTable = {
    **TRANSFORMER,
    "use_additional_conditions": Only((False,), "the pipeline of PixArt-Sigma tells no sizes"),
}

PIXART_VAE: KeyTable = {
    **VAE,
    "latents_mean": LeftOut("diffusers' pipelines of PixArt do not look at it"),
    "latents_std": LeftOut("diffusers' pipelines of PixArt do not look at it"),
}

T5_ENCODER: KeyTable = {
    **TRANSFORMERS,
    "model_type": Only((None, "t5"), "no other text encoder is read"),
    "vocab_size": Graph(whole(1, MOST_IDS, "32,128")),
    "d_model": Graph(WIDTH),
    "d_kv": Graph(WIDTH),
    "d_ff": Graph(whole(1, 65_536, "at most 10,240")),
    "num_layers": Graph(whole(1, 128, "at most 24")),
    "num_heads": Graph(whole(1, 1024, "at most 64")),
    "relative_attention_num_buckets": Graph(whole(4, 1024, "32")),
    "relative_attention_max_distance": Graph(whole(2, 65_536, "128")),
    "layer_norm_epsilon": Graph(EPSILON),
    "feed_forward_proj": Only(("gated-gelu",), GATED),
    "dense_act_fn": Only((None, "gelu_new"), GATED),
    "is_gated_act": Only((None, True), GATED),
    "is_decoder": Only((False, None), "prompts are read as a whole, not word after word"),
    "num_decoder_layers": LeftOut("the pipeline has no decoder"),
    "scale_decoder_outputs": LeftOut("the pipeline has no decoder"),
    "dropout_rate": TRAINING,
    "classifier_dropout": TRAINING,
    "initializer_factor": TRAINING,
    "eos_token_id": NoEffect("the tokenizer says which id comes last"),
    "bos_token_id": NoEffect("T5 has none"),
    "output_past": LeftOut("a setting of text generation"),
    "n_positions": LeftOut("positions are relative, of which there is no fixed number"),
}

T5_TOKENIZER: KeyTable = {
    **TOKENIZER,
    "model_max_length": NoEffect("the pipeline says how many ids a prompt has"),
    "max_len": NoEffect("the pipeline says how many ids a prompt has"),
    "extra_ids": TOKEN,
    "legacy": ALWAYS,
    "sp_model_kwargs": Only((None, {}), "pieces that are drawn by lot would give other pictures each time"),
    "_spm_precompiled_charsmap": Only((None,), "spiece.model and tokenizer.json say it themselves"),
    "full_tokenizer_file": NoEffect("where the file once lay; those in the folder are read"),
    "tokenizer_class": Only(("T5Tokenizer", "T5TokenizerFast"), "the text encoder is T5's"),
}

PIPELINE: KeyTable = {
    "_class_name": Honoured("the family"),
    "_diffusers_version": FILE,
    "_name_or_path": FILE,
    "_load_connected_pipes": FILE,
}
"""What stands in model_index.json beside the parts."""
