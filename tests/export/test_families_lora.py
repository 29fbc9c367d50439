# SPDX-License-Identifier: Apache-2.0
"""LoRA files are merged into the weights before anything else sees them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from turbopocket.export.families import LoadedModel, load
from turbopocket.runtimes.errors import TurbopocketError

ADAPTED = ("to_q", "to_v", "q_proj", "fc1")
RANK = 4
TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tiny_sdxl: Path) -> LoadedModel:
    return load(str(tiny_sdxl))


def _published_name(component: str, path: str) -> str:
    return f"{component}.text_model.{path}" if component == "text_encoder" else f"{component}.{path}"


def _lora(model: LoadedModel, components: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    """Returns a LoRA of rank 4 in diffusers' naming, large enough to change every output."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component in components:
        for path, layer in model.modules[component].named_modules():
            if path.endswith(ADAPTED) and isinstance(layer, nn.Linear):
                name = _published_name(component, path)
                down = torch.randn(RANK, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, RANK, generator=generator)
                tensors |= {f"{name}.lora_A.weight": 0.2 * down, f"{name}.lora_B.weight": 0.2 * up}
    return tensors


@pytest.fixture(scope="module")
def lora_file(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(_lora(base, ("unet", "text_encoder", "text_encoder_2")), file)
    return file


def _prediction(modules: Any) -> Tensor:
    """Returns the UNet's output for a fixed prompt and latents, through both text encoders."""
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


def test_merged_model_equals_the_pipeline_with_the_lora_active(
    tiny_sdxl: Path, lora_file: Path, base: LoadedModel
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    pipeline.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name)
    active = _prediction(pipeline.components)
    merged = _prediction(load(str(tiny_sdxl), [lora_file]).modules)
    assert torch.allclose(merged, active, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_prediction(base.modules), active, rtol=1e-2, atol=1e-2)


def test_merged_model_has_the_same_plain_layers_as_before(tiny_sdxl: Path, lora_file: Path, base: LoadedModel) -> None:
    merged = load(str(tiny_sdxl), [lora_file])
    for component, module in merged.modules.items():
        kinds = {name: type(part) for name, part in module.named_modules()}
        assert kinds == {name: type(part) for name, part in base.modules[component].named_modules()}
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(part.training for part in module.modules())


def test_merging_leaves_the_checkpoint_on_disk_as_it_was(tiny_sdxl: Path, lora_file: Path) -> None:
    file = tiny_sdxl / "unet/diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    load(str(tiny_sdxl), [lora_file])
    assert file.read_bytes() == before


def test_several_loras_add_up(tiny_sdxl: Path, tmp_path: Path, base: LoadedModel) -> None:
    loras = [_lora(base, ("unet", "text_encoder"), seed) for seed in (1, 2)]
    for index, tensors in enumerate(loras):
        save_file(tensors, tmp_path / f"{index}.safetensors")
    merged = load(str(tiny_sdxl), [tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    for component, path in (("unet", TO_Q), ("text_encoder", "encoder.layers.0.self_attn.q_proj")):
        name = _published_name(component, path)
        change = sum(lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"] for lora in loras)
        found = merged.modules[component].get_parameter(f"{path}.weight")
        assert torch.allclose(found, base.modules[component].get_parameter(f"{path}.weight") + change, atol=1e-6)


def test_kohya_names_and_alpha_are_understood(tiny_sdxl: Path, tmp_path: Path, base: LoadedModel) -> None:
    lora = _lora(base, ("unet",))
    kohya: dict[str, Tensor] = {}
    for name, tensor in lora.items():
        path, _, part = name.removeprefix("unet.").partition(".lora_")
        layer = "lora_unet_" + path.replace(".", "_")
        kohya[f"{layer}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        kohya[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    merged = load(str(tiny_sdxl), [tmp_path / "kohya.safetensors"]).modules["unet"]
    change = lora[f"unet.{TO_Q}.lora_B.weight"] @ lora[f"unet.{TO_Q}.lora_A.weight"] / RANK
    expected = base.modules["unet"].get_parameter(f"{TO_Q}.weight") + change
    assert torch.allclose(merged.get_parameter(f"{TO_Q}.weight"), expected, atol=1e-6)


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("attn", "attention"): tensor for name, tensor in tensors.items()}


def _with_one_unknown_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    down, up = torch.zeros(RANK, 32), torch.zeros(32, RANK)
    return tensors | {"unet.nowhere.to_q.lora_A.weight": down, "unet.nowhere.to_q.lora_B.weight": up}


def _narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in tensors.items()}


def _with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = f"unet.{TO_Q}.lora_B.weight"
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


def _with_magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"unet.{TO_Q}.dora_scale": torch.ones(32)}


def _plain_weights(_: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"unet.conv_in.weight": torch.zeros(3)}


@pytest.mark.parametrize(
    ("component", "change", "said"),
    [
        ("unet", _renamed, r"does not fit tiny_sdxl: Target modules .* not found"),
        ("unet", _with_one_unknown_layer, r"44 of its 45 layers are in tiny_sdxl, all must be"),
        ("unet", _narrower, r"does not fit tiny_sdxl: .*size mismatch"),
        ("text_encoder", _narrower, r"does not fit tiny_sdxl: "),
        ("unet", _with_nan, r"lora_B\.weight has 128 of 128 values that are NaN"),
        ("unet", _with_magnitudes, r"is a DoRA.*allowed: LoRA"),
        ("unet", _plain_weights, r"is not a LoRA: none of its 1 tensors"),
    ],
)
def test_lora_that_cannot_be_merged_whole_is_refused(
    tiny_sdxl: Path,
    tmp_path: Path,
    base: LoadedModel,
    component: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
) -> None:
    save_file(change(_lora(base, (component,))), tmp_path / "bad.safetensors")
    with pytest.raises(TurbopocketError, match=said):
        load(str(tiny_sdxl), [tmp_path / "bad.safetensors"])


def test_lora_of_another_model_is_refused(tiny_sd: Path, lora_file: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"does not fit tiny_sd|of its \d+ layers are in tiny_sd"):
        load(str(tiny_sd), [lora_file])


def test_lora_that_does_not_exist_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"the LoRA .* does not exist"):
        load(str(tiny_sd), [tmp_path / "none.safetensors"])


@pytest.mark.parametrize("suffix", [".pt", ".bin", ""])
def test_lora_that_is_not_safetensors_by_name_is_refused(
    tiny_sd: Path, tmp_path: Path, lora_file: Path, suffix: str
) -> None:
    file = Path(shutil.copy(lora_file, tmp_path / f"style{suffix}"))
    with pytest.raises(TurbopocketError, match=r"allowed: \.safetensors"):
        load(str(tiny_sd), [file])


def test_lora_that_is_not_safetensors_inside_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"\x80\x02 a pickle in disguise")
    with pytest.raises(TurbopocketError, match="is not a safetensors file"):
        load(str(tiny_sd), [tmp_path / "style.safetensors"])
