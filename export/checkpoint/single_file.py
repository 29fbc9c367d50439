# SPDX-License-Identifier: Apache-2.0
"""Single-file checkpoints: what a .safetensors file is, told from its header, and which parts of a model it holds."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ground.errors import TurbopocketError
from .header import StoredTensor, read_header_and_metadata
from .original_names import OPEN_CLIP_PREFIXES, PREFIXES, UNET_PREFIX, in_diffusers_names
from .weight_files import PICKLED_SUFFIXES

if TYPE_CHECKING:  # a file that is refused needs no PyTorch
    from torch import nn

    from ..families.base import ModelFamily

MODEL_SUFFIXES = (".safetensors", *PICKLED_SUFFIXES, ".gguf", ".onnx", ".pte", ".mlmodel")
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint that is published as one file. `diffusers_type` is diffusers' name for it."""

    title: str
    diffusers_type: str
    is_xl: bool = False

    @property
    def family(self) -> "ModelFamily":
        """The family that it is of."""
        return family_of_unet(self.is_xl)

    @property
    def configs(self) -> str:
        """The hub id whose configs diffusers takes for a file of this kind."""
        from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

        hub_id: str = DIFFUSERS_DEFAULT_PIPELINE_PATHS[self.diffusers_type]["pretrained_model_name_or_path"]
        return hub_id


SD_1 = Kind("Stable Diffusion 1.x", "v1")
SD_2 = Kind("Stable Diffusion 2.x", "v2")
SD_XL = Kind("Stable Diffusion XL", "xl_base", is_xl=True)
SUPPORTED = "supported are checkpoints of Stable Diffusion 1.x, 2.x and XL"


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file: its components' tensors by the names in the file, and what it says of sampling.

    `is_original` says that the names are the original ones (LDM, SGM), not diffusers'; `scheduler` holds the
    scheduler settings that the file itself states, and `stated_by` where it does.
    """

    path: Path
    kind: Kind
    parts: Mapping[str, Mapping[str, StoredTensor]]
    is_original: bool
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    stated_by: tuple[str, ...] = ()

    def stored_tensors(self, component: str, module: "nn.Module") -> dict[str, StoredTensor]:
        """Returns the tensors of one component under diffusers' names; raises as `in_diffusers_names` does."""
        part = self.parts[component]
        return in_diffusers_names(component, part, module) if self.is_original else dict(part)


# What belongs to no module: schedules, averages of other weights, buffers that modules compute, outputs of CLIP
# that Stable Diffusion does not use.
EXTRAS = re.compile(
    r"""
    model_ema\..* | first_stage_model\.loss\..*
    | betas | logvar | lvlb_weights | alphas_cumprod(_prev)? | log_one_minus_alphas_cumprod
    | sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod
    | posterior_(variance|log_variance_clipped|mean_coef[12])
    | denoiser\.(log_)?sigmas
    | (.*\.)?position_ids
    | (cond_stage_model|conditioner\.embedders\.[01])\.(model\.|transformer\.)?(logit_scale|attn_mask)
    | (cond_stage_model|conditioner\.embedders\.0)\.(model\.|transformer\.)?text_projection(\.weight)?
    """,
    re.VERBOSE,
)
# An original UNet saved by itself has no prefix.
UNET_ALONE = re.compile(r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.")
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# Empty tensors by which some files tell how they were trained, and the scheduler settings that they stand for.
MARKERS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
# Metadata of Stability's model specification, and ComfyUI's name for the same.
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
PREDICTION_TYPES = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "eps": "epsilon",
    "epsilon": "epsilon",
}

