# SPDX-License-Identifier: Apache-2.0
"""Every key of every config that is read, with what is done about it; a test holds the tables to the libraries.

Values that a table allows without further words are those that the class itself builds into its graph. The ceilings
are far above all that is published, and far below what would fill a machine's memory before anything is refused.
"""

from .keys import (
    Graph,
    Honoured,
    KeyTable,
    LeftOut,
    NoEffect,
    Only,
    flag,
    number,
    numbers,
    one_whole,
    prompt_length,
    whole,
)

WIDTH = whole(1, 16_384, "at most 2,048")
CHANNELS = whole(1, 256, "3 to 16")
LAYERS = whole(1, 16, "at most 4")
DEPTH = whole(0, 32, "at most 10")
GROUPS = whole(1, 1024, "32")
KERNEL = whole(1, 15, "3")
MOST_IDS = 1_000_000
LATENT_SIDE = whole(1, 512, "32 to 128")
EPSILON = number(0, 1)
SCALE = number(1e-6, 1e6)
NO_LABELS = "class labels steer such a model, and a prompt gives none"
NO_IMAGES = "pictures steer such a model, and a prompt gives none"
FILE = NoEffect("says who wrote the file, and when")
TRAINING = NoEffect("used in training alone")
ELSEWHERE = "it names code or files that lie elsewhere, and only what lies in the folder is read"

DIFFUSERS: KeyTable = {
    "_class_name": Honoured("the class that is built"),
    "_diffusers_version": Honoured("sample_size of Stable Diffusion before 0.9.0"),
    "_name_or_path": FILE,
    "_commit_hash": FILE,
    "_use_default_values": Only((None,), "it names settings to forget"),
    "quantization_config": Only((None,), "weights are read as floating point, and compressed here"),
    "auto_map": Only((None,), ELSEWHERE),
}

EMA = (  # what diffusers' EMAModel.save_pretrained adds
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)

UNET: KeyTable = {
    **DIFFUSERS,
    **dict.fromkeys(EMA, TRAINING),
    "sample_size": Honoured("the picture's size", LATENT_SIDE),
    "in_channels": Graph(CHANNELS),
    "out_channels": Graph(CHANNELS),
    "center_input_sample": Graph(),
    "flip_sin_to_cos": Graph(),
    "freq_shift": Graph(),
    "down_block_types": Graph(),
    "mid_block_type": Graph(),
    "up_block_types": Graph(),
    "only_cross_attention": Graph(),
    "block_out_channels": Graph(WIDTH),
    "layers_per_block": Graph(LAYERS),
    "downsample_padding": Graph(whole(0, 8, "1")),
    "mid_block_scale_factor": Graph(SCALE),
    "dropout": TRAINING,
    "act_fn": Graph(),
    "norm_num_groups": Graph(GROUPS),
    "norm_eps": Graph(EPSILON),
    "cross_attention_dim": Graph(WIDTH),
    "transformer_layers_per_block": Graph(DEPTH),
    "reverse_transformer_layers_per_block": Graph(DEPTH),
    "encoder_hid_dim": Only((None,), "other states than a text encoder's steer such a model"),
    "encoder_hid_dim_type": Only((None,), "other states than a text encoder's steer such a model"),
    "attention_head_dim": Graph(WIDTH),
    "num_attention_heads": Only((None,), "diffusers reads the number of heads from attention_head_dim"),
    "dual_cross_attention": Only((False, None), NO_IMAGES),
    "use_linear_projection": Graph(),
    "class_embed_type": Only((None,), NO_LABELS),
    "addition_embed_type": Only((None,), "Stable Diffusion 1.x and 2.x give a UNet nothing but text states"),
    "addition_time_embed_dim": Graph(WIDTH),
    "num_class_embeds": Only((None,), NO_LABELS),
    "upcast_attention": NoEffect("attention is computed in fp32 either way"),
    "resnet_time_scale_shift": Graph(),
    "resnet_skip_time_act": Graph(),
    "resnet_out_scale_factor": Graph(SCALE),
    "time_embedding_type": Graph(),
    "time_embedding_dim": Graph(WIDTH),
    "time_embedding_act_fn": Graph(),
    "timestep_post_act": Graph(),
    "time_cond_proj_dim": Graph(whole(4, 16_384, "256")),
    "conv_in_kernel": Graph(KERNEL),
    "conv_out_kernel": Graph(KERNEL),
    "projection_class_embeddings_input_dim": Graph(whole(1, 131_072, "at most 2,816")),
    "attention_type": Only(("default",), "gated attention takes boxes or pictures beside the prompt"),
    "class_embeddings_concat": Only((False, None), NO_LABELS),
    "mid_block_only_cross_attention": Graph(),
    "cross_attention_norm": Graph(),
    "addition_embed_type_num_heads": NoEffect("belongs to kinds of addition_embed_type that are refused"),
}
"""Of Stable Diffusion 1.x and 2.x."""

