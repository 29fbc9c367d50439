# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints with the topologies people really have, one function each, for the matrix of targets.

Widths are small; block types, depths, projections, schedulers and text encoders are those of the published configs. The
last convolution of a random UNet is made louder, so that a wrong step moves the picture.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conftest import CONTEXT_TOKENS, END, VOCAB_SIZE, _write_tokenizer
from .flux2_checkpoints import PLANNED

NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True)
class Checkpoint:
    """One row of the matrix: how its folder is made, and how it draws when it is asked to."""

    name: str
    family: str
    what: str
    scheduler: str
    make: Callable[[Path], None]
    steps: int = 2
    guidance: float = 1.0
    recipe: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("onnx", "coreml", "executorch")


def text_config(hidden: int, layers: int = 2, activation: str = "quick_gelu") -> Any:
    """A CLIP text encoder's config, with the published token ids."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        max_position_embeddings=CONTEXT_TOKENS,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def vae(scaling_factor: float = 0.18215, **config: Any) -> Any:
    """An AutoencoderKL that halves the picture once."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 32}
    return AutoencoderKL(**(blocks | sizes | {"latent_channels": 4, "scaling_factor": scaling_factor} | config))


def sd_unet(**config: Any) -> Any:
    """Stable Diffusion 1.5's UNet: four levels, convolutional projections, one number of heads."""
    from diffusers import UNet2DConditionModel

    values = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return louder(UNet2DConditionModel(**(values | config)))


def sd2_unet(**config: Any) -> Any:
    """Stable Diffusion 2's UNet: linear projections, heads that grow with the level."""
    return sd_unet(attention_head_dim=(1, 2, 4, 4), use_linear_projection=True, **config)


def sdxl_unet(**config: Any) -> Any:
    """SDXL's UNet: three levels, text and sizes added to the timestep."""
    from diffusers import UNet2DConditionModel

    values = {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 32 + 64,
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 64,
    }
    return louder(UNet2DConditionModel(**(values | config)))


def louder(unet: Any) -> Any:
    """The UNet, whose predictions now have about the size of the noise."""
    import torch

    with torch.no_grad():
        unet.conv_out.weight.mul_(8)
    return unet


def scheduler(name: str, **config: Any) -> Any:
    """A diffusers scheduler on the noise schedule that all Stable Diffusion models share."""
    import diffusers

    return getattr(diffusers, name)(**(NOISE_SCHEDULE | config))


def write_sd(folder: Path, unet: Callable[[], Any], sampler: Any, text: Any = None, **parts: Any) -> None:
    """Writes a StableDiffusionPipeline folder; `unet` makes the UNet once the seed is set."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    _write_tokenizer(folder / "tokenizer", pad_token=END)
    torch.manual_seed(0)
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text or text_config(32)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet(),
        vae=parts.get("vae", vae)(),
        scheduler=sampler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_sdxl(folder: Path, unet: Callable[[], Any], sampler: Any, **parts: Any) -> None:
    """Writes a StableDiffusionXLPipeline folder; `unet` makes the UNet once the seed is set."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    _write_tokenizer(folder / "tokenizer", pad_token=END)
    _write_tokenizer(folder / "tokenizer_2", pad_token="!")
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(64, activation="gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=unet(),
        vae=parts.get("vae", lambda: vae(0.13025))(),
        scheduler=sampler,
        add_watermarker=False,
    ).save_pretrained(folder)


