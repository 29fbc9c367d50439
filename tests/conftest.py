# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints on disk, laid out as the published ones are: safetensors, one folder per component.

Every width is a multiple of 32, so that groups of 32 divide nearly every layer; the VAE halves the picture
once (its scale is 2, not the published 8), so that code which assumes 8 fails here.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from .core_ml_stand_in import mac  # noqa: F401  a fixture for every test

settings.register_profile("long", max_examples=6_000)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

QUICK = ("quant", "runtimes")
"""Folders of many files that take seconds each."""

CONTEXT_TOKENS = 77
WORDS = ("a", "an", "blue", "cat", "circle", "green", "on", "red", "square", "the", "triangle", "white")
START, END = "<|startoftext|>", "<|endoftext|>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick files last: processes that take a whole file at a time then end together."""
    items.sort(key=lambda item: not set(item.path.parts).isdisjoint(QUICK))


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def turbopocket(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command in this process; a traceback fails the test, since main() lets only unknown errors through."""
    from turbopocket.cli import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["turbopocket", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capfd.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run


def _byte_letters() -> list[str]:
    """Returns byte-level BPE's 256 letters in CLIP's order: printable bytes (of which 0 is !), the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + index) for index in range(256 - len(printable))]


def _bpe() -> tuple[dict[str, int], list[str]]:
    """Returns (vocab, merges) of a CLIP-style BPE: each of WORDS is one token, END has the largest id."""
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[0])
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges


VOCAB_SIZE = len(_bpe()[0])


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    """Writes the four files of a published CLIP tokenizer: no tokenizer.json, as in the SDXL repositories."""
    vocab, merges = _bpe()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_TOKENS,
        "add_prefix_space": False,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
    }
    special = {key: value for key, value in config.items() if str(key).endswith("_token")}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def _text_config(hidden: int, activation: str) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 16,
        max_position_embeddings=CONTEXT_TOKENS,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,  # the published value, which means "pool at the largest id", not "at id 2"
        pad_token_id=1,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.13025,
    )


def _sdxl_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=32 + 64,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
    )


def _sd_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def _scheduler(name: str, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options
    )


@pytest.fixture(scope="session")
def kept_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """From here on a component is traced once in a run, by whichever process is the first to need it."""
    from .kept_traces import keeping_traces

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traces"
    folder.mkdir(exist_ok=True)
    with keeping_traces(folder):
        yield


@pytest.fixture(scope="session")
def tiny_sdxl(kept_traces: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionXLPipeline folder: text encoders 32 and 64 wide, 3-level UNet, 32-pixel images."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_sdxl"
    _write_tokenizer(folder / "tokenizer", pad_token=END)
    _write_tokenizer(folder / "tokenizer_2", pad_token="!")
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(_text_config(32, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(64, "gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=_sdxl_unet(),
        vae=_vae(),
        scheduler=_scheduler("EulerDiscreteScheduler", timestep_spacing="trailing"),
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    for tokenizer_json in folder.glob("tokenizer*/tokenizer.json"):
        tokenizer_json.unlink()
    # Trailing spacing is what few-step checkpoints have, so this folder has to say that it is none.
    (folder / "sampling.json").write_text(json.dumps({"steps": 30, "guidance_scale": 5.0}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd(kept_traces: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder: one text encoder, UNet of 2 levels with convolutional projections."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_sd"
    _write_tokenizer(folder / "tokenizer", pad_token=END)
    torch.manual_seed(1)
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(_text_config(32, "quick_gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=_sd_unet(),
        vae=_vae(),
        scheduler=_scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    for tokenizer_json in folder.glob("tokenizer*/tokenizer.json"):
        tokenizer_json.unlink()
    return folder


@pytest.fixture(scope="session")
def emulator_cache() -> Path:
    """The emulated ARM CPUs, in the user's cache folder; set up (about 175 MB) where they are not yet."""
    from turbopocket.runtimes.arm64.setup import default_cache, prepare

    prepare(default_cache(), print)
    return default_cache()
