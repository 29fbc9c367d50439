# SPDX-License-Identifier: Apache-2.0
"""Two kinds of model: a toy artifact of three ONNX graphs, and the tiny checkpoints run by PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from turbopocket.runtimes.compare.reference import PyTorchRunner, TorchComponent
from turbopocket.runtimes.drawing.tokenizer import Tokenizer
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import (
    ComponentSpec,
    ImageSpec,
    Manifest,
    SamplerSpec,
    TensorSpec,
    file_entries,
    load_manifest,
    write_manifest,
)

from ..pipelines import sd, sdxl

TOKENS, WIDTH, LATENT = 8, 6, 6
TURBO = {
    "_class_name": "EulerAncestralDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))


TOY_COMPONENTS = {
    "text_encoder": ComponentSpec(
        file="text_encoder/model.onnx",
        inputs=[spec("input_ids", "int64", 1, TOKENS)],
        outputs=[spec("last_hidden_state", "float32", 1, TOKENS, WIDTH)],
    ),
    "unet": ComponentSpec(
        file="unet/model.onnx",
        inputs=[
            spec("sample", "float32", 1, 4, LATENT, LATENT),
            spec("timestep", "float32", 1),
            spec("encoder_hidden_states", "float32", 1, "tokens", WIDTH),
        ],
        outputs=[spec("out_sample", "float32", 1, 4, LATENT, LATENT)],
    ),
    "vae_decoder": ComponentSpec(
        file="vae_decoder/model.onnx",
        inputs=[spec("latent_sample", "float32", 1, 4, LATENT, LATENT)],
        outputs=[spec("sample", "float32", 1, 3, 2 * LATENT, 2 * LATENT)],
    ),
}
_ELEMENTS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def _graph(component: str, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    tensors = TOY_COMPONENTS[component]
    graph = helper.make_graph(
        nodes,
        component,
        [helper.make_tensor_value_info(t.name, _ELEMENTS[t.dtype], t.shape) for t in tensors.inputs],
        [helper.make_tensor_value_info(t.name, _ELEMENTS[t.dtype], t.shape) for t in tensors.outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def toy_graphs() -> dict[str, onnx.ModelProto]:
    """An embedding table, a convolution moved by time and text, and an upsampling 1x1 convolution."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3)

    node = helper.make_node
    unet = [
        node("Conv", ["sample", "conv.weight"], ["h"], name="conv_in", pads=[1, 1, 1, 1]),
        node("MatMul", ["encoder_hidden_states", "to_q.weight"], ["q"], name="mid.attn.to_q"),
        node("Add", ["q", "to_q.bias"], ["q_biased"], name="mid.attn.to_q/bias"),
        node("ReduceMean", ["q_biased", "all_axes"], ["moved"], name="mean", keepdims=0),
        node("Mul", ["timestep", "per_step"], ["time"], name="time"),
        node("Add", ["h", "moved"], ["h_text"], name="add_text"),
        node("Add", ["h_text", "time"], ["out_sample"], name="add_time"),
    ]
    vae = [
        node("Conv", ["latent_sample", "conv.weight"], ["small"], name="conv_out"),
        node("Resize", ["small", "", "scales"], ["sample"], name="resize", mode="nearest"),
    ]
    return {
        "text_encoder": _graph(
            "text_encoder",
            [node("Gather", ["table", "input_ids"], ["last_hidden_state"], name="token_embedding")],
            {"table": normal(16, WIDTH)},
        ),
        "unet": _graph(
            "unet",
            unet,
            {
                "conv.weight": normal(4, 4, 3, 3),
                "to_q.weight": normal(WIDTH, WIDTH),
                "to_q.bias": normal(WIDTH),
                "all_axes": np.array([0, 1, 2]),
                "per_step": np.array([1e-4], dtype=np.float32),
            },
        ),
        "vae_decoder": _graph(
            "vae_decoder",
            vae,
            {"conv.weight": normal(3, 4, 1, 1), "scales": np.array([1, 1, 2, 2], dtype=np.float32)},
        ),
    }