# Kinds of files that people also call models: a name that only they have, what they are, what to do with them.
OTHERS = (
    (
        r"lora_|[._]lora\b|lokr_|hada_w|oft_blocks|dora_scale",
        "a LoRA",
        "give the model that it is for, and --lora FILE",
    ),
    (r"^(control_model|controlnet_cond_embedding|input_hint_block|control_add_embedding)\.", "a ControlNet", None),
    (r"^adapter\.", "a T2I-Adapter", None),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter", None),
    (r"motion_modules\.", "an AnimateDiff motion module", None),
    (r"^(emb_params|clip_[lg]|string_to_param.*|<.*>)$", "a textual inversion", None),
)
PARTS_ALONE = (
    (r"^(first_stage_model\.)?((en|de)coder|(post_)?quant_conv)\.", "a VAE only"),
    (r"^(transformer\.)?(text_model\.|text_projection|logit_scale)", "a text encoder only"),
)
CHANNELS = {
    5: "a depth-to-image checkpoint",
    7: "an upscaler",
    8: "an editing checkpoint (InstructPix2Pix)",
    9: "an inpainting checkpoint",
}


def family_of_unet(is_xl: bool) -> "ModelFamily":
    """The family whose denoiser is such a UNet: that of Stable Diffusion XL, or the one before it."""
    from ..families.sd import SD
    from ..families.sdxl import SDXL

    return SDXL if is_xl else SD


class NotACheckpoint(TurbopocketError):
    """A file that holds something else than a checkpoint we read; `what` names it."""

    def __init__(self, path: Path, what: str, hint: str | None = None, wanted: str = SUPPORTED) -> None:
        super().__init__(f"{path} is {what}; {wanted}", hint)
        self.what = what


def describe(path: Path) -> tuple[str, bool]:
    """Returns what a file is, in a few words, and whether it is a checkpoint that we read."""
    try:
        return f"a {open_single_file(path).kind.title} checkpoint", True
    except NotACheckpoint as error:
        return error.what, False
    except TurbopocketError:
        return "broken", False


def open_single_file(path: Path, config: str | None = None) -> SingleFile:
    """Returns what a .safetensors file holds, from its header alone.

    Raises TurbopocketError when it is no checkpoint of a supported family, is broken, or has tensors that belong
    to none of its parts; `config` is for the hint of how to convert a pickle.
    """
    _refuse_other_formats(path, config)
    tensors, metadata = read_header_and_metadata(path)
    for pattern, what, hint in OTHERS:
        if any(re.search(pattern, name) for name in tensors):
            raise NotACheckpoint(path, what, hint)
    if "input_blocks.0.0.weight" in tensors:
        tensors = {UNET_PREFIX + name if UNET_ALONE.match(name) else name: stored for name, stored in tensors.items()}
    is_original = f"{UNET_PREFIX}input_blocks.0.0.weight" in tensors
    is_diffusers = "conv_in.weight" in tensors and any(name.startswith("down_blocks.") for name in tensors)
    if not is_original and not is_diffusers:
        raise NotACheckpoint(path, *_without_unet(tensors))
    stated_by, scheduler = _stated(path, tensors, metadata)
    kind = _kind(path, tensors)
    parts = _original_parts(path, tensors) if is_original else {"unet": tensors}
    ordered = {name: parts[name] for name in kind.family.modules if name in parts}
    return SingleFile(path, kind, ordered, is_original, scheduler, stated_by)


def _refuse_other_formats(path: Path, config: str | None) -> None:
    allowed = "allowed is a checkpoint in .safetensors"
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    if is_gguf:
        raise NotACheckpoint(path, "a GGUF file, whose weights are compressed already", wanted=allowed)
    if path.suffix in PICKLED_SUFFIXES:
        raise NotACheckpoint(
            path, "a pickle, which can run code when opened", conversion_command(path, config), allowed
        )
    if path.suffix != ".safetensors":
        raise NotACheckpoint(path, f"a {path.suffix or 'nameless'} file", wanted=allowed)


def conversion_command(pickle: Path, config: str | None) -> str:
    """Returns the command by which diffusers makes a folder of a pickled checkpoint, without running its code."""
    configs = f", config={config!r}" if config else ""
    return (
        f"""python -c "from diffusers import StableDiffusionXLPipeline as P; P.from_single_file({str(pickle)!r}"""
        f"""{configs}).save_pretrained({str(pickle.with_suffix(""))!r})" (StableDiffusionPipeline for SD 1.x and 2.x)"""
    )