SDXL_UNET: KeyTable = {
    **UNET,
    "addition_embed_type": Only(("text_time",), "SDXL gives a UNet the pooled text and the picture's sizes"),
}

VAE: KeyTable = {
    **DIFFUSERS,
    "in_channels": Graph(CHANNELS),
    "out_channels": Only((3,), "pictures are red, green and blue"),
    "down_block_types": Graph(),
    "up_block_types": Graph(),
    "block_out_channels": Graph(WIDTH),
    "layers_per_block": Graph(LAYERS),
    "act_fn": Graph(),
    "latent_channels": Graph(CHANNELS),
    "norm_num_groups": Graph(GROUPS),
    "sample_size": NoEffect("the size of tiles, and pictures are decoded whole"),
    "scaling_factor": Honoured("latents before they are decoded", SCALE),
    "shift_factor": NoEffect("diffusers' pipelines of these families do not shift latents"),
    "latents_mean": LeftOut("diffusers' pipeline of Stable Diffusion 1.x and 2.x does not look at it"),
    "latents_std": LeftOut("diffusers' pipeline of Stable Diffusion 1.x and 2.x does not look at it"),
    "force_upcast": NoEffect("the VAE is computed in fp32 either way"),
    "use_quant_conv": Graph(),
    "use_post_quant_conv": Graph(),
    "mid_block_add_attention": Graph(),
}
"""Of Stable Diffusion 1.x and 2.x."""

SDXL_VAE: KeyTable = {
    **VAE,
    "latents_mean": Honoured("latents before they are decoded", numbers(positive=False)),
    "latents_std": Honoured("latents before they are decoded", numbers(positive=True)),
}

TINY_VAE: KeyTable = {
    **DIFFUSERS,
    "in_channels": Graph(CHANNELS),
    "out_channels": Only((3,), "pictures are red, green and blue"),
    "encoder_block_out_channels": Graph(WIDTH),
    "decoder_block_out_channels": Graph(WIDTH),
    "block_out_channels": NoEffect("repeats decoder_block_out_channels"),
    "act_fn": Graph(),
    "upsample_fn": Graph(),
    "latent_channels": Graph(CHANNELS),
    "upsampling_scaling_factor": Only((2,), "diffusers' pipelines take each level of a VAE for a doubling"),
    "num_encoder_blocks": Graph(LAYERS),
    "num_decoder_blocks": Graph(LAYERS),
    "latent_magnitude": NoEffect("used by previews of latents alone"),
    "latent_shift": NoEffect("used by previews of latents alone"),
    "force_upcast": NoEffect("the VAE is computed in fp32 either way"),
    "scaling_factor": Honoured("latents before they are decoded", SCALE),
    "shift_factor": NoEffect("diffusers' pipelines of these families do not shift latents"),
}