def write_toy_tokenizer(path: Path, pad_id: int | None = 15) -> None:
    """Words of one token each, between marks 0 and 1; everything unknown is 2."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5, "on": 6, "blue": 7, "!": 15}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rules.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    if pad_id is not None:
        rules.enable_padding(pad_id=pad_id, pad_token="!")
    path.parent.mkdir(parents=True, exist_ok=True)
    rules.save(str(path))


@pytest.fixture
def toy_artifact(tmp_path: Path) -> Path:
    """A complete artifact folder: three graphs with external weights, a tokenizer, a manifest."""
    folder = tmp_path / "toy"
    write_toy_tokenizer(folder / "tokenizer" / "tokenizer.json")
    for component, model in toy_graphs().items():
        (folder / component).mkdir()
        onnx.save(
            model,
            folder / TOY_COMPONENTS[component].file,
            save_as_external_data=True,
            location="weights.bin",
            size_threshold=64,  # ONNX Runtime wants shapes and axes inside the graph
        )
    side = 2 * LATENT
    manifest = Manifest(
        name="toy",
        family="sd",
        target="onnx",
        files=file_entries(folder),
        components=TOY_COMPONENTS,
        tokenizers={"text_encoder": "tokenizer"},
        pipeline=sd(),
        sampler=SamplerSpec.from_scheduler_config(TURBO, steps=2, guidance_scale=1.0),
        image=ImageSpec(
            height=side,
            width=side,
            latent_channels=4,
            latent_height=LATENT,
            latent_width=LATENT,
            vae_scaling_factor=0.18215,
        ),
        sizes=[ImageSize(side, side)],
        tools={"onnx": onnx.__version__},
        recipe="",
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def toy_manifest(toy_artifact: Path) -> Manifest:
    return load_manifest(toy_artifact)


class _TextEncoder(nn.Module):
    """CLIP with its outputs as a tuple, in the order of their ONNX names."""

    def __init__(self, encoder: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.encoder, self.pooled = encoder, pooled

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.encoder(input_ids, output_hidden_states=True)
        pooled = (found.text_embeds,) if self.pooled else ()
        return (*pooled, found.last_hidden_state, *found.hidden_states)


class _Unet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        conditions = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return self.unet(sample, timestep, states, added_cond_kwargs=conditions).sample


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample).sample


@dataclass
class TinyModel:
    """A diffusers pipeline and the same model behind our interfaces."""

    pipeline: Any
    runner: PyTorchRunner
    manifest: Manifest
    tokenizers: dict[str, Tokenizer]


def _torch_components(pipeline: Any, family: str) -> dict[str, TorchComponent]:
    added = ("text_embeds", "time_ids") if family == "sdxl" else ()
    states = tuple(f"hidden_states.{i}" for i in range(3))
    components = {
        "text_encoder": TorchComponent(
            _TextEncoder(pipeline.text_encoder, False),
            ("input_ids",),
            ("last_hidden_state", *states),
            "encoder.",
        ),
        "unet": TorchComponent(
            _Unet(pipeline.unet),
            ("sample", "timestep", "encoder_hidden_states", *added),
            ("out_sample",),
            "unet.",
        ),
        "vae_decoder": TorchComponent(_Decoder(pipeline.vae), ("latent_sample",), ("sample",), "vae."),
    }
    if family == "sdxl":
        names = ("text_embeds", "last_hidden_state", *states)
        components["text_encoder_2"] = TorchComponent(
            _TextEncoder(pipeline.text_encoder_2, True), ("input_ids",), names, "encoder."
        )
    return components


def _tensor_specs(component: TorchComponent) -> ComponentSpec:
    """Names and types only: PyTorch runs take any size."""
    ranks = {"sample": 4, "latent_sample": 4, "timestep": 0, "encoder_hidden_states": 3}
    inputs = [
        spec("input_ids", "int64", 1, 77) if name == "input_ids" else spec(name, "float32", *["n"] * ranks.get(name, 2))
        for name in component.input_names
    ]
    outputs = [spec(name, "float32", "n") for name in component.output_names]
    return ComponentSpec(file="weights", inputs=inputs, outputs=outputs)


def _save_tokenizers(pipeline: Any, components: dict[str, TorchComponent], folder: Path) -> dict[str, str]:
    places = {}
    for name in components:
        if name.startswith("text_encoder"):
            place = name.replace("text_encoder", "tokenizer")
            tokenizer = getattr(pipeline, place)
            rules = tokenizer.backend_tokenizer
            rules.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
            (folder / place).mkdir()
            rules.save(str(folder / place / "tokenizer.json"))
            places[name] = place
    return places


def tiny_model(
    pipeline: Any,
    family: str,
    folder: Path,
    scheduler: Any,
    guidance: float,
    steps: int,
    width_px: int = 32,
) -> TinyModel:
    """The pipeline with `scheduler`, and its twin in numpy over PyTorchRunner."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    components = _torch_components(pipeline, family)
    places = _save_tokenizers(pipeline, components, folder)
    (folder / "weights").touch()
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    manifest = Manifest(
        name=family,
        family=family,
        target="onnx",
        files=file_entries(folder),
        components={name: _tensor_specs(component) for name, component in components.items()},
        tokenizers=places,
        pipeline=sd() if family == "sd" else sdxl("zeros" if zeros else "empty prompt"),
        sampler=SamplerSpec.from_scheduler_config(config, steps, guidance),
        image=ImageSpec(
            height=32,
            width=width_px,
            latent_channels=4,
            latent_height=16,
            latent_width=width_px // 2,
            vae_scaling_factor=pipeline.vae.config.scaling_factor,
        ),
        sizes=[ImageSize(32, width_px)],
        tools={"torch": torch.__version__},
        recipe=json.dumps({}),
    )
    tokenizers_by_component = {name: Tokenizer(folder / place / "tokenizer.json", 77) for name, place in places.items()}
    return TinyModel(pipeline, PyTorchRunner(components), manifest, tokenizers_by_component)
