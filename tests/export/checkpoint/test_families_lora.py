# SPDX-License-Identifier: Apache-2.0
"""LoRA files are merged into the weights: W + strength · alpha / rank · B A, each layer by its own numbers.

Held against peft and diffusers with the adapter active, and against the formula where they are wrong themselves.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from turbopocket.export.checkpoint.load import load
from turbopocket.export.checkpoint.lora.file import LoraFile
from turbopocket.export.families.base import LoadedModel

from .lora_files import RANK, adaptable, factors, kohya, kohya_lora, merged, other_parameters

ADAPTED = ("to_q", "to_v", "q_proj", "fc1")
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tiny_sdxl: Path) -> LoadedModel:
    return load(str(tiny_sdxl))


@pytest.fixture(scope="module")
def sd(tiny_sd: Path) -> LoadedModel:
    return load(str(tiny_sd))


def _published_name(component: str, path: str) -> str:
    return f"{component}.text_model.{path}" if component == "text_encoder" else f"{component}.{path}"


def _lora(model: LoadedModel, components: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns a LoRA of one rank in diffusers' naming."""
    tensors: dict[str, Tensor] = {}
    for component in components:
        for seed, (path, layer) in enumerate(adaptable(model.modules[component]).items()):
            if path.endswith(ADAPTED):
                down, up = factors(layer, seed=seed)
                name = _published_name(component, path)
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


