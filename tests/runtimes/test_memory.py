# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from turbopocket.ground.errors import TurbopocketError
from turbopocket.runtimes.image_size import ImageSize
from turbopocket.runtimes.manifest import (
    ComponentSpec,
    ImageSpec,
    Manifest,
    TensorSpec,
    file_entries,
    load_manifest,
    write_manifest,
)
from turbopocket.runtimes.onnx import memory
from turbopocket.runtimes.schedule import SamplerSpec

from ..pipelines import of_one_graph

MEBIBYTE = 2**20


def _artifact(folder: Path, width: int, body: str = "") -> Path:
    """An artifact of one component `unet` that multiplies [batch, width] by a dense fp32 [width, width]."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((width, width), dtype=np.float32)
    shape = ["batch", width]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["sample", "weight"], ["out_sample"])],
        "unet",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "unet").mkdir(parents=True)
    onnx.save(model, folder / "unet/model.onnx")
    if body:
        (folder / "unet/model.onnx").write_text(body)
    (folder / "notes.txt").write_text("not a part of the component")
    dims: list[int | str] = ["batch", width]
    write_manifest(
        folder,
        Manifest(
            name="one-matrix",
            family="sd",
            target="onnx",
            files=file_entries(folder),
            components={
                "unet": ComponentSpec(
                    file="unet/model.onnx",
                    inputs=[TensorSpec(name="sample", dtype="float32", shape=dims)],
                    outputs=[TensorSpec(name="out_sample", dtype="float32", shape=dims)],
                )
            },
            tokenizers={},
            pipeline=of_one_graph("unet", "sample", "out_sample"),
            sampler=SamplerSpec(
                kind="euler",
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="trailing",
                steps=1,
                guidance_scale=0.0,
            ),
            image=ImageSpec(
                height=16,
                width=16,
                latent_channels=4,
                latent_height=8,
                latent_width=8,
                vae_scaling_factor=0.13,
            ),
            sizes=[ImageSize(16, 16)],
            tools={},
            recipe="",
        ),
    )
    return folder


def test_dense_weights_stay_in_memory_in_full(tmp_path: Path) -> None:
    figures = memory.measure(_artifact(tmp_path / "dense", 2048), "unet")
    growth_bytes = figures.ran_anon_bytes - figures.start_anon_bytes
    assert 16 * MEBIBYTE <= figures.weight_bytes < 16.1 * MEBIBYTE
    assert 0.9 * figures.weight_bytes < growth_bytes < 2.5 * figures.weight_bytes
    assert figures.peak_bytes >= figures.ran_anon_bytes


def test_a_tiny_graph_takes_next_to_nothing(tmp_path: Path) -> None:
    figures = memory.measure(_artifact(tmp_path / "tiny", 8), "unet")
    assert figures.ran_anon_bytes - figures.start_anon_bytes < 8 * MEBIBYTE
    assert figures.weight_bytes < 2000


def test_inputs_are_for_one_picture_of_the_asked_size(tmp_path: Path) -> None:
    manifest = load_manifest(_artifact(tmp_path / "tiny", 8))
    inputs = memory.zero_inputs(manifest.components["unet"], manifest.image)
    assert inputs["sample"].shape == (1, 8)
    assert inputs["sample"].dtype == np.float32
    free = TensorSpec(name="sample", dtype="float32", shape=["batch", 4, "latent_height", "latent_width"])
    spec = ComponentSpec(file="unet/model.onnx", inputs=[free], outputs=[free])
    assert memory.zero_inputs(spec, manifest.image.at(ImageSize(32, 48)))["sample"].shape == (1, 4, 16, 24)


def test_an_unknown_component_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TurbopocketError, match=r"no component 'transformer'.*unet"):
        memory.measure(_artifact(tmp_path / "tiny", 8), "transformer")


def test_a_damaged_graph_gives_one_line_instead_of_a_traceback(tmp_path: Path) -> None:
    folder = _artifact(tmp_path / "damaged", 8, body="not a graph")
    with pytest.raises(TurbopocketError, match=r"^unet: the measuring process ended with 1: .+$"):
        memory.measure(folder, "unet")


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    folder = _artifact(tmp_path / "missing", 8)
    (folder / "unet/model.onnx").unlink()
    with pytest.raises(TurbopocketError, match=r"unet/model\.onnx is missing"):
        memory.measure(folder, "unet")


def test_a_system_without_proc_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no" / "status")
    with pytest.raises(TurbopocketError, match="this system has no"):
        memory.measure(_artifact(tmp_path / "tiny", 8), "unet")


def test_a_process_that_holds_pytorch_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys, types; sys.modules['torch'] = types.ModuleType('torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TurbopocketError, match="PyTorch was imported"):
        memory.measure(_artifact(tmp_path / "tiny", 8), "unet")
