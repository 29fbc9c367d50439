# SPDX-License-Identifier: Apache-2.0
"""The configs of FLUX.2-klein-4B by Black Forest Labs, and what its files hold.

huggingface.co/black-forest-labs/FLUX.2-klein-4B, revision e7b7dc27f91deacad38e78976d1f2b499d76a294, by public copies of
its configs (YuCollection/FLUX.2-klein-base-4B-Diffusers, of the same architecture; deAPI-ai/flux-2-klein-4b-bf16;
tovwil/FLUX.2-klein-4B), where these show a config whole; what they cut off of the text encoder's is as in Qwen3-4B's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .published_sdxl import write_configs

INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.37.0.dev0",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel",
    "_diffusers_version": "0.37.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers_version": "4.56.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
VAE = {
    "_class_name": "AutoencoderKLFlux2",
    "_diffusers_version": "0.37.0.dev0",
    "_name_or_path": "black-forest-labs/FLUX.2-dev",
    "act_fn": "silu",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "patch_size": [2, 2],
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.37.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FILES: Mapping[str, Mapping[str, Any]] = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": SCHEDULER,
    "text_encoder/config.json": QWEN3_4B,
    "transformer/config.json": TRANSFORMER,
    "vae/config.json": VAE,
}

FILE_BYTES = {
    "transformer/diffusion_pytorch_model.safetensors": 7_751_109_744,
    "vae/diffusion_pytorch_model.safetensors": 168_120_878,
}
"""Of the published files, which hold bf16."""
TEXT_ENCODER_BYTES = 8_044_936_192
"""`total_size` in text_encoder/model.safetensors.index.json, the tensors of both shards."""


def write_klein(folder: Path) -> Path:
    """Writes the folder, which `plan` takes, and returns it."""
    return write_configs(folder, FILES)