def _sd15(folder: Path) -> None:
    pndm = scheduler("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False)
    write_sd(folder, sd_unet, pndm)


def _sd21(folder: Path) -> None:
    ddim = scheduler("DDIMScheduler", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    write_sd(folder, sd2_unet, ddim, text_config(32, layers=3, activation="gelu"))


def _sd_turbo(folder: Path) -> None:
    euler = scheduler("EulerDiscreteScheduler", timestep_spacing="trailing")
    write_sd(folder, sd2_unet, euler, text_config(32, layers=3, activation="gelu"))


def _sdxl_base(folder: Path) -> None:
    write_sdxl(folder, sdxl_unet, scheduler("EulerDiscreteScheduler", timestep_spacing="leading"))


def _sdxl_turbo(folder: Path) -> None:
    write_sdxl(folder, sdxl_unet, scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing"))


def _ssd_1b(folder: Path) -> None:
    """Segmind's SSD-1B: the decoder's first level is deeper than the encoder's, each block has depths of its own."""
    depths = {
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    }
    euler = scheduler("EulerDiscreteScheduler", timestep_spacing="leading")
    write_sdxl(folder, lambda: sdxl_unet(**depths), euler)


def _no_mid_block(folder: Path) -> None:
    """BK-SDM-small's and -tiny's UNet, which has no middle."""
    shape = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
    }
    pndm = scheduler("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False)
    write_sd(folder, lambda: sd_unet(**shape), pndm)


def _lcm(folder: Path) -> None:
    """LCM_Dreamshaper_v7's: guidance goes into the UNet as an embedding."""
    write_sd(folder, lambda: sd_unet(time_cond_proj_dim=32), scheduler("LCMScheduler", clip_sample=False))


def _tiny_vae(folder: Path) -> None:
    """SDXL with TAESDXL, drawn by what most people draw with."""
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (32, 32), "decoder_block_out_channels": (32, 32)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    dpm = scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    write_sdxl(folder, sdxl_unet, dpm, vae=lambda: AutoencoderTiny(**channels, **blocks))


def _zero_snr(folder: Path) -> None:
    """A model fine-tuned to start from pure noise (Lin et al. 2023, arXiv 2305.08891)."""
    ddim = scheduler(
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    write_sd(folder, sd2_unet, ddim)


def _pixart_sigma(folder: Path) -> None:
    from .pixart_checkpoints import write_sigma

    write_sigma(folder)


def _pixart_alpha(folder: Path) -> None:
    from .pixart_checkpoints import write_alpha

    write_alpha(folder)


NO_PACKAGE = ("onnx", "executorch")
"""Targets of what Apple's Swift package knows no Core ML package for."""
SMALL: dict[str, Any] = {"image": {"sizes": ["32x32"]}}
"""Of a model of published size: its own picture would take minutes."""

CHECKPOINTS = (
    Checkpoint("sd15", "sd", "Stable Diffusion 1.5", "PNDM", _sd15, guidance=5.0),
    Checkpoint("sd21", "sd", "Stable Diffusion 2.1, which predicts v", "DDIM", _sd21, guidance=5.0),
    Checkpoint("sd-turbo", "sd", "SD-Turbo", "Euler, trailing", _sd_turbo),
    Checkpoint("sdxl", "sdxl", "SDXL base", "Euler, leading", _sdxl_base, guidance=5.0),
    Checkpoint("sdxl-turbo", "sdxl", "SDXL-Turbo", "Euler ancestral, trailing", _sdxl_turbo),
    Checkpoint("ssd-1b", "sdxl", "SSD-1B, each block with depths of its own", "Euler, leading", _ssd_1b, guidance=5.0),
    Checkpoint("no-mid-block", "sd", "BK-SDM small and tiny, without a middle", "PNDM", _no_mid_block, guidance=5.0),
    Checkpoint("lcm", "sd", "LCM that is told its guidance (Dreamshaper v7)", "LCM", _lcm, guidance=8.0),
    Checkpoint("tiny-vae", "sdxl", "a tiny autoencoder (TAESDXL)", "DPM-Solver++ 2M, Karras", _tiny_vae, guidance=5.0),
    Checkpoint("zero-snr", "sd", "zero terminal SNR, predicting v", "DDIM, trailing", _zero_snr, guidance=5.0),
    Checkpoint(
        "pixart-sigma",
        "pixart-sigma",
        "PixArt-Sigma",
        "DPM-Solver++ 2M",
        _pixart_sigma,
        guidance=4.5,
        targets=NO_PACKAGE,
    ),
    Checkpoint(
        "pixart-alpha",
        "pixart-alpha",
        "PixArt-Alpha, which is told sizes at 1024 pixels",
        "Euler",
        _pixart_alpha,
        guidance=4.5,
        recipe=SMALL,
        targets=NO_PACKAGE,
    ),
)


@dataclass(frozen=True)
class Refused:
    """One row of what is not supported: a change to a folder of the matrix, and what is said to it by every verb."""

    name: str
    base: str
    change: Callable[[Path], None]
    says: str
    """Part of the one sentence."""


def _edited(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _scheduled(**config: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 1000} | config))

    return change


EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLOW_SIGMAS = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True} | NOISE_SCHEDULE


REFUSED = (
    Refused(
        "class labels (`num_class_embeds`)",
        "sd15",
        _edited("unet/config.json", num_class_embeds=10),
        "num_class_embeds is 10",
    ),
    Refused(
        "gated attention (GLIGEN)",
        "sd15",
        _edited("unet/config.json", attention_type="gated"),
        "gated attention takes boxes or pictures beside the prompt",
    ),
    Refused(
        "image prompts (IP-Adapter, unCLIP)",
        "sdxl",
        _edited("unet/config.json", encoder_hid_dim_type="ip_image_proj"),
        "other states than a text encoder's steer such a model",
    ),
    Refused(
        "inpainting and editing UNets (8 or 9 channels)",
        "sd15",
        _edited("unet/config.json", in_channels=9),
        "inpainting and editing models are not supported",
    ),
    Refused(
        "EDM noise schedules (Playground v2.5 as published)",
        "sdxl",
        _scheduled(**EDM),
        "the sigmas of EDM (Karras et al. 2022)",
    ),
    Refused(
        "flow-matching schedulers",
        "sdxl",
        _scheduled(**FLOW),
        "the straight lines of flow matching",
    ),
    Refused(
        "`use_flow_sigmas` on another scheduler",
        "sdxl",
        _scheduled(**FLOW_SIGMAS),
        "the model was trained by flow matching, and samplers here need betas",
    ),
    Refused(
        "SDXL's refiner",
        "sdxl",
        _edited("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
        "pipeline class 'StableDiffusionXLImg2ImgPipeline' is not supported",
    ),
    Refused(
        "other diffusion transformers (FLUX.1, FLUX.2-dev, SD 3)",
        "sdxl",
        _edited("model_index.json", _class_name="FluxPipeline"),
        "pipeline class 'FluxPipeline' is not supported",
    ),
)
"""What is not supported, with its sentence; docs/models.md shows both lists."""


def models_page() -> str:
    """Returns the tables of docs/models.md: every row of the matrix, what is planned alone, and every refusal."""
    lines = ["| kind of checkpoint | family | scheduler | built, checked and drawn |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {each.what} | `{each.family}` | {each.scheduler} | {', '.join(each.targets)} |" for each in CHECKPOINTS
    ]
    lines += ["", "| planned, not built | family | scheduler | why |", "| --- | --- | --- | --- |"]
    lines += [f"| {each.what} | `{each.family}` | {each.scheduler} | … {each.lacks} … |" for each in PLANNED]
    lines += ["", "| not supported | what is said |", "| --- | --- |"]
    lines += [f"| {each.name} | … {each.says} … |" for each in REFUSED]
    return "\n".join(lines)