@pytest.fixture(scope="module")
def lora_file(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(_lora(base, ("unet", "text_encoder", "text_encoder_2")), file)
    return file


def _prediction(modules: Any) -> Tensor:
    """Returns SDXL's UNet output for a fixed prompt and latents, through both text encoders."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 540, (1, 77), generator=generator)
    with torch.no_grad():
        first = modules["text_encoder"](ids, output_hidden_states=True)
        second = modules["text_encoder_2"](ids, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        conditions = {"text_embeds": second.text_embeds, "time_ids": torch.full((1, 6), 32.0)}
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        sample: Tensor = modules["unet"](latents, 999, text, added_cond_kwargs=conditions).sample
    return sample


def _unet_output(unet: Any) -> Tensor:
    """Returns Stable Diffusion's UNet output for fixed latents and text."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    with torch.no_grad():
        sample: Tensor = unet(latents, 500, torch.randn(1, 77, 32, generator=generator)).sample
    return sample


@pytest.mark.parametrize("strength", [1.0, 0.8, -0.5])
def test_merged_model_equals_the_pipeline_with_the_lora_active(
    tiny_sdxl: Path, lora_file: Path, base: LoadedModel, strength: float
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    pipeline.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name, adapter_name="style")
    pipeline.set_adapters("style", strength)
    active = _prediction(pipeline.components)
    found = _prediction(load(str(tiny_sdxl), [LoraFile(lora_file, strength)]).modules)
    assert torch.allclose(found, active, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_prediction(base.modules), active, rtol=1e-2, atol=1e-2)


def test_file_that_diffusers_saves_with_its_config_equals_the_pipeline(
    tiny_sdxl: Path, base: LoadedModel, tmp_path: Path
) -> None:
    """Ranks and alphas differ by layer; the alphas are only in the file's metadata."""
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    configs = {
        "unet": LoraConfig(
            r=4, lora_alpha=6, target_modules=["to_q", "to_k", "conv1", "time_emb_proj"], init_lora_weights=False,
            rank_pattern={"conv1": 2, TO_Q: 3}, alpha_pattern={"conv1": 3, TO_Q: 1, f"^{TO_Q[:-1]}k": 9},
        ),
        "text_encoder": LoraConfig(
            r=2, lora_alpha=1, target_modules=["q_proj"], init_lora_weights=False,
            alpha_pattern={"encoder.layers.1.self_attn.q_proj": 5},
        ),
        "text_encoder_2": LoraConfig(
            r=9, lora_alpha=2, target_modules=["fc1"], init_lora_weights=False, use_rslora=True,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    states: dict[str, Any] = {}
    for component, config in configs.items():
        module = pipeline.components[component]
        module.add_adapter(config)
        layers = "unet_lora_layers" if component == "unet" else f"{component}_lora_layers"
        states |= {layers: get_peft_model_state_dict(module), f"{component}_lora_adapter_metadata": config.to_dict()}
    pipeline.save_lora_weights(tmp_path, weight_name="saved.safetensors", **states)
    merged_model = load(str(tiny_sdxl), [LoraFile(tmp_path / "saved.safetensors")])
    active = _prediction(pipeline.components)
    assert torch.allclose(_prediction(merged_model.modules), active, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_prediction(base.modules), active, rtol=1e-2, atol=1e-2)


def _peft_configs() -> dict[str, Any]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    layers: dict[str, Any] = {"target_modules": ["to_q", "to_out.0", "conv1", "conv_shortcut", "proj_in", "conv"]}
    return {
        "lora": LoraConfig(**layers, r=3, lora_alpha=5, lora_bias=True, init_lora_weights=False),
        "loha": LoHaConfig(**layers, r=3, alpha=5, init_weights=False),
        "loha-core": LoHaConfig(**layers, r=3, alpha=5, init_weights=False, use_effective_conv2d=True),
        "lokr": LoKrConfig(**layers, r=2, alpha=5, init_weights=False),
        "lokr-core": LoKrConfig(
            **layers, r=1, alpha=5, init_weights=False, use_effective_conv2d=True, decompose_both=True
        ),
        "lokr-whole": LoKrConfig(**layers, r=64, alpha=64, init_weights=False),
    }


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")  # peft can not merge it, but runs it
@pytest.mark.parametrize("method", ["lora", "loha", "loha-core", "lokr", "lokr-core", "lokr-whole"])
def test_every_method_and_kind_of_layer_equals_peft(sd: LoadedModel, tmp_path: Path, method: str) -> None:
    """Linear and convolutions, of one tap and of nine; LoRA with biases, also where the layer has none."""
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    config = _peft_configs()[method]
    active = inject_adapter_in_model(config, deepcopy(sd.modules["unet"]))
    tensors: dict[str, Tensor] = {}
    for name, values in active.state_dict().items():
        if ".default" in name:
            path, _, part = name.replace(".default", "").rpartition(".lora_" if method == "lora" else ".")
            tensors[f"{kohya(path)}.{'lora_' if method == 'lora' else ''}{part}"] = values
            tensors[f"{kohya(path)}.alpha"] = torch.tensor(float(getattr(config, "lora_alpha", 0) or config.alpha))
    found = merged(sd, tensors, tmp_path).modules["unet"]
    wanted = _unet_output(active)
    assert torch.allclose(_unet_output(found), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(_unet_output(sd.modules["unet"]), wanted, rtol=1e-2, atol=1e-2)


def test_each_layer_has_its_own_rank_and_alpha(base: LoadedModel, tmp_path: Path) -> None:
    """As resized kohya files have; a missing alpha is the rank. diffusers merges two thirds of these wrongly."""
    unet = base.modules["unet"]
    paths = [path for path in adaptable(unet) if ".attn" in path or "resnets" in path]
    ranks = {path: (2, 5, 8)[index % 3] for index, path in enumerate(paths)}
    alphas = {path: (1.0, 2.5, 4.0, 7.0)[index % 4] for index, path in enumerate(paths) if index % 5}
    tensors = kohya_lora(unet, ranks, alphas)
    found = merged(base, tensors, tmp_path, strength=0.5).modules["unet"]
    for path, rank in ranks.items():
        down, up = (tensors[f"{kohya(path)}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
        before = unet.get_parameter(f"{path}.weight")
        wanted = before + 0.5 * alphas.get(path, rank) / rank * (up @ down).view_as(before)
        assert torch.allclose(found.get_parameter(f"{path}.weight"), wanted, atol=1e-6), path
    after = other_parameters(found, paths)
    assert after
    assert all(torch.equal(values, after[name]) for name, values in other_parameters(unet, paths).items())


def test_core_of_a_convolution_is_the_chain_of_three_convolutions(sd: LoadedModel, tmp_path: Path) -> None:
    """LyCORIS: one tap down, nine taps between, one tap up."""
    path = "down_blocks.1.resnets.0.conv1"
    layer = sd.modules["unet"].get_submodule(path)
    assert isinstance(layer, nn.Conv2d)
    down, mid, up = torch.randn(3, layer.in_channels, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    tensors = {"down": down, "mid": mid, "up": up}
    tensors = {f"{kohya(path)}.lora_{part}.weight": values for part, values in tensors.items()}
    changed = merged(sd, tensors, tmp_path, strength=0.5).modules["unet"].get_submodule(path)
    x = torch.randn(1, layer.in_channels, 8, 8)
    chain = functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid, padding=1), up)
    assert torch.allclose(changed(x), layer(x) + 0.5 * chain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("made_for", ["Linear", "Conv2d"])
def test_projection_takes_a_lora_made_for_its_other_kind(
    sd: LoadedModel, base: LoadedModel, tmp_path: Path, made_for: str
) -> None:
    """proj_in is a convolution of one tap in some models and Linear in others, with the same numbers."""
    model = sd if made_for == "Linear" else base
    unet = model.modules["unet"]
    path = next(path for path in adaptable(unet) if path.endswith("proj_in"))
    down, up = (part.flatten(1) for part in factors(unet.get_submodule(path)))
    saved = (down, up) if made_for == "Linear" else (down[..., None, None], up[..., None, None])
    tensors = {f"{kohya(path)}.lora_{part}.weight": values for part, values in zip(("down", "up"), saved, strict=True)}
    before = unet.get_parameter(f"{path}.weight")
    found = merged(model, tensors, tmp_path).modules["unet"].get_parameter(f"{path}.weight")
    assert torch.allclose(found, before + (up @ down).view_as(before), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_float_are_multiplied_in_fp32(base: LoadedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = kohya_lora(base.modules["unet"], {TO_Q: RANK}, {TO_Q: 3.0})
    tensors = {name: values.to(dtype) for name, values in tensors.items()}
    down, up = (tensors[f"{kohya(TO_Q)}.lora_{part}.weight"].float() for part in ("down", "up"))
    found = merged(base, tensors, tmp_path).modules["unet"].get_parameter(f"{TO_Q}.weight")
    wanted = base.modules["unet"].get_parameter(f"{TO_Q}.weight") + 3 / RANK * (up @ down)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=1e-6)


def test_merged_model_has_the_same_plain_layers_as_before(tiny_sdxl: Path, lora_file: Path, base: LoadedModel) -> None:
    found = load(str(tiny_sdxl), [LoraFile(lora_file)])
    for component, module in found.modules.items():
        kinds = {name: type(part) for name, part in module.named_modules()}
        assert kinds == {name: type(part) for name, part in base.modules[component].named_modules()}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())


def test_merging_leaves_the_files_on_disk_as_they_were(tiny_sdxl: Path, lora_file: Path) -> None:
    files = (tiny_sdxl / "unet/diffusion_pytorch_model.safetensors", lora_file)
    before = [file.read_bytes() for file in files]
    load(str(tiny_sdxl), [LoraFile(lora_file)])
    assert [file.read_bytes() for file in files] == before


def test_several_loras_add_up_by_their_strengths(tiny_sdxl: Path, tmp_path: Path, base: LoadedModel) -> None:
    unet, asked, change = base.modules["unet"], [], torch.zeros(())
    for index, (rank, strength) in enumerate(((3, 0.5), (5, -2.0), (4, 0.0))):
        tensors = kohya_lora(unet, {"conv_in": rank, TO_Q: rank}, {})
        file = tmp_path / f"größe {index}.safetensors"
        save_file(tensors, file)
        asked.append(LoraFile(file, strength))
        down, up = (tensors[f"{kohya(TO_Q)}.lora_{part}.weight"] for part in ("down", "up"))
        change = change + strength * (up @ down)
    found = load(str(tiny_sdxl), asked).modules["unet"].get_parameter(f"{TO_Q}.weight")
    assert torch.allclose(found, unet.get_parameter(f"{TO_Q}.weight") + change, atol=1e-6)


ODD_METADATA: dict[str, Callable[[], dict[str, str]]] = {
    "a regular expression that never ends": lambda: {
        "lora_adapter_metadata": json.dumps(
            {"unet.lora_alpha": 3, "unet.target_modules": "(a|a)*" * 40 + "$", "unet.exclude_modules": "(.*)*x"}
        )
    },
    "a config of another component": lambda: {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "?"})},
    "a trainer's notes": lambda: {"ss_network_args": "{", "ss_tag_frequency": "[" * 10_000, "größe": "\x00\n"},
}


@pytest.mark.parametrize("name", ODD_METADATA)
def test_metadata_is_read_for_alphas_alone(base: LoadedModel, tmp_path: Path, name: str) -> None:
    tensors = kohya_lora(base.modules["unet"], {TO_Q: RANK}, {})
    found = merged(base, tensors, tmp_path, metadata=ODD_METADATA[name]()).modules["unet"]
    plain = merged(base, tensors, tmp_path, strength=3 / RANK if "never" in name else 1.0).modules["unet"]
    assert torch.equal(found.get_parameter(f"{TO_Q}.weight"), plain.get_parameter(f"{TO_Q}.weight"))