def _without_unet(tensors: Mapping[str, StoredTensor]) -> tuple[str, str | None]:
    """What a file without a UNet is, and what to do with it."""
    for pattern, what in PARTS_ALONE:
        if tensors and all(re.match(pattern, name) for name in tensors):
            return what, "give the checkpoint that it belongs to"
    parts = sorted({part for prefix, part in PREFIXES.items() for name in tensors if name.startswith(prefix)})
    if parts and "unet" not in parts:
        return f"a checkpoint without its UNet ({', '.join(parts)})", None
    return _other_architecture(tensors) or f"no checkpoint of a diffusion model ({_shown(tensors)})", None


def _other_architecture(tensors: Mapping[str, StoredTensor]) -> str | None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        found = infer_diffusers_model_type(dict(tensors))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        return None
    return None if found == "v1" else f"a checkpoint of another architecture ({found})"  # v1 is its answer to all else


def _original_parts(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    parts: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, stored in tensors.items():
        if EXTRAS.fullmatch(name) or name in SD_2_TEXT_ENCODER_KEYS_TO_IGNORE or name in MARKERS:
            continue
        component = next((part for prefix, part in PREFIXES.items() if name.startswith(prefix)), None)
        if component is None:
            unknown.append(stored.name)
        else:
            parts.setdefault(component, {})[name] = stored
    if unknown:
        raise TurbopocketError(f"{path}: {len(unknown)} tensors are in no part that is known here: {_shown(unknown)}")
    return parts


def _kind(path: Path, tensors: Mapping[str, StoredTensor]) -> Kind:
    """Which kind of checkpoint it is: its text encoders say so, else what the UNet is conditioned on."""
    unet = {name.removeprefix(UNET_PREFIX): stored for name, stored in tensors.items()}
    conv_in = unet.get("input_blocks.0.0.weight") or unet.get("conv_in.weight")
    channels = conv_in.shape[1] if conv_in and len(conv_in.shape) == 4 else 4
    if channels != 4:
        what = CHANNELS.get(channels, "a checkpoint of another architecture")
        raise NotACheckpoint(path, f"{what}: its UNet takes {channels} channels", wanted=f"{SUPPORTED}, which take 4")
    added = unet.get("label_emb.0.0.weight") or unet.get("add_embedding.linear_1.weight")
    if any(name.startswith("conditioner.embedders.0.model.") for name in tensors) or (
        added and added.shape[1:] == (2560,)
    ):
        raise NotACheckpoint(path, "a Stable Diffusion XL refiner")
    if any(name.startswith("conditioner.embedders.") for name in tensors):
        return SD_XL
    if any(name.startswith("cond_stage_model.") for name in tensors):
        return SD_2 if any(name.startswith(OPEN_CLIP_PREFIXES[0]) for name in tensors) else SD_1
    if added:
        return SD_XL
    widths = {stored.shape[-1] for name, stored in unet.items() if name.endswith("attn2.to_k.weight") and stored.shape}
    return SD_2 if widths == {1024} else SD_1


def _stated(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Where the file itself tells of its noise schedule, and the scheduler settings that follow from that."""
    if edm := [name for name in EDM_MARKERS if name in tensors]:
        raise NotACheckpoint(path, f"a checkpoint with continuous noise levels (EDM; tensor {edm[0]})")
    stated_by, scheduler = [], {}
    for key in PREDICTION_KEYS:
        if prediction_type := PREDICTION_TYPES.get(str(metadata.get(key)).lower()):
            stated_by.append(key)
            scheduler["prediction_type"] = prediction_type
    for name, settings in MARKERS.items():
        if name in tensors:
            stated_by.append(name)
            scheduler |= settings
    return tuple(stated_by), scheduler


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:NAMES_SHOWN]) + (" ..." if len(ordered) > NAMES_SHOWN else "")