GENERATION = (  # transformers kept the settings of text generation in every config once
    *("assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens"),
    *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens"),
    *("target_lookbehind", "temperature", "top_k", "top_p", "typical_p", "use_cache"),
    *("decoder_start_token_id", "sep_token_id", "prefix", "task_specific_params"),
)
OTHER_MODELS = (  # kept in every config as well, and not read by text encoders
    *("add_cross_attention", "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder"),
    *("tie_encoder_decoder", "tie_word_embeddings", "finetuning_task", "problem_type", "id2label", "label2id"),
    *("num_labels", "tokenizer_class", "torchscript", "tf_legacy_loss", "use_bfloat16", "xla_device"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
)
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

TRANSFORMERS: KeyTable = {
    **dict.fromkeys(GENERATION, LeftOut("a setting of text generation")),
    **dict.fromkeys(OTHER_MODELS, LeftOut("a setting of models of other kinds")),
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"), Only(ATTENTION, ELSEWHERE)
    ),
    **dict.fromkeys(
        ("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        Only((None,), ELSEWHERE),
    ),
    "_attn_implementation_autoset": LeftOut("says that transformers chose its way of computing attention"),
    "auto_map": Only((None,), ELSEWHERE),
    "quantization_config": Only((None,), "weights are read as floating point, and compressed here"),
    "pruned_heads": Only((None, {}), "the layers would have other shapes than the rest of the config says"),
    "per_layer_config": Only((None, {}), "each layer could then be of another shape"),
    "architectures": FILE,
    "transformers_version": FILE,
    "_name_or_path": FILE,
    "name_or_path": FILE,
    "_commit_hash": FILE,
    "torch_dtype": LeftOut("the numbers in the file; they are computed with in fp32"),
    "dtype": LeftOut("the numbers in the file; they are computed with in fp32"),
    "output_hidden_states": LeftOut("the graph asks for them itself"),
    "output_attentions": LeftOut("the graph does not give them"),
    "return_dict": LeftOut("the graph asks for the outputs by name"),
    "pad_token_id": NoEffect("the tokenizer says which id fills the end"),
}
"""What every config of transformers may hold."""

CLIP_TEXT: KeyTable = {
    **TRANSFORMERS,
    "use_attention_mask": Only((None, False), "the graph has no input that hides a prompt's padding"),
    "model_type": Only((None, "clip_text_model"), "no other text encoder is read"),
    "vocab_size": Graph(whole(1, MOST_IDS, "49,408")),
    "hidden_size": Graph(WIDTH),
    "intermediate_size": Graph(whole(1, 65_536, "at most 5,120")),
    "projection_dim": Graph(WIDTH),
    "num_hidden_layers": Graph(whole(1, 128, "at most 32")),
    "num_attention_heads": Graph(whole(1, 1024, "at most 20")),
    "max_position_embeddings": Graph(whole(2, 4096, "77")),
    "hidden_act": Graph(),
    "layer_norm_eps": Graph(EPSILON),
    "attention_dropout": TRAINING,
    "dropout": TRAINING,
    "initializer_range": TRAINING,
    "initializer_factor": TRAINING,
    "bos_token_id": NoEffect("the tokenizer says which id comes first"),
    "eos_token_id": Graph(one_whole(0, MOST_IDS - 1)),
}

TOKEN = Graph()
DECODING = NoEffect("used where ids become text again")
CHAT = NoEffect("used in conversations")
CALL = NoEffect("what a call of the tokenizer takes when it says nothing; the pipeline says it")
ALWAYS = NoEffect("the class's rules are the same either way")

TOKENIZER: KeyTable = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), TOKEN),
    **dict.fromkeys(("sep_token", "cls_token", "mask_token"), TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"), TOKEN),
    **dict.fromkeys(("add_bos_token", "add_eos_token"), ALWAYS),
    **dict.fromkeys(("add_prefix_space", "do_lower_case", "trim_offsets", "legacy", "use_fast", "from_slow"), ALWAYS),
    **dict.fromkeys(("errors", "clean_up_tokenization_spaces"), DECODING),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": DECODING,
    **dict.fromkeys(("chat_template", "response_template", "response_schema", "chat_control_tokens"), CHAT),
    **dict.fromkeys(("max_length", "stride", "truncation_strategy", "truncation", "padding"), CALL),
    **dict.fromkeys(("pad_to_multiple_of", "pad_token_type_id", "model_input_names"), CALL),
    **dict.fromkeys(("return_token_type_ids", "return_attention_mask"), CALL),
    **dict.fromkeys(("name_or_path", "_name_or_path", "processor_class", "tokenizer_version", "verbose"), FILE),
    **dict.fromkeys(("is_local", "local_files_only", "transformers_version"), FILE),
    **dict.fromkeys(
        ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file"),
        NoEffect("where the files once lay; those in the folder are read"),
    ),
    "model_max_length": Honoured("the ids of a prompt", prompt_length),
    "max_len": Honoured("the ids of a prompt, by the name it had first", prompt_length),
    "backend": Only((None, "tokenizers"), "no other library is used"),
    "padding_side": Only((None, "right"), "ids are filled up at the end"),
    "truncation_side": Only((None, "right"), "too long a prompt loses its end"),
    "split_special_tokens": Only((None, False), "tokens of the vocabulary stay whole"),
    "init_inputs": Only((None, []), "they would take the place of other settings"),
    "trust_remote_code": Only((None, False), ELSEWHERE),
    **dict.fromkeys(("auto_map", "gguf_file", "fast_tokenizer_files"), Only((None,), ELSEWHERE)),
}
"""Of every class but for the class itself."""

CLIP_TOKENIZER: KeyTable = {
    **TOKENIZER,
    "tokenizer_class": Only(("CLIPTokenizer", "CLIPTokenizerFast", None), "the text encoders are CLIP's"),
}

PIPELINE: KeyTable = {
    "_class_name": Honoured("the family"),
    "_diffusers_version": FILE,
    "_name_or_path": FILE,
    "_load_connected_pipes": FILE,
    "safety_checker": NoEffect("pictures are not judged"),
    "feature_extractor": NoEffect("it prepares pictures for the safety checker and for image prompts"),
    "requires_safety_checker": NoEffect("pictures are not judged"),
    "image_encoder": NoEffect("it reads image prompts, of which there are none"),
}
"""What stands in model_index.json beside the parts that a family must have."""

SDXL_PIPELINE: KeyTable = {
    **PIPELINE,
    "force_zeros_for_empty_prompt": Honoured("what guidance steers away from", flag),
    "add_watermarker": NoEffect("no watermark is drawn"),
    "requires_aesthetics_score": Only((None, False), "the UNet's sizes would be followed by a score"),
}
