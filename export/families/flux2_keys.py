# SPDX-License-Identifier: Apache-2.0
"""Keys of FLUX.2-klein's configs: the transformer, Qwen3 and its tokenizer, the VAE, the pipeline; see `key_tables`."""

from typing import Any

from .key_tables import (
    CHANNELS,
    DIFFUSERS,
    EPSILON,
    FILE,
    GROUPS,
    LAYERS,
    MOST_IDS,
    TOKENIZER,
    TRAINING,
    TRANSFORMERS,
    WIDTH,
)
from .key_tables import VAE as KL_VAE
from .keys import Graph, Honoured, KeyTable, LeftOut, NoEffect, Only, flag, number, whole

UNDRAWN = LeftOut("no shape and no byte depends on it, and no picture is drawn yet")
NO_WINDOWS = "the graph has every token see all before it, and no window of them"
PATCHES = "the pipeline draws in patches of 2 x 2 latents"


def full_attention(value: Any) -> str | None:
    """A check for null or a list in which every layer has `full_attention`."""
    whole_list = value is None or (isinstance(value, list) and all(each == "full_attention" for each in value))
    return None if whole_list else f"'full_attention' for every layer is needed, because {NO_WINDOWS}"


TRANSFORMER: KeyTable = {
    **DIFFUSERS,
    "_diffusers_version": FILE,
    "patch_size": Only((1,), f"{PATCHES}, and the transformer is given these"),
    "in_channels": Graph(whole(1, 1024, "128")),
    "out_channels": Graph(whole(1, 1024, "as many as in_channels")),
    "num_layers": Graph(whole(1, 128, "5 or 8")),
    "num_single_layers": Graph(whole(1, 128, "20 or 24")),
    "attention_head_dim": Graph(WIDTH),
    "num_attention_heads": Graph(whole(1, 1024, "24 or 32")),
    "joint_attention_dim": Graph(whole(1, 65_536, "7,680 or 12,288")),
    "timestep_guidance_channels": Graph(whole(2, 16_384, "256")),
    "mlp_ratio": Graph(number(0.01, 64)),
    "axes_dims_rope": Graph(whole(2, 1024, "32")),
    "rope_theta": Graph(number(1, 1e9)),
    "eps": Graph(EPSILON),
    "guidance_embeds": Only((False,), "the pipeline of FLUX.2-klein tells the transformer no guidance"),
}

VAE: KeyTable = {
    **DIFFUSERS,
    **{key: KL_VAE[key] for key in ("in_channels", "out_channels", "down_block_types", "up_block_types", "act_fn")},
    **{key: KL_VAE[key] for key in ("sample_size", "force_upcast", "mid_block_add_attention")},
    "block_out_channels": Graph(WIDTH),
    "decoder_block_out_channels": Graph(WIDTH),
    "layers_per_block": Graph(LAYERS),
    "latent_channels": Graph(CHANNELS),
    "norm_num_groups": Graph(GROUPS),
    "use_quant_conv": Graph(flag),
    "use_post_quant_conv": Graph(flag),
    "batch_norm_eps": Graph(EPSILON),
    "batch_norm_momentum": TRAINING,
    "patch_size": Only(([2, 2], (2, 2)), PATCHES),
}

QWEN3: KeyTable = {
    **TRANSFORMERS,
    "model_type": Only((None, "qwen3"), "no other text encoder is read"),
    "tie_word_embeddings": Graph(flag),
    "vocab_size": Graph(whole(1, MOST_IDS, "151,936")),
    "hidden_size": Graph(WIDTH),
    "intermediate_size": Graph(whole(1, 65_536, "9,728 or 12,288")),
    "num_hidden_layers": Graph(whole(1, 128, "36")),
    "num_attention_heads": Graph(whole(1, 1024, "32")),
    "num_key_value_heads": Graph(whole(1, 1024, "8")),
    "head_dim": Graph(whole(1, 1024, "128")),
    "hidden_act": Graph(),
    "rms_norm_eps": Graph(EPSILON),
    "attention_bias": Graph(flag),
    "use_sliding_window": Only((False, None), NO_WINDOWS),
    "sliding_window": NoEffect("only read with use_sliding_window, which is refused"),
    "max_window_layers": NoEffect("only read with use_sliding_window, which is refused"),
    "layer_types": Graph(full_attention),
    "max_position_embeddings": NoEffect("positions are computed, and the pipeline says how many ids a prompt has"),
    **dict.fromkeys(("rope_parameters", "rope_theta", "rope_scaling"), UNDRAWN),
    "attention_dropout": TRAINING,
    "initializer_range": TRAINING,
    "bos_token_id": NoEffect("the tokenizer says which ids a prompt has"),
    "eos_token_id": NoEffect("the tokenizer says which ids a prompt has"),
}

QWEN_TOKENIZER: KeyTable = {
    **TOKENIZER,
    "chat_template": UNDRAWN,
    "model_max_length": NoEffect("the pipeline says how many ids a prompt has"),
    "max_len": NoEffect("the pipeline says how many ids a prompt has"),
    "tokenizer_class": Only(("Qwen2Tokenizer", "Qwen2TokenizerFast"), "the text encoder is Qwen's"),
}

PIPELINE: KeyTable = {
    "_class_name": Honoured("the family"),
    "_diffusers_version": FILE,
    "_name_or_path": FILE,
    "_load_connected_pipes": FILE,
    "is_distilled": UNDRAWN,
}
"""What stands in model_index.json beside the parts."""
