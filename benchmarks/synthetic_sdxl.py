# SPDX-License-Identifier: Apache-2.0
"""Writes a model folder of SDXL-Turbo's size and topology, its weights drawn by chance.

    python benchmarks/synthetic_sdxl.py FOLDER [--width full|half|quarter|eighth] [--seed 0]

For what depends on sizes and shapes and not on training: memory, time, file sizes, export. Pictures are noise. Configs
are those that Stability AI published with SDXL-Turbo; a smaller width divides every width and keeps all depths and
numbers of heads. Values are drawn and written in pieces, so the memory needed is that of one piece.

Weights are normal with variance 1 / fan-in, with a scale of its own for each row (log-normal, as trained layers have
it); what a residual branch ends in is smaller, so that activations stay near 1 and finite in fp16; norms are near 1,
biases near 0; the start token has two channels near ±30, as in CLIP's hidden states. Each tensor has its own stream of
random numbers, by its name and the seed.
"""

import argparse
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import diffusers
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from turbopocket.pocket.tokenizer import Pair, byte_alphabet, learn_merges, scene_words, write_tokenizer

WIDTHS = {"full": 1, "half": 2, "quarter": 4, "eighth": 8}
VOCABULARY = 49_408
START = VOCABULARY - 2
PIECE = 2**20
"""Values drawn at a time."""
ROW_SPREAD = 0.3
"""Standard deviation of the logarithm of a row's scale."""
BRANCH_END = re.compile(r"(to_out\.0|ff\.net\.2|out_proj|mlp\.fc2|proj_out|resnets\.\d+\.conv2)\.weight")
BRANCH_SCALE = 0.3
START_OUTLIERS = (-28.0, 33.0)

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.24.0.dev0",
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def clip_config(name: str, hidden: int, heads: int, layers: int, activation: str) -> dict[str, Any]:
    """A text encoder's config.json, with the token ids that CLIP's were published with."""
    return {
        "architectures": [name],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": hidden,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": hidden,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY,
    }


def configs(divisor: int) -> dict[str, dict[str, Any]]:
    """The config.json of each component, its widths divided."""
    first, second = 768 // divisor, 1280 // divisor
    channels = [320 // divisor, 640 // divisor, 1280 // divisor]
    decoder = [128 // divisor, 256 // divisor, 512 // divisor, 512 // divisor]
    return {
        "text_encoder": clip_config("CLIPTextModel", first, 12, 12, "quick_gelu"),
        "text_encoder_2": clip_config("CLIPTextModelWithProjection", second, 20, 32, "gelu"),
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.24.0.dev0",
            "act_fn": "silu",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": channels,
            "center_input_sample": False,
            "cross_attention_dim": first + second,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": 2,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "norm_eps": 1e-05,
            "norm_num_groups": math.gcd(32, channels[0]),
            "out_channels": 4,
            "projection_class_embeddings_input_dim": 6 * 256 + second,
            "resnet_time_scale_shift": "default",
            "sample_size": 64,
            "time_embedding_type": "positional",
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.24.0.dev0",
            "act_fn": "silu",
            "block_out_channels": decoder,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": math.gcd(32, decoder[0]),
            "out_channels": 3,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    }


def clip_merges() -> list[Pair]:
    """As many byte-pair merges as CLIP has: the scene language's, then pairs, triples and quadruples of letters."""
    merges = learn_merges(scene_words())
    needed = VOCABULARY - 2 * len(byte_alphabet()) - 2
    made = {"".join(pair) for pair in merges}
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    for length in itertools.count(1):
        for parts in itertools.product(letters, repeat=length):
            for last in itertools.chain(letters, (letter + "</w>" for letter in letters)):
                if len(merges) == needed:
                    return merges
                if (pair := ("".join(parts), last)) and "".join(pair) not in made:
                    merges.append(pair)
    raise AssertionError("there are always longer words")


def empty_modules(described: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, nn.Module]]:
    """Component, stem of its weight file, and the module without values."""
    with init_empty_weights(include_buffers=False):
        for component, config in described.items():
            if component.startswith("text"):
                made = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
                yield component, "model", made
            else:
                made = getattr(diffusers, config["_class_name"]).from_config(config)
                yield component, "diffusion_pytorch_model", made


def stored_name(component: str, name: str) -> str:
    """The name that the published files have; transformers dropped a prefix of its modules since."""
    bare = component == "text_encoder" and not name.startswith("text_model.")
    return f"text_model.{name}" if bare else name


def write_weights(file: Path, component: str, module: nn.Module, seed: int) -> int:
    """Writes all tensors of the module in fp16, a piece at a time; returns their bytes."""
    owners = dict(module.named_modules())
    tensors = {stored_name(component, name): (name, value) for name, value in module.state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored, (_, value) in tensors.items():
        begin, end = end, end + 2 * value.numel()
        header[stored] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for stored, (name, value) in tensors.items():
            random = np.random.default_rng([seed, zlib.crc32(f"{component}.{stored}".encode())])
            write_values(stream, name, value, owners[name.rpartition(".")[0]], random)
    return end


def write_values(stream: BinaryIO, name: str, value: Tensor, owner: nn.Module, random: np.random.Generator) -> None:
    """Draws and writes one tensor."""
    rows = value.flatten(1) if value.dim() > 1 else value.reshape(1, -1)
    embeds, matrix = isinstance(owner, nn.Embedding), value.dim() > 1
    mean = 1.0 if name.endswith(".weight") and not matrix else 0.0
    spread = 0.02 if embeds or not matrix else BRANCH_SCALE if BRANCH_END.search(name) else 1.0
    spread = 0.1 if mean else spread if embeds or not matrix else spread / math.sqrt(rows.shape[1])
    height = max(1, PIECE // rows.shape[1])
    for top in range(0, len(rows), height):
        count = min(height, len(rows) - top)
        drawn = random.standard_normal((count, rows.shape[1]), dtype=np.float32)
        if matrix and not embeds:
            drawn *= np.exp(ROW_SPREAD * random.standard_normal((count, 1), dtype=np.float32))
        drawn = mean + spread * drawn
        if name.endswith("token_embedding.weight") and top <= START < top + count:
            drawn[START - top, [rows.shape[1] // 3, rows.shape[1] // 2]] = START_OUTLIERS
        stream.write(torch.from_numpy(drawn).half().numpy().data)


def write_folder(folder: Path, divisor: int, seed: int) -> int:
    """Writes the whole folder; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    described = configs(divisor)
    files = {f"{component}/config.json": config for component, config in described.items()}
    files |= {"model_index.json": INDEX, "scheduler/scheduler_config.json": SCHEDULER}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    merges = clip_merges()
    write_tokenizer(folder / "tokenizer", "<|endoftext|>", merges)
    write_tokenizer(folder / "tokenizer_2", "!", merges)
    return sum(
        write_weights(folder / component / f"{stem}.safetensors", component, module, seed)
        for component, stem, module in empty_modules(described)
    )


def main() -> None:
    """Writes, and says how much."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="is created")
    parser.add_argument("--width", choices=WIDTHS, default="full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    total = write_folder(options.folder, WIDTHS[options.width], options.seed)
    print(f"{options.folder}: {total / 1e9:.3f} GB of weights, {total / 2e6:,.0f} M")


if __name__ == "__main__":
    main()
